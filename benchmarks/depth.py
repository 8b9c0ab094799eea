"""What a deeper model costs to compile: nothing, where its layers are alike and the program scans over them.

    python -m benchmarks.depth                compiles what benchmarks/depth.csv lacks: some minutes
    python -m benchmarks.depth --repeats 5    each program five times
    python -m benchmarks.depth --stored       the table from what is kept there

The training step of Llama-2-70B, laid out as the planner lays out its 80 layers, and the same step of its first 4.
Compiled by turns, each time in a new process. Given are seconds of the processor for tracing, lowering and
compiling, of all threads, which other work on the machine hardly changes, and seconds of the clock, which it does; of
each the least, as whatever disturbs only adds. Importing is left out.
"""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.scaling import Case, processor
from tbjax.plain import plain, restore
from tbjax.planner.compilers import compiler_for, environment, require
from tbjax.planner.plan import Plan

CASES = (Case("llama-2-70b", "h100:8x8", 1, 4096), Case("llama-2-70b", "v5p:4x4x4", 1, 4096))
DEPTHS = (4, 80)
FILE = Path(__file__).with_suffix(".csv")

# What the issue of it is: 80 layers may take so much longer than 4.
RATIO = 1.3


class Seconds(NamedTuple):
    """Tracing, lowering and compiling, once."""

    processor: float
    clock: float


def measure(plan: Plan, layers: int) -> Seconds:
    """Compiles the step of the plan's first `layers` layers in a process of its own."""
    compiler = compiler_for(plan.cluster)
    require(compiler)
    config = dataclasses.replace(plan.config, layer_kinds=plan.config.layer_kinds[:layers])
    case = {"config": config, "workload": plan.workload, "layout": plan.layout, "cluster": plan.cluster}
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.depth", "--one"],
        input=json.dumps(plain({**case, "compiler": compiler})),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment(compiler, plan.cluster.devices),
    )
    if process.returncode:
        raise RuntimeError(f"{layers} layers for {plan.cluster} did not compile:\n{process.stderr[-2000:]}")
    return Seconds(**json.loads(process.stdout.splitlines()[-1]))  # compilers may talk before


def _one() -> None:
    """The process that compiles: a case on standard input, seconds on standard output."""
    from tbjax.planner.compile import Case as Program
    from tbjax.planner.compile import compile_case

    case = restore(Program, json.load(sys.stdin))
    before, start = processor(), time.perf_counter()
    compile_case(case)
    print(json.dumps({"processor": processor() - before, "clock": time.perf_counter() - start}))


def kept(file: Path = FILE) -> dict[tuple[str, int], list[Seconds]]:
    """What has been measured so far, by cluster and layers."""
    found: dict[tuple[str, int], list[Seconds]] = {}
    if file.exists():
        with file.open(newline="") as lines:
            for row in csv.DictReader(line for line in lines if not line.startswith("#")):
                seconds = Seconds(float(row["processor"]), float(row["clock"]))
                found.setdefault((row["cluster"], int(row["layers"])), []).append(seconds)
    return found


def keep(measured: Mapping[tuple[str, int], Sequence[Seconds]], file: Path = FILE) -> None:
    with file.open("w", newline="") as lines:
        lines.write("# Seconds of tracing, lowering and compiling a step of Llama-2-70B: python -m benchmarks.depth\n")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["cluster", "layers", *Seconds._fields])
        writer.writerows([*key, *(f"{s:.1f}" for s in one)] for key in sorted(measured) for one in measured[key])


def least(measured: Sequence[Seconds]) -> Seconds:
    return Seconds(min(one.processor for one in measured), min(one.clock for one in measured))


def ratio(measured: Mapping[tuple[str, int], Sequence[Seconds]], cluster: str) -> Seconds:
    """How much longer the whole model takes than its first layers."""
    shallow, deep = (least(measured[cluster, layers]) for layers in DEPTHS)
    return Seconds(deep.processor / shallow.processor, deep.clock / shallow.clock)


def table(measured: Mapping[tuple[str, int], Sequence[Seconds]]) -> Table:
    """The least of each, and the ratios, of the clusters that have both depths."""
    result = Table(title="Compiling the training step of Llama-2-70B", title_justify="left")
    for heading in ("for", *(f"{layers} layers" for layers in DEPTHS), "ratio", "by the clock", "times"):
        result.add_column(heading, justify="left" if heading == "for" else "right")
    for case in CASES:
        found = [measured.get((case.cluster, layers), ()) for layers in DEPTHS]
        if all(found):
            ratios = ratio(measured, case.cluster)
            times = [f"{least(each).processor:.1f} s" for each in found]
            result.add_row(
                case.cluster, *times, f"{ratios.processor:.2f}", f"{ratios.clock:.2f}", str(min(map(len, found)))
            )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="compilations of each program (default 2)")
    parser.add_argument("--stored", action="store_true", help="compile nothing")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        _one()
        return
    console, measured = Console(width=100), kept()
    for repeat in range(0 if given.stored else given.repeats):
        for case in CASES:
            for layers in DEPTHS:
                found = measured.setdefault((case.cluster, layers), [])
                if len(found) <= repeat:
                    found.append(measure(case.plan(), layers))
                    keep(measured)
                    console.print(f"{case.cluster}, {layers} layers: {found[-1]}", style="dim", highlight=False)
    console.print(table(measured))


if __name__ == "__main__":
    main()
