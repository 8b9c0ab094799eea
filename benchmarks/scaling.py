"""Training steps of large models on large clusters, by the vendors' compilers: do they fit, and what do they send?

    python -m benchmarks.scaling                     compiles what benchmarks/scaling.csv lacks, prints the tables
    python -m benchmarks.scaling --stored            prints them from that file alone, in seconds
    python -m benchmarks.scaling v5p 405B            compiles only what has both words in its model and its cluster
    python -m benchmarks.scaling --stored --svg FILE draws the curves

Two tables. The models that others train on such machines, each laid out as `tbjax.plan` lays it out; and Llama-2-70B
from 64 devices upwards at a fixed batch for each device, which is how training grows. Every program is whole, compiled
for all of its devices: none of them is there, and no layer is left out.

From the compiler come the bytes of one device and what it exchanges with others in a step. The seconds of a step are
the planner's, for the very layout that was compiled; what the compiler for TPU takes a device to compute, without the
kernels of attention, which it cannot price, stands beside them. Efficiency is that of weak scaling: tokens per second
and device, as a share of those on the smallest cluster. It is efficiency on paper: no link is slower than its vendor
says, no device waits for another that has more to do, and none fails.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from tbjax.planner import hlo, traffic, words
from tbjax.planner.cost import Time, mfu, step_time
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.hlo import Collective, collective
from tbjax.planner.memory import memory
from tbjax.planner.plan import Plan
from tbjax.planner.verify import Verification, verify
from tbjax.planner.workload import Layout, Workload
from tbjax.planning import model_config, plan

FILE = Path(__file__).with_suffix(".csv")
GiB = 1 << 30

# Columns of the tables.
WIDTH = 156

# Seconds for one compilation: the longest here takes two minutes where nothing else runs.
TIMEOUT = 3600


class Case(NamedTuple):
    """What is trained, on what."""

    model: str
    cluster: str
    rows: int  # sequences in the batch, for each device
    seq_len: int

    @property
    def where(self) -> Cluster:
        return cluster(self.cluster)

    @property
    def workload(self) -> Workload:
        return Workload(global_batch=self.rows * self.where.devices, seq_len=self.seq_len)

    def plan(self) -> Plan:
        rows = self.workload.global_batch
        return plan(self.model, self.cluster, global_batch=rows, seq_len=self.seq_len)


# Sequences as long as the models were pretrained with, on as many devices as leave room for that batch.
MODELS = (
    Case("llama-2-70b", "h100:8x8", 1, 4096),
    Case("llama-2-70b", "v5p:4x4x4", 1, 4096),
    Case("mixtral-8x7b", "h100:8x8", 2, 4096),
    Case("mixtral-8x7b", "v5p:4x4x4", 2, 4096),
    Case("tiiuae/falcon-180B", "h100:32x8", 1, 2048),
    Case("tiiuae/falcon-180B", "v5p:8x8x8", 1, 2048),
    Case("meta-llama/Llama-3.1-405B", "h100:64x8", 1, 8192),
    Case("meta-llama/Llama-3.1-405B", "v5p:8x8x16", 1, 8192),
)

H100 = tuple(f"h100:{hosts}x8" for hosts in (8, 16, 32, 64, 128, 256, 512))
V5P = tuple(f"v5p:{t}" for t in "4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24".split())
CURVES: Mapping[str, Sequence[Case]] = {
    title: tuple(Case("llama-2-70b", name, 1, 4096) for name in names)
    for title, names in {"H100": H100, "v5p": V5P}.items()
}
# GPUs first: what takes seconds for them takes minutes for TPUs.
CASES = sorted(dict.fromkeys([*MODELS, *itertools.chain(*CURVES.values())]), key=lambda case: case.cluster[0] == "v")


class Compiled(NamedTuple):
    """What the compiler said of a case: bytes on one device, and what that device exchanges in a step."""

    case: Case
    layout: Layout
    place: int  # of the layout among those that the planner ranked: 1 unless the compiler let the first ones not fit
    jax: str
    argument: int
    output: int
    alias: int
    temp: int
    peak: int
    cycles: int  # TPU: the compiler's estimate of what a device computes
    untold: int  # TPU: runs of kernels and ragged products, which are not in it
    seconds: float  # of the processor, for the process that compiled: from its imports to its end
    collectives: tuple[Collective, ...]

    @property
    def total(self) -> int:
        """What a device must have free."""
        return self.argument + self.output - self.alias + self.temp

    @property
    def fits(self) -> bool:
        return self.total <= self.case.where.hardware.usable

    @property
    def sent(self) -> Counter[str]:
        """Bytes that leave one device in a step, by the mesh axes along which they go."""
        return +Counter({"+".join(axes): size for axes, size in hlo.sent(self.collectives).items()})

    @property
    def computing(self) -> float:
        """TPU: seconds that the compiler takes a device to compute, transfers left out; 0 elsewhere."""
        clock = self.case.where.hardware.clock
        return self.cycles / clock if clock else 0.0


class Point(NamedTuple):
    """A case as it is shown: with what the planner says of it, and with what the compiler does if it was asked."""

    case: Case
    layout: Layout  # that was compiled, or that would be
    compiled: Compiled | None

    @property
    def devices(self) -> int:
        return self.case.where.devices

    @property
    def time(self) -> Time:
        return step_time(model_config(self.case.model)[0], self.case.workload, self.layout, self.case.where)


def point(case: Case, found: Mapping[Case, Compiled]) -> Point:
    compiled = found.get(case)
    return Point(case, compiled.layout if compiled else case.plan().layout, compiled)


# --- Compiling --------------------------------------------------------------------------------------------------------


def compile_case(case: Case, console: Console) -> Compiled:
    """Compiles the best plan, or the next best where the compiler lets it not fit; the last one tried, if none fits."""
    chosen = case.plan()
    layouts = [chosen.layout, *(candidate.layout for candidate in chosen.candidates)]
    for place, layout in enumerate(layouts, 1):
        console.print(f"{case.model} on {case.cluster}: {words.mesh(layout)} ({words.options(layout)})", style="dim")
        start = processor()
        said = verify(chosen.config, chosen.workload, layout, chosen.cluster, timeout=TIMEOUT)
        found = _compiled(case, layout, place, said, processor() - start)
        if found.fits and not said.refusal:
            return found
        console.print(f"  needs {words.gib(found.total)}, more than a device has. {said.refusal[:200]}", style="dim")
    raise RuntimeError(f"{case.model} on {case.cluster}: no layout that the planner ranked fits, says the compiler.")


def processor() -> float:
    """Seconds of the processor so far, of this process and of those that it started and that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _compiled(case: Case, layout: Layout, place: int, said: Verification, seconds: float) -> Compiled:
    program = said.compiled
    kinds = {kind: program.bytes[kind] for kind in ("argument", "output", "alias", "temp", "peak")}
    return Compiled(
        case=case,
        layout=layout,
        place=place,
        jax=importlib.metadata.version("jax"),
        cycles=program.cycles,
        untold=program.untold,
        seconds=round(seconds, 1),
        collectives=program.collectives,
        **kinds,
    )


