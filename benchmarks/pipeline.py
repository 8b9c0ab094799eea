"""What pipelines take: memory as the vendors' compilers count it, and time beside the same work without a pipeline.

    python -m benchmarks.pipeline                       memory for 64 H100 and 64 TPU v5p (minutes a row), then time
    python -m benchmarks.pipeline --clusters h100:8x8   memory for some clusters; --clusters none: for none
    python -m benchmarks.pipeline --no-time

Memory is of a whole step of training in the shape of Llama 2 70B over 8 stages and 8 ways of tp, one sequence of 4096
a microbatch. It needs the compilers (`python -m tbjax.planner.compilers`) and no accelerator. Between the stages there
may be nothing but permutes, and one sum of the ends' gradients after the loop: anything else is an error.

Time is of a small model on virtual CPU devices, which share the machine's cores: a pipeline cannot be faster here, and
what it takes beyond the same work without one is what the executor adds. Ticks are those of the grid, beside those of
the simulator.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

DEVICES = 8
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tbjax.config import LayerKind, ModelConfig  # noqa: E402
from tbjax.mesh import make_mesh  # noqa: E402
from tbjax.model import Decoder  # noqa: E402
from tbjax.pipeline.grid import lay_out  # noqa: E402
from tbjax.pipeline.schedule import Kind, named  # noqa: E402
from tbjax.pipeline.simulate import Times, simulate  # noqa: E402
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
ROWS: tuple[tuple[Any, int], ...] = (
    ("gpipe", 16), ("gpipe", 32), ("1f1b", 16), ("1f1b", 32), ("1f1b", 64), ("interleaved", 32), ("zb-h1", 32),
)  # fmt: skip

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
REPEATS = 5


def memory(console: Console, cluster: str) -> None:
    """Prints what each schedule takes on `cluster`."""
    table = Table(title=f"Llama 2 70B, pp=8 x tp=8 on {cluster}: GiB per device", title_justify="left")
    for heading in ("schedule", "m", "arguments", "temp", "compile s"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    temps = {}
    for schedule, microbatches in ROWS:
        chunks = 2 if schedule == "interleaved" else 1
        layout = Layout(pp=8, tp=8, microbatches=microbatches, schedule=schedule, chunks=chunks)
        work = Workload(global_batch=microbatches, seq_len=4096)
        found = verify(LLAMA_2_70B, work, layout, cluster, timeout=1800)
        check_transfers(found)
        held = found.compiled.bytes
        temps[schedule, microbatches] = held["temp"]
        table.add_row(
            schedule,
            str(microbatches),
            f"{held['argument'] / GIB:.2f}",
            f"{held['temp'] / GIB:.2f}",
            f"{found.compile_seconds:.0f}",
        )
    console.print(table)
    console.print(f"1F1B / GPipe at m=32: {temps['1f1b', 32] / temps['gpipe', 32]:.2f}")
    console.print(f"1F1B at m=64 / at m=16: {temps['1f1b', 64] / temps['1f1b', 16]:.3f}\n")


def check_transfers(found: Verification) -> None:
    """Raises unless stages exchange activations and gradients by permutes alone."""
    wrong = [c for c in found.collectives if "pp" in c.axes and c.kind not in ("collective-permute", "all-reduce")]
    # Sums over the stages are of the ends' gradients and the norm's square, once in a step.
    wrong += [c for c in found.collectives if "pp" in c.axes and c.kind == "all-reduce" and c.count > 8]
    if wrong:
        raise RuntimeError(f"between stages there are collectives that have no place there: {wrong}")


def timing(console: Console) -> None:
    """Prints what each schedule takes on virtual CPU devices, and the same work without a pipeline."""
    sharding = Sharding(make_mesh({"pp": STAGES}, jax.devices()[:STAGES]))
    alone = Sharding(make_mesh({"dp": 1}, jax.devices()[:1]))
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (MICROBATCHES, SEQUENCE + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    table = Table(title=f"{STAGES} stages, {MICROBATCHES} microbatches on one CPU", title_justify="left")
    for heading in ("schedule", "ticks", "simulated", "s", "beside none"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    contenders: dict[str, Callable[[], Any]] = {"none": runner(alone, batch, None)}
    contenders |= {name: runner(sharding, batch, name) for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")}
    seconds = measured(contenders)
    for name, taken in seconds.items():
        ticks = simulated = ""
        if name != "none":
            schedule = named(name)
            grid = lay_out(schedule, STAGES, MICROBATCHES, saves=True)
            half = schedule.chunks * (1 if Kind.BACKWARD_WEIGHT in grid.kinds else 0.5)
            times = Times(forward=schedule.chunks, backward_input=half, backward_weight=half)
            ticks, simulated = str(grid.ticks), f"{simulate(schedule, STAGES, MICROBATCHES, times).makespan:g}"
        table.add_row(name, ticks, simulated, f"{taken:.2f}", f"{taken / seconds['none']:.2f}")
    console.print(table)


def runner(sharding: Sharding, batch: Batch, schedule: str | None) -> Callable[[], Any]:
    """A function that computes the gradients of one step and waits for them."""
    make = lambda: Decoder(SMALL, sharding, key=jax.random.key(0))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    model = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()
    run = jax.jit(
        lambda model, batch: gradients_of(
            model,
            batch,
            dtype=jnp.float32,
            remat="full",
            microbatches=MICROBATCHES,
            schedule=None if schedule is None else named(schedule),
        )
    )
    return lambda: jax.block_until_ready(run(model, batch))


def measured(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, in turn so that the machine's moods meet all alike; the first two calls do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What pipelines take, in memory and time.")
    parser.add_argument("--clusters", nargs="+", default=["h100:8x8", "v5p:4x4x4"], help="clusters of 64, or none")
    parser.add_argument("--no-time", action="store_true")
    arguments = parser.parse_args()
    console = Console()
    for cluster in arguments.clusters:
        if cluster != "none":
            memory(console, cluster)
    if not arguments.no_time:
        timing(console)


if __name__ == "__main__":
    main()
