"""The weights of each layer as arrays of their own, for the CPU.

A scan takes a layer's weights out of the stack of all. Accelerators' compilers read them where they lie; XLA for the
CPU copies them out, on one thread, before a matrix product may begin, which in decoding takes several times as long as
the product. So there the programs of generation get each layer in arrays of its own. They are no copies: each is a view
of the memory of the stack's part on its device.
"""

from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.model import Block, Decoder

Singles: TypeAlias = list[list[list[Block]]]  # of each group the repeats, of each repeat the blocks of its pattern

# Of small layers the copies take no time that anyone would notice, and a scan compiles sooner.
NOTABLE_BYTES = 2**20


def singles(model: Decoder) -> Singles | None:
    """Each layer's blocks, or None where programs are better off with the stacks."""
    if model.mesh.devices.flat[0].platform != "cpu" or model.sharding.size("pp") > 1 or not model.scan:
        return None
    if not all(_bytes_of_one(stack) >= NOTABLE_BYTES for stack in model.stacks):
        return None
    rows = []
    for group, stack in zip(model.config.groups, model.stacks, strict=True):
        flat = [(jax.tree.structure(block), [_views(a) for a in jax.tree.leaves(block)]) for block in stack]
        rows.append([
            [jax.tree.unflatten(form, [views[repeat] for views in arrays]) for form, arrays in flat]
            for repeat in range(group.repeats)
        ])  # fmt: skip
    return rows


def _bytes_of_one(stack: Any) -> float:
    arrays = jax.tree.leaves(list(stack))
    return sum(a.nbytes for a in arrays) / arrays[0].shape[0]


def _views(stack: jax.Array) -> list[jax.Array]:
    """The rows of a stack. What is not aligned as XLA wants it (norms of odd sizes) is copied."""
    sharding = stack.sharding
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    own = NamedSharding(sharding.mesh, PartitionSpec(*spec[1:])) if isinstance(sharding, NamedSharding) else sharding
    # All rows of a device at once: there are hundreds of them, and asking for each takes as long as to make it.
    parts = [jax.device_put(list(np.asarray(shard.data)), shard.device) for shard in stack.addressable_shards]
    return [
        jax.make_array_from_single_device_arrays(stack.shape[1:], own, list(row)) for row in zip(*parts, strict=True)
    ]
