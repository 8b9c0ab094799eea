"""The key-value cache: for each layer the keys and values of the tokens so far, cut like the attention that reads them.

The layers of a pattern that repeats are stacked, or, where a program has the weights of each layer in arrays of their
own, so have they their caches. Layers with a window keep rings, see `tbjax.layers.ring`.

B batch, T capacity in tokens, K key-value heads as `HeadLayout` lays them out (or, kept whole, as the model has
them), N head dimension, R repeats of a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbjax.config import LayerKind, ModelConfig
from tbjax.layers.attention import HeadLayout
from tbjax.layers.ring import LayerCache, cache_dims, parts_of
from tbjax.room import heads_are_whole, slots
from tbjax.sharding import Sharding


class KVCache(NamedTuple):
    """`layers[group][position]` is of all repeats a `LayerCache` of stacks [R, B, K, T, N], or a list of single ones.

    T is the capacity, or that of a ring, so many more that devices can share them out.
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
    cut, heads = parts_of(config, sharding), heads_of(config, sharding)
    capacity = slots(None, capacity, capacity, cut)

    def empty(kind: LayerKind, *repeats: int) -> LayerCache:
        size = slots(kind.window, capacity, chunk or capacity, cut)
        a = _laid(config, sharding, jnp.zeros((*repeats, batch, heads, size, config.head_dim), dtype))
        return LayerCache(a, a)

    def of(repeats: int, kind: LayerKind) -> Any:
        return empty(kind, repeats) if stacked else [empty(kind) for _ in range(repeats)]

    layers = [[of(group.repeats, kind) for kind in group.pattern] for group in config.groups]
    return KVCache(layers, jnp.zeros((batch, capacity), bool), jnp.int32(0))


def grown(config: ModelConfig, sharding: Sharding, cache: KVCache, length: int, capacity: int) -> KVCache:
    """A cache of all `length` tokens so far, with room for more, which come one at a time."""
    cut = parts_of(config, sharding)
    capacity = slots(None, capacity, capacity, cut)

    def moved(kind: LayerKind, a: jax.Array) -> jax.Array:
        size, axis = slots(kind.window, capacity, 1, cut), a.ndim - 2
        if size >= length:
            a = jax.lax.slice_in_dim(a, 0, length, axis=axis)
            a = jnp.pad(a, [(0, size - length if i == axis else 0) for i in range(a.ndim)])
        else:  # a ring of the last tokens: slot s at place s % size
            a = jnp.roll(jax.lax.slice_in_dim(a, length - size, length, axis=axis), length % size, axis=axis)
        return _laid(config, sharding, a)

    layers = [
        [
            jax.tree.map(lambda a, kind=kind: moved(kind, a), made)
            for kind, made in zip(group.pattern, of_group, strict=True)
        ]
        for group, of_group in zip(config.groups, cache.layers, strict=True)
    ]
    return KVCache(layers, jnp.pad(cache.valid[:, :length], ((0, 0), (0, capacity - length))), cache.length)


def heads_of(config: ModelConfig, sharding: Sharding) -> int:
    """How many key-value heads a cache has, over all devices."""
    if heads_are_whole(config, sharding.size("tp")):
        return config.kv_heads
    return HeadLayout.fit(config.heads, config.kv_heads, sharding.size("tp")).total


def _laid(config: ModelConfig, sharding: Sharding, a: jax.Array) -> jax.Array:
    """Keys or values of a layer, or of a stack of them."""
    return sharding.constrain(a, *[None] * (a.ndim - 4), *cache_dims(config, sharding))
