"""Whether the planner orders meshes by memory as the compilers do.

    python -m benchmarks.planner_ranking                        the figures in tests/data/compiled_ranking.csv
    python -m benchmarks.planner_ranking --compile              compiles what is missing there: some minutes
    python -m benchmarks.planner_ranking --compile "serving"    compiles again what has the word in its title

In each scenario everything but the mesh is fixed, and every legal mesh that the planner takes to fit is compiled by the
target's own compiler. Printed are both figures for each mesh, in the compiler's order; how many pairs of meshes stand
the other way round in the planner's (pairs that the compiler itself tells apart by less than 2 % are no order);
Kendall's tau over all pairs; and whether the mesh of least memory is the same.
"""

import argparse
import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from interop.families import Fields, family
from tbjax.config import ModelConfig
from tbjax.mesh import AXES
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.legal import Space
from tbjax.planner.memory import memory
from tbjax.planner.models import describe
from tbjax.planner.verify import verify
from tbjax.planner.words import mesh as spelled
from tbjax.planner.workload import Layout, Workload

FILE = Path(__file__).parent.parent / "tests" / "data" / "compiled_ranking.csv"
MIB = 1 << 20

# Meshes nearer to each other than this, by the compiler's own count, are level.
LEVEL = 0.02

# Only what the executable meshes have, and one way to use each: the mesh alone differs.
FIXED: Mapping[str, Any] = {
    "pp": 1, "cp": 1, "microbatches": 1, "sequence_parallel": False, "strategy": "FULL_SHARD", "offload": (),
}  # fmt: skip


class Scenario(NamedTuple):
    """What is planned, all but the mesh."""

    title: str
    model: str
    cluster: str
    workload: Mapping[str, Any]
    remat: str = "full"

    def inputs(self) -> tuple[ModelConfig, Workload, Cluster]:
        described = describe(self.model)
        config = family(described["model_type"]).config(Fields(described, self.model))
        return config, Workload(**self.workload), cluster(self.cluster)


TRAIN = {"global_batch": 16, "seq_len": 1024}
SERVE = {"task": "inference", "global_batch": 16, "seq_len": 1024, "new_tokens": 128}
SCENARIOS = (
    Scenario("training a dense model", "llama-3.2-1b", "h100:8", TRAIN),
    Scenario("training with products kept", "smollm2-360m", "h100:8", TRAIN, "dots"),
    Scenario("training on two hosts", "llama-2-7b", "h100:2x8", TRAIN),
    Scenario("training a mixture of experts", "mixtral-8x7b", "h200:8", TRAIN),
    Scenario("serving a dense model", "llama-3.1-8b", "h100:8", SERVE),
    Scenario("serving one key-value head", "falcon-7b", "a100-80:4", SERVE),
)

# Bytes on each device, by the title of a scenario and the sizes of a mesh in the order of AXES.
Kept = dict[tuple[str, tuple[int, ...]], int]


class Compared(NamedTuple):
    """One mesh: bytes on each device as predicted and as compiled."""

    layout: Layout
    predicted: int
    compiled: int


def fitting(scenario: Scenario) -> dict[Layout, int]:
    """Every mesh that the planner takes to fit, with what it says that a device holds."""
    config, workload, where = scenario.inputs()
    space = Space(config, workload, where, {**FIXED, "remat": scenario.remat})
    layouts = [layout for mesh in space.meshes()[0] for layout in space.layouts(mesh)]
    held = {layout: memory(config, workload, layout, where.hardware).total for layout in layouts}
    return {layout: size for layout, size in held.items() if size <= where.hardware.usable}


def compared(scenario: Scenario, kept: Kept) -> list[Compared]:
    """Those that have been compiled, in the compiler's order."""
    found = [
        Compared(layout, size, kept[scenario.title, _sizes(layout)])
        for layout, size in fitting(scenario).items()
        if (scenario.title, _sizes(layout)) in kept
    ]
    return sorted(found, key=lambda one: one.compiled)


def compile_meshes(scenario: Scenario, kept: Kept, console: Console, *, again: bool) -> None:
    """Compiles what is missing in `kept`, or all."""
    config, workload, where = scenario.inputs()
    for layout in track(fitting(scenario), scenario.title, console=console, transient=True):
        key = scenario.title, _sizes(layout)
        if again or key not in kept:
            kept[key] = verify(config, workload, layout, where).compiled.total
            write(kept)


def turned(found: Sequence[Compared]) -> tuple[int, int]:
    """How many pairs the planner orders otherwise than the compiler, of how many that the compiler orders."""
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if b.compiled - a.compiled > LEVEL * b.compiled]
    return sum(a.predicted >= b.predicted for a, b in pairs), len(pairs)


def tau(found: Sequence[Compared]) -> float:
    """Kendall's rank correlation over all pairs that neither side takes to be equal: 1 for the same order."""
    pairs = list(itertools.combinations(found, 2))
    signs = [(a.predicted - b.predicted) * (a.compiled - b.compiled) for a, b in pairs]
    agree, turned = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    return (agree - turned) / (agree + turned)


def read(file: Path = FILE) -> Kept:
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {(row["scenario"], tuple(int(row[axis]) for axis in AXES)): int(row["bytes"]) for row in rows}


def write(kept: Kept, file: Path = FILE) -> None:
    with file.open("w", newline="") as lines:
        lines.write("# Bytes on each device, as the compilers say: python -m benchmarks.planner_ranking --compile\n")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["scenario", *AXES, "bytes"])
        for scenario in SCENARIOS:
            own = sorted((sizes, size) for (title, sizes), size in kept.items() if title == scenario.title)
            writer.writerows([scenario.title, *sizes, size] for sizes, size in own)


def table(scenario: Scenario, found: Sequence[Compared]) -> Table:
    result = Table(title=f"{scenario.title}: {scenario.model} on {scenario.cluster}", title_justify="left")
    for heading in ("mesh", "predicted MiB", "compiled MiB", "error"):
        result.add_column(heading, justify="left" if heading == "mesh" else "right")
    for one in found:
        error = one.predicted / one.compiled - 1
        result.add_row(spelled(one.layout), f"{one.predicted // MIB:,}", f"{one.compiled // MIB:,}", f"{error:+.1%}")
    return result


def _sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(layout.mesh.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compile", nargs="?", const="", metavar="WORD", help="compile what is missing, or all of these"
    )
    given = parser.parse_args(arguments)
    console, kept = Console(width=100), read()
    for scenario in SCENARIOS:
        if given.compile is not None and given.compile in scenario.title:
            compile_meshes(scenario, kept, console, again=bool(given.compile))
        found = compared(scenario, kept)
        if len(found) < 2:
            console.print(f"{scenario.title}: not compiled yet\n")
            continue
        console.print(table(scenario, found))
        wrong, pairs = turned(found)
        least = min(found, key=lambda one: one.predicted).layout == found[0].layout
        console.print(
            f"{wrong} of {pairs} pairs the other way round; Kendall's tau {tau(found):.3f}; least memory on "
            f"{'the same mesh' if least else 'another mesh'}\n",
            highlight=False,
        )


if __name__ == "__main__":
    main()
