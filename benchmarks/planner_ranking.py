"""Whether the planner orders meshes by memory as the compilers do.

    python -m benchmarks.planner_ranking            six scenarios, every mesh that fits compiled: some minutes
    python -m benchmarks.planner_ranking "serving"  those whose title has the word

In each scenario everything but the mesh is fixed, and every legal mesh that the planner takes to fit is compiled by the
target's own compiler. Printed are both figures for each mesh, in the compiler's order; how many pairs of meshes stand
the other way round in the planner's (pairs that the compiler itself tells apart by less than 2 % are no order); and
whether the mesh of least memory is the same.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from interop.families import Fields, family
from tbjax.config import ModelConfig
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.legal import Space
from tbjax.planner.memory import memory
from tbjax.planner.models import describe
from tbjax.planner.verify import verify
from tbjax.planner.words import mesh as spelled
from tbjax.planner.workload import Layout, Workload

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


class Compared(NamedTuple):
    """One mesh: bytes on each device as predicted and as compiled."""

    layout: Layout
    predicted: int
    compiled: int


def compare(scenario: Scenario, console: Console) -> list[Compared]:
    """Every mesh that the planner takes to fit, compiled."""
    config, workload, where = _inputs(scenario)
    space = Space(config, workload, where, {**FIXED, "remat": scenario.remat})
    layouts = [layout for mesh in space.meshes()[0] for layout in space.layouts(mesh)]
    fitting = [
        layout for layout in layouts if memory(config, workload, layout, where.hardware).total <= where.hardware.usable
    ]
    found = []
    for layout in track(fitting, scenario.title, console=console, transient=True):
        compiled = verify(config, workload, layout, where).compiled.total
        found.append(Compared(layout, memory(config, workload, layout, where.hardware).total, compiled))
    return sorted(found, key=lambda one: one.compiled)


def turned(found: Sequence[Compared]) -> tuple[int, int]:
    """How many pairs the planner orders otherwise than the compiler, of how many that the compiler orders."""
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if b.compiled - a.compiled > LEVEL * b.compiled]
    return sum(a.predicted >= b.predicted for a, b in pairs), len(pairs)


def table(scenario: Scenario, found: Sequence[Compared]) -> Table:
    result = Table(
        "mesh",
        "predicted MiB",
        "compiled MiB",
        "error",
        title=f"{scenario.title}: {scenario.model} on {scenario.cluster}",
    )
    for one in found:
        error = one.predicted / one.compiled - 1
        result.add_row(spelled(one.layout), str(one.predicted // MIB), str(one.compiled // MIB), f"{error:+.1%}")
    return result


def _inputs(scenario: Scenario) -> tuple[ModelConfig, Workload, Cluster]:
    described = describe(scenario.model)
    config = family(described["model_type"]).config(Fields(described, scenario.model))
    return config, Workload(**scenario.workload), cluster(scenario.cluster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only scenarios whose title has it")
    arguments = parser.parse_args()
    console = Console(width=100)
    for scenario in SCENARIOS:
        if arguments.word not in scenario.title:
            continue
        found = compare(scenario, console)
        console.print(table(scenario, found))
        wrong, pairs = turned(found)
        least = min(found, key=lambda one: one.predicted) == found[0]
        console.print(
            f"{wrong} of {pairs} pairs the other way round; least memory {'the same' if least else 'another'}\n"
        )


if __name__ == "__main__":
    main()
