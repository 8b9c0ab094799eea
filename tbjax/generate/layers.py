"""The weights of each layer as arrays of their own, for the CPU.

A scan takes a layer's weights out of the stack of all. Accelerators' compilers read them where they lie; XLA for the
CPU copies them out, on one thread, before a matrix product may begin, which in decoding takes several times as long as
the product. So there the programs of generation get each layer in arrays of its own. They are no copies: each is a view
of the memory of the stack's part on its device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.model import Block, Decoder

# Of small layers the copies take no time that anyone would notice, and a scan compiles sooner.
NOTABLE_BYTES = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Singles:
    """Each layer's arrays. They are hundreds, which only a plain list hands to a program within a millisecond."""

    arrays: list[jax.Array]
    # Of each group how often it repeats, and the form of each block of its pattern.
    groups: tuple[tuple[int, tuple[Any, ...]], ...] = dataclasses.field(metadata={"static": True})

    def blocks(self) -> list[list[list[Block]]]:
        """Of each group the repeats, of each repeat the blocks of its pattern."""
        arrays = iter(self.arrays)
        return [
            [[form.unflatten([next(arrays) for _ in range(form.num_leaves)]) for form in forms] for _ in range(repeats)]
            for repeats, forms in self.groups
        ]


def singles(model: Decoder) -> Singles | None:
    """Each layer's arrays, or None where programs are better off with the stacks."""
    if model.mesh.devices.flat[0].platform != "cpu" or model.sharding.size("pp") > 1 or not model.scan:
        return None
    if not all(_bytes_of_one(stack) >= NOTABLE_BYTES for stack in model.stacks):
        return None
    arrays, groups = [], []
    for group, stack in zip(model.config.groups, model.stacks, strict=True):
        of_repeats = zip(*_views(jax.tree.leaves(list(stack))), strict=True)
        arrays += [a for of_repeat in of_repeats for a in of_repeat]
        groups.append((group.repeats, tuple(jax.tree.structure(block) for block in stack)))
    return Singles(arrays, tuple(groups))


def _bytes_of_one(stack: Any) -> float:
    arrays = jax.tree.leaves(list(stack))
    return sum(a.nbytes for a in arrays) / arrays[0].shape[0]


def _views(stacks: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Of each stack the rows. What is not aligned as XLA wants it (norms of odd sizes) is copied."""
    parts = [{shard.device: np.asarray(shard.data) for shard in stack.addressable_shards} for stack in stacks]
    # All rows of a device at once: there are hundreds of them, and asking for each takes as long as to make it.
    placed = [
        iter(jax.device_put([row for on_device in parts for row in on_device[device]], device)) for device in parts[0]
    ]
    views: list[list[jax.Array]] = []
    for stack in stacks:
        repeats, *shape = stack.shape
        own = _of_one(stack)
        views.append([
            jax.make_array_from_single_device_arrays(tuple(shape), own, [next(rows) for rows in placed])
            for _ in range(repeats)
        ])  # fmt: skip
    return views


def _of_one(stack: jax.Array) -> jax.sharding.Sharding:
    """How one row of a stack is sharded."""
    sharding = stack.sharding
    return (
        NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        if isinstance(sharding, NamedSharding)
        else sharding
    )