# --- Keeping ----------------------------------------------------------------------------------------------------------

_NUMBERS = ("place", "argument", "output", "alias", "temp", "peak", "cycles", "untold")


def kept(file: Path = FILE) -> dict[Case, Compiled]:
    """What has been compiled so far."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {one.case: one for one in map(_read, rows)}


def _read(row: Mapping[str, str]) -> Compiled:
    layout = Layout(**dict(_setting(word) for word in row["layout"].split()))
    return Compiled(
        case=Case(row["model"], row["cluster"], int(row["rows"]), int(row["seq_len"])),
        layout=layout,
        jax=row["jax"],
        seconds=float(row["seconds"]),
        collectives=tuple(_collective(word, layout.mesh) for word in row["collectives"].split()),
        **{name: int(row[name]) for name in _NUMBERS},
    )


def keep(found: Iterable[Compiled], file: Path = FILE) -> None:
    """Writes what was compiled: layouts as `fsdp=64 remat=dots`, collectives as `all-gather/fsdp=COUNT*BYTES`."""
    with file.open("w", newline="") as lines:
        lines.write("# What the compilers say of whole training steps, for one device: python -m benchmarks.scaling\n")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*Case._fields, "layout", "jax", "seconds", *_NUMBERS, "collectives"])
        for one in found:
            exchanged = [f"{c.kind}/{'+'.join(c.axes)}={c.count}*{c.bytes}" for c in one.collectives]
            numbers = [getattr(one, name) for name in _NUMBERS]
            writer.writerow([*one.case, _settings(one.layout), one.jax, one.seconds, *numbers, " ".join(exchanged)])


def _settings(layout: Layout) -> str:
    """What is not as usual."""
    usual, mine = Layout(), dataclasses.asdict(layout)
    mine = {name: value for name, value in mine.items() if value != getattr(usual, name)}
    return " ".join(f"{name}={'+'.join(value) if name == 'offload' else value}" for name, value in mine.items())


def _setting(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    if name == "offload":
        return name, tuple(value.split("+"))
    return name, int(value) if value.isdigit() else {"True": True, "False": False}.get(value, value)


def _collective(word: str, mesh: Mapping[str, int]) -> Collective:
    (kind, axes), (count, size) = (part.split(by) for part, by in zip(word.split("="), "/*", strict=True))
    return collective(kind, tuple(filter(None, axes.split("+"))), int(count), int(size), mesh)


# --- Showing ----------------------------------------------------------------------------------------------------------


def tokens_per_device(one: Point) -> float:
    """Tokens per second that one device trains on, as the planner prices it."""
    return one.case.rows * one.case.seq_len / one.time.total


def efficiencies(curve: Sequence[Point]) -> list[float]:
    """Tokens per second and device, as a share of those on the smallest cluster."""
    return [tokens_per_device(one) / tokens_per_device(curve[0]) for one in curve]


def table(title: str, points: Sequence[Point], *, efficiency: bool) -> Table:
    """Compiled and planned side by side; of a curve also its efficiency, of different models their names."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("on" if efficiency else "model, on", "mesh"):
        result.add_column(heading, no_wrap=True)
    figures = ("GiB", "planned", "sent GiB", "planned", "compile", "computes", "step", "MFU")
    for heading in (*figures, "efficiency") if efficiency else figures:
        result.add_column(heading, justify="right", no_wrap=True)
    for one, share in zip(points, efficiencies(points), strict=True):
        case = one.case
        batch = f"{words.count(case.workload.global_batch)} x {words.count(case.seq_len)}"
        name = f"{case.cluster}\n{batch}" if efficiency else f"{case.model.split('/')[-1]}\n{case.cluster}\n{batch}"
        mesh = f"{words.mesh(one.layout)}\n{words.options(one.layout)}"
        result.add_row(name, mesh, *_figures(one), *([f"{share:.1%}"] if efficiency else []))
    return result


