"""The gradients of each dp device's own rows, unsummed: what there is to compress (`tbjax.training.compression`).

A `shard_map` over dp, whose other axes stay the compiler's: within it a model runs as on a mesh that has no dp, and
fsdp, tp and the rest sum among themselves as ever. The loss is that of the whole batch, as everybody divides by the
number of its targets. The routers' auxiliary loss is the exception: it balances the load within a device's rows, as it
does within a microbatch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from tbjax.model import Decoder
from tbjax.sharding import Sharding
from tbjax.training.compression import AXIS
from tbjax.training.gradients import check_rows, gradients_of, with_sharding
from tbjax.training.optimizer import Parameters
from tbjax.training.state import Batch


class PerDevice(NamedTuple):
    """What each device along dp has found."""

    loss: jax.Array  # of the whole batch
    gradients: Parameters  # [dp, ...] by path
    targets: jax.Array  # in the whole batch


def gradients_per_device(model: Decoder, batch: Batch, *, microbatches: int, **options: Any) -> PerDevice:
    """As `gradients_of`, with the same options, but that gradients are those of the rows of each device along dp."""
    sharding = model.sharding
    check_rows(batch, sharding, microbatches)
    targets = jnp.sum(batch.targets >= 0)

    def on_device(model: Decoder, batch: Batch, targets: jax.Array, scale: jax.Array | None) -> Any:
        options_here = {**options, "microbatches": microbatches, "targets": targets, "scale": scale}
        loss, gradients, _ = gradients_of(with_sharding(model, _without_dp(sharding)), batch, **options_here)
        return jax.lax.psum(loss, AXIS), jax.tree.map(lambda a: a[None], gradients)

    shard_map: Any = jax.shard_map
    scale = options.pop("scale", None)
    loss, gradients = shard_map(
        on_device,
        mesh=sharding.mesh,
        axis_names={AXIS},
        in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        check_vma=False,
    )(model, batch, targets, scale)
    return PerDevice(loss, gradients, targets)


def _without_dp(sharding: Sharding) -> Sharding:
    """How a model lies among the devices that share one place along dp."""
    sizes = {axis: 1 if axis == AXIS else size for axis, size in sharding.mesh.shape.items()}
    return dataclasses.replace(sharding, mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)))
