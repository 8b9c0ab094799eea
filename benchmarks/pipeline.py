"""What pipelines take: memory as the vendors' compilers count it, and time beside the same work without a pipeline.

    python -m benchmarks.pipeline                       memory for 64 H100 and 64 TPU v5p (minutes a row), then time
    python -m benchmarks.pipeline --clusters h100:8x8   memory for some clusters; --clusters none: for none
    python -m benchmarks.pipeline --schedules zb-h1 --microbatches 32    1F1B and ZB-H1, for one number of microbatches
    python -m benchmarks.pipeline --no-time

Memory is of a whole step of training in the shape of Llama 2 70B over 8 stages and 8 ways of tp, one sequence of 4096
a microbatch, layers run again in the backward pass. It needs the compilers (`python -m tbjax.planner.compilers`) and no
accelerator. `simulated` is what the simulator says that a stage holds at its peak, in bytes, on top of what 1F1B's
program takes beside its activations. Between the stages there may be nothing but permutes, and one sum of the ends'
gradients after the loop: anything else is an error.

Time is of a small model on virtual CPU devices, which share the machine's cores: a pipeline cannot be faster here, and
what its processors' time is beyond that of the same work without one is what the executor adds. Contenders are the step
without a pipeline, and GPipe as a scan that JAX differentiates (`benchmarks.plain_gpipe`). Ticks are those of the grid,
beside those of the simulator.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

DEVICES = 8
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks import plain_gpipe  # noqa: E402
from tbjax.config import LayerKind, ModelConfig  # noqa: E402
from tbjax.mesh import make_mesh  # noqa: E402
from tbjax.model import Decoder  # noqa: E402
from tbjax.pipeline.graph import holding  # noqa: E402
from tbjax.pipeline.grid import lay_out  # noqa: E402
from tbjax.pipeline.schedule import Kind, Schedule, named  # noqa: E402
from tbjax.pipeline.simulate import Times, simulate  # noqa: E402
from tbjax.pipeline.stages import cut_for  # noqa: E402
from tbjax.planner.verify import Verification, verify  # noqa: E402
from tbjax.planner.workload import Layout, Workload  # noqa: E402
from tbjax.sharding import Sharding  # noqa: E402
from tbjax.training import Batch  # noqa: E402
from tbjax.training.step import gradients_of  # noqa: E402

GIB = 2**30
LLAMA_2_70B = ModelConfig(
    family="llama",
    vocab_size=32000,
    embed=8192,
    mlp=28672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    layer_kinds=(LayerKind(),) * 80,
    max_positions=4096,
)
STAGES_70B = TP_70B = 8
SEQUENCE_70B = 4096
# Beside 1F1B: what its program takes beside its activations is what the others' figures are put on.
SCHEDULES: tuple[Any, ...] = ("gpipe", "interleaved", "zb-h1", "zb-h2", "zb-v")

SMALL = ModelConfig(
    family="llama",
    vocab_size=512,
    embed=256,
    mlp=512,
    heads=8,
    kv_heads=4,
    head_dim=32,
    layer_kinds=(LayerKind(),) * 8,
    max_positions=256,
)
STAGES, MICROBATCHES, SEQUENCE = 4, 8, 128
REPEATS = 9


def memory(console: Console, cluster: str, schedules: Sequence[Any], counts: Sequence[int]) -> None:
    """Prints what each schedule takes on `cluster`."""
    table = Table(title=f"Llama 2 70B, pp=8 x tp=8 on {cluster}: GiB per device", title_justify="left")
    for heading in ("schedule", "m", "arguments", "temp", "simulated", "temp / simulated", "compile s"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    temps: dict[tuple[str, int], float] = {}
    base = 0.0
    for name, microbatches in itertools.product(schedules, counts):
        chunks = 2 if name == "interleaved" else 1
        layout = Layout(pp=STAGES_70B, tp=TP_70B, microbatches=microbatches, schedule=name, chunks=chunks)
        work = Workload(global_batch=microbatches, seq_len=SEQUENCE_70B)
        found = verify(LLAMA_2_70B, work, layout, cluster, timeout=1800)
        check_transfers(found)
        temp = temps[name, microbatches] = found.compiled.bytes["temp"]
        held = activations(named(name, chunks), microbatches)
        base = base or temp - held
        cells = found.compiled.bytes["argument"] / GIB, temp / GIB, (base + held) / GIB, temp / (base + held)
        table.add_row(name, str(microbatches), *(f"{cell:.2f}" for cell in cells), f"{found.compile_seconds:.0f}")
        console.print(name, microbatches, *(f"{cell:.2f}" for cell in cells), style="dim")
    console.print(table)
    for count in counts if "gpipe" in schedules else ():
        console.print(f"1F1B / GPipe at m={count}: {temps['1f1b', count] / temps['gpipe', count]:.2f}")
    for name in schedules if len(counts) > 1 else ():
        console.print(f"{name}: m={counts[-1]} / m={counts[0]}: {temps[name, counts[-1]] / temps[name, counts[0]]:.3f}")


def activations(schedule: Schedule, microbatches: int) -> float:
    """Bytes that a stage's device holds at most for backwards and weight gradients to come, as the simulator has it."""
    config, layers = LLAMA_2_70B, LLAMA_2_70B.layers / STAGES_70B
    # From forward to backward every layer's input, which tp does not cut.
    token = 2 * layers
    kept = token * config.embed
    # From input gradient to weight gradient, of every matmul its input and the gradient of its output, of which tp cuts
    # those that are as wide as heads or the MLP are.
    whole = 4 * config.embed  # inputs of query, key and value and of gate and up; gradients of both blocks' outputs
    cut = 2 * config.heads * config.head_dim + 2 * config.kv_heads * config.head_dim + 3 * config.mlp
    pairs = token * (whole + cut / TP_70B)
    orders = schedule.tasks(STAGES_70B, microbatches)
    peak = max(max(holding(order, pairs / kept)) for order in orders) / schedule.chunks
    return SEQUENCE_70B * kept * peak


