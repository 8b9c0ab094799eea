"""The key-value cache: for each layer the keys and values of the tokens so far, cut like the attention that reads them.

The layers of a pattern that repeats are stacked, or, where a program has the weights of each layer in arrays of their
own, so have they their caches. Layers with a window keep rings, see `tbjax.layers.ring`.

B batch, T capacity in tokens, K key-value heads as `HeadLayout` lays them out, N head dimension, R repeats of a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbjax.config import LayerKind, ModelConfig
from tbjax.layers.attention import HeadLayout
from tbjax.layers.ring import LayerCache, room
from tbjax.sharding import Sharding

DIMS = (None, "batch", "kv_heads", None, None)


class KVCache(NamedTuple):
    """`layers[group][position]` is of all repeats a `LayerCache` of stacks [R, B, K, T, N], or a list of single ones.

    T is the capacity, or that of a ring.
    """

    layers: list[list[Any]]
    valid: jax.Array  # [B, T] bool: a real token stands there
    length: jax.Array  # slots used so far, by every row alike (shorter rows are padded on the left)


def make_cache(
    config: ModelConfig,
    sharding: Sharding,
    batch: int,
    capacity: int,
    dtype: Any,
    *,
    chunk: int | None = None,
    stacked: bool = True,
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens, of which `chunk` (default: all) come at once."""
    heads = HeadLayout.fit(config.heads, config.kv_heads, sharding.size("tp")).total

    def empty(kind: LayerKind, *repeats: int) -> LayerCache:
        size = room(kind.window, capacity, chunk or capacity)
        a = jnp.zeros((*repeats, batch, heads, size, config.head_dim), dtype)
        a = sharding.constrain(a, *DIMS[-a.ndim :])
        return LayerCache(a, a)

    def of(repeats: int, kind: LayerKind) -> Any:
        return empty(kind, repeats) if stacked else [empty(kind) for _ in range(repeats)]

    layers = [[of(group.repeats, kind) for kind in group.pattern] for group in config.groups]
    return KVCache(layers, jnp.zeros((batch, capacity), bool), jnp.int32(0))


def grown(config: ModelConfig, sharding: Sharding, cache: KVCache, capacity: int) -> KVCache:
    """A cache that is full, with room for more tokens, which come one at a time."""
    length = cache.valid.shape[1]

    def moved(kind: LayerKind, a: jax.Array) -> jax.Array:
        size, axis = room(kind.window, capacity, 1), a.ndim - 2
        if size >= length:
            a = jnp.pad(a, [(0, size - length if i == axis else 0) for i in range(a.ndim)])
        else:  # a ring of the last tokens: slot s at place s % size
            a = jnp.roll(jax.lax.slice_in_dim(a, length - size, length, axis=axis), length % size, axis=axis)
        return sharding.constrain(a, *DIMS[-a.ndim :])

    layers = [
        [
            jax.tree.map(lambda a, kind=kind: moved(kind, a), made)
            for kind, made in zip(group.pattern, of_group, strict=True)
        ]
        for group, of_group in zip(config.groups, cache.layers, strict=True)
    ]
    return KVCache(layers, jnp.pad(cache.valid, ((0, 0), (0, capacity - length))), cache.length)
