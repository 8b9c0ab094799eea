"""What compressed gradients save on the wire, and what they cost in learning, beside uncompressed ones.

    python -m benchmarks.compression                  both
    python -m benchmarks.compression --steps 1000     a longer course
    python -m benchmarks.compression --steps 0        bytes alone
    python -m benchmarks.compression --no-bytes       learning alone
    python -m benchmarks.compression --h100           bytes of the program that XLA compiles for eight H100s too

Bytes are those that a device sends in one step, read from the compiled program. Where groups of neighbours sum
uncompressed first, it is those between the groups that count: `of uncompressed` is their share of what an uncompressed
step sends. They need no accelerator; --h100 needs the compilers (`python -m tbjax.planner.compilers`).

Learning is that of a small Llama (four layers of 64, 0.2 M parameters) on the help texts that come with Python, a
character a token, eight data-parallel devices, batches of 16 x 64, AdamW. The loss is the mean of the last twentieth of
the steps, beside the same steps uncompressed. `gained` is how far the loss has fallen, as a share of how far it falls
uncompressed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

DEVICES = 8
if __name__ == "__main__" and "--child" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tbjax.config import LayerKind, ModelConfig  # noqa: E402
from tbjax.mesh import make_mesh  # noqa: E402
from tbjax.model import Decoder  # noqa: E402
from tbjax.planner import hlo  # noqa: E402
from tbjax.sharding import Sharding  # noqa: E402
from tbjax.training import Batch, abstract_batch, abstract_state, data, init_state, make_step  # noqa: E402
from tbjax.training.compression import Compression, Int8, RandomK, TopK  # noqa: E402

ROWS, SEQUENCE = 16, 64
CHARACTERS = 96  # from the space to the tilde; whatever is not among them counts as one more
CONFIG = ModelConfig(
    family="llama",
    vocab_size=CHARACTERS,
    embed=64,
    mlp=160,
    heads=4,
    kv_heads=2,
    head_dim=16,
    layer_kinds=(LayerKind(),) * 4,
    max_positions=SEQUENCE,
)
OPTIMIZER = optax.adamw(3e-3)
COMPRESSIONS: tuple[Compression | None, ...] = (
    None,
    TopK(0.1),
    TopK(0.01),
    RandomK(0.1),
    Int8(),
    TopK(0.01, group=4),
    Int8(group=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--no-bytes", dest="bytes", action="store_false")
    parser.add_argument("--h100", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(sent_on_h100()))
        return
    if asked.bytes:
        on_wire("virtual CPU devices", [sent(kind, jax.devices()) for kind in COMPRESSIONS])
    if asked.h100:
        from tbjax.planner.compilers import environment

        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.compression", "--child"],
            env=environment("cuda", DEVICES),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        on_wire("H100, compiled", json.loads(process.stdout.splitlines()[-1]))
    if asked.steps:
        learning(asked.steps)


def sent_on_h100() -> list[list[Any]]:
    from tbjax.planner.compile import devices
    from tbjax.planner.hardware import cluster

    where = devices(cluster("h100:8"), "cuda")
    return [sent(kind, where) for kind in COMPRESSIONS]


def sent(compression: Compression | None, devices: Any) -> list[Any]:
    """Bytes that a device sends in a step by kind of collective, and how many of all go between groups."""
    sharding = Sharding(make_mesh((DEVICES, 1, 1), devices))
    options: Any = {"precision": "float32", "compression": compression}
    state = abstract_state(CONFIG, sharding, lambda _: OPTIMIZER, **options)
    step = make_step(OPTIMIZER, **options, remat="none")
    text = str(step.lower(state, abstract_batch(ROWS, SEQUENCE, sharding)).compile().as_text())
    group = 1 if compression is None else compression.group
    by_kind, between = {}, 0
    for collective in hlo.read(text, {"groups": DEVICES // group, "inside": group}).collectives:
        if collective.sent:
            by_kind[collective.kind] = by_kind.get(collective.kind, 0) + collective.sent
            between += collective.sent if "groups" in collective.axes else 0
    return [by_kind, between]


def on_wire(where: str, found: list[list[Any]]) -> None:
    table = Table("gradients", "bytes sent", "between groups", "of uncompressed", "by", title=f"dp={DEVICES}, {where}")
    whole = sum(found[0][0].values())
    for kind, (by_kind, between) in zip(COMPRESSIONS, found, strict=True):
        total, split = sum(by_kind.values()), ", ".join(f"{name} {size:,}" for name, size in by_kind.items())
        table.add_row(name_of(kind), f"{total:,}", f"{between:,}", f"{between / whole:.3f}", split)
    Console(width=140).print(table)


def learning(steps: int) -> None:
    """The course of every compression, one after the other, on the same batches."""
    table = Table("gradients", "loss", "beside uncompressed", "gained", title=f"{steps} steps")
    first, last = 0.0, 0.0
    for kind in COMPRESSIONS:
        if kind is not None and kind.group > 1:
            continue
        losses = course(kind, steps)
        loss = float(np.mean(losses[-max(1, steps // 20) :]))
        if kind is None:
            first, last = losses[0], loss
        table.add_row(name_of(kind), f"{loss:.4f}", f"{loss - last:+.4f}", f"{(first - loss) / (first - last):.3f}")
    Console(width=140).print(table)


def course(compression: Compression | None, steps: int) -> list[float]:
    sharding = Sharding(make_mesh((DEVICES, 1, 1)))
    options: Any = {"precision": "float32", "compression": compression}
    make = lambda: Decoder(CONFIG, sharding, dtype=jnp.float32, key=jax.random.key(0))  # noqa: E731
    where = jax.tree.map(lambda a: a.sharding, sharding.place(jax.eval_shape(make)))
    state = init_state(jax.jit(make, out_shardings=where)(), OPTIMIZER, **options)
    step, losses = make_step(OPTIMIZER, **options, remat="none"), []
    for _, batch in zip(range(steps), batches(), strict=False):
        state, metrics = step(state, batch)
        # Virtual devices share a few threads, which too many steps at once would block for one another.
        losses.append(float(metrics.loss))
    return losses


def batches() -> Iterator[Batch]:
    """Pieces of the text, drawn anew for each batch, the same in every course."""
    letters = np.frombuffer("".join(data.python_topics()).encode(), np.uint8).astype(np.int32)
    tokens = np.clip(letters - 32, 0, CHARACTERS - 1)
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(tokens) - SEQUENCE - 1, ROWS)
        rows = tokens[starts[:, None] + np.arange(SEQUENCE + 1)]
        yield Batch(rows[:, :-1], rows[:, 1:])


def name_of(compression: Compression | None) -> str:
    return "uncompressed" if compression is None else str(compression)


if __name__ == "__main__":
    main()