def check_transfers(found: Verification) -> None:
    """Raises unless stages exchange activations and gradients by permutes alone."""
    wrong = [c for c in found.collectives if "pp" in c.axes and c.kind not in ("collective-permute", "all-reduce")]
    # Sums over the stages are of the ends' gradients and the norm's square, once in a step.
    wrong += [c for c in found.collectives if "pp" in c.axes and c.kind == "all-reduce" and c.count > 8]
    if wrong:
        raise RuntimeError(f"between stages there are collectives that have no place there: {wrong}")


def timing(console: Console) -> None:
    """Prints what each schedule takes on virtual CPU devices, beside the same work in a plain pipeline and in none."""
    sharding = Sharding(make_mesh({"pp": STAGES}, jax.devices()[:STAGES]))
    alone = Sharding(make_mesh({"dp": 1}, jax.devices()[:1]))
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (MICROBATCHES, SEQUENCE + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    contenders = {"none": runner(alone, batch, None), "plain": runner(sharding, batch, "plain")}
    contenders |= {name: runner(sharding, batch, name) for name in ("1f1b", *SCHEDULES)}
    losses = {name: float(run()[0]) for name, run in contenders.items()}
    if not np.allclose([*losses.values()], losses["none"], rtol=1e-5):
        raise RuntimeError(f"these are not the same work: {losses}")
    seconds = measured(contenders)
    table = Table(title=f"{STAGES} stages, {MICROBATCHES} microbatches on one CPU", title_justify="left")
    headings = "schedule", "ticks", "simulated", "tasks", "simulated", "s", "processor s", "beside none", "beside plain"
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for name, (taken, worked) in seconds.items():
        figures = [""] * 4 if name in ("none", "plain") else map(str, ticks(named(name)))
        beside = (f"{worked / seconds[other][1]:.2f}" for other in ("none", "plain"))
        table.add_row(name, *figures, f"{taken:.3f}", f"{worked:.3f}", *beside)
    console.print(table)


def ticks(schedule: Schedule) -> tuple[int, int, int, int]:
    """Ticks of the grid and of the simulator, tasks of the grid and of the simulator."""
    grid = lay_out(schedule, STAGES, MICROBATCHES, saves=True)
    half = schedule.chunks * (1 if Kind.BACKWARD_WEIGHT in grid.kinds else 0.5)
    times = Times(forward=schedule.chunks, backward_input=half, backward_weight=half)
    timeline = simulate(schedule, STAGES, MICROBATCHES, times)
    return grid.ticks, round(timeline.makespan), grid.tasks, sum(map(len, timeline.tasks))


def runner(sharding: Sharding, batch: Batch, name: str | None) -> Callable[[], Any]:
    """A function that computes the loss and gradients of one step and waits for them."""
    schedule = None if name in (None, "plain") else named(name)
    sharding = dataclasses.replace(sharding, cut=cut_for(SMALL, schedule, sharding.size("pp")))
    make = lambda: Decoder(SMALL, sharding, key=jax.random.key(0))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    model = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()
    how = {"dtype": jnp.float32, "remat": "full", "microbatches": MICROBATCHES, "schedule": schedule}
    run = jax.jit(
        (lambda model, batch: plain_gpipe.loss_and_gradients(model, batch, MICROBATCHES))
        if name == "plain"
        else (lambda model, batch: gradients_of(model, batch, **how))
    )
    return lambda: jax.block_until_ready(run(model, batch))


def measured(contenders: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median seconds of each, by the clock and of the processor, in turn so that the machine's moods meet all alike.

    The first two calls do not count.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 2):
        for name, run in contenders.items():
            start = time.perf_counter(), time.process_time()
            run()
            if turn >= 2:
                taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: tuple(map(statistics.median, zip(*all_, strict=True))) for name, all_ in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What pipelines take, in memory and time.")
    parser.add_argument("--clusters", nargs="+", default=["h100:8x8", "v5p:4x4x4"], help="clusters of 64, or none")
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, default=SCHEDULES, help="beside 1f1b")
    parser.add_argument("--microbatches", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--no-time", action="store_true")
    arguments = parser.parse_args()
    console = Console()
    for cluster in arguments.clusters:
        if cluster != "none":
            memory(console, cluster, ("1f1b", *arguments.schedules), arguments.microbatches)
    if not arguments.no_time:
        timing(console)


if __name__ == "__main__":
    main()