def _figures(one: Point) -> list[str]:
    case, compiled, time, (config, _) = one.case, one.compiled, one.time, model_config(one.case.model)
    held = memory(config, case.workload, one.layout, case.where.hardware).total
    sent = sum(each.sent for each in traffic.collectives(config, case.workload, one.layout))
    mine, exchanged, seconds, computes = "-", "-", "-", "-"
    if compiled:
        mine, seconds = f"{compiled.total / GiB:.1f}", f"{compiled.seconds:.0f} s"
        told = [(axes, size) for axes, size in compiled.sent.most_common() if size > GiB / 20]
        exchanged = "\n".join(f"{axes} {size / GiB:.1f}" for axes, size in told)
        computes = words.seconds(compiled.computing) if compiled.computing else "-"
    share = mfu(time, config, case.workload, case.where)
    planned = f"{held / GiB:.1f}", f"{sent / GiB:.1f}"
    return [mine, planned[0], exchanged, planned[1], seconds, computes, words.seconds(time.total), f"{share:.1%}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile only what has all of these in its model and its cluster")
    parser.add_argument("--again", action="store_true", help="compile what is in the file too")
    parser.add_argument("--stored", action="store_true", help="compile nothing")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves")
    given = parser.parse_args(arguments)
    console, found = Console(width=WIDTH), kept()
    asked = [case for case in CASES if all(word in f"{case.model} {case.cluster}" for word in given.words)]
    for case in () if given.stored else asked:
        if given.again or case not in found:
            try:
                found[case] = compile_case(case, console)
            except RuntimeError as error:  # of one case: the others are compiled all the same
                console.print(str(error), style="bold")
            keep(found[one] for one in CASES if one in found)
    console.print(table("Models", [point(case, found) for case in MODELS], efficiency=False))
    curves = {title: [point(case, found) for case in curve] for title, curve in CURVES.items()}
    for title, curve in curves.items():
        console.print(table(f"Llama-2-70B on {title}, one sequence a device", curve, efficiency=True))
    if given.svg:
        from benchmarks.scaling_plot import plot

        given.svg.write_text(plot(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
