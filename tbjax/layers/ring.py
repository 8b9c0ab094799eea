"""The keys and values of one layer, and where in them a token's stand.

A layer that sees the last `window` tokens only keeps no more of them than it must: it is a ring, in which a new token
takes the place of one that no query looks at any more. To be written a chunk at a time and then read by all queries of
the chunk, it has room for the window and the chunk.

Heads come before tokens: attention multiplies each head by itself, and a compiler that found them in any other order
would turn all keys and values round for every token.

Over tp a cache is cut by heads, as attention is, and over cp by tokens. Where tp has more devices than there are heads,
heads would be held by several devices each; there tp cuts tokens as well. A device then has all heads of its part of
the tokens, and finds what every query attends to among those. The compiler joins the parts: the largest score, the sum
of the weights and the weighted sums of values each go round once, of a single query a few numbers for each head.

B batch, S new tokens, T capacity, K key-value heads, N head dimension, R layers of a stack.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.config import ModelConfig
from tbjax.layers.blocks import Keys
from tbjax.room import heads_are_whole, parts
from tbjax.sharding import Dims, Sharding, axes_of


def cache_dims(config: ModelConfig, sharding: Sharding) -> Dims:
    """Of one layer's keys or values [B, K, T, N]."""
    whole = heads_are_whole(config, sharding.size("tp"))
    return "batch", *((None, "all_cached") if whole else ("kv_heads", "cached")), None


def parts_of(config: ModelConfig, sharding: Sharding) -> int:
    """Into how many parts the tokens of a cache are cut."""
    return parts(config, tp=sharding.size("tp"), cp=sharding.size("cp"))


class LayerCache(NamedTuple):
    """Keys and values [B, K, T, N]; or, with a `row`, the stacks [R, B, K, T, N] of which it is the layer's."""

    keys: jax.Array
    values: jax.Array
    row: jax.Array | None = None

    def write(
        self, key: jax.Array, value: jax.Array, keys: Keys, config: ModelConfig, sharding: Sharding
    ) -> tuple["LayerCache", jax.Array, jax.Array, Keys]:
        """With the tokens [B, S, K, N] of `keys.query_slots` written in: the cache, all of the layer's keys and
        values [B, T, K, N], and what queries have to know of those."""
        size, known = self.keys.shape[-2], keys.valid
        is_ring = known is not None and size < known.shape[1]
        first = keys.query_slots[0]
        put = partial(_put, is_ring)
        if parts_of(config, sharding) > 1:
            put = partial(_put_in_parts, sharding, cache_dims(config, sharding))
        written = LayerCache(
            put(self.keys, key.swapaxes(1, 2), first, self.row),
            put(self.values, value.swapaxes(1, 2), first, self.row),
            self.row,
        )
        if known is not None and is_ring:
            places = slots_at(first + key.shape[1], size)
            there = jnp.maximum(places, 0)
            keys = keys._replace(
                valid=known[:, there] & (places >= 0), positions=keys.positions[:, there], slots=places
            )
        key, value = (_layer(a, self.row).swapaxes(1, 2) for a in (written.keys, written.values))
        return written, key, value, keys


def _layer(a: jax.Array, row: jax.Array | None) -> jax.Array:
    return a if row is None else a[row]


def _put(is_ring: bool, a: jax.Array, new: jax.Array, first: jax.Array, row: jax.Array | None) -> jax.Array:
    """Keys or values with the tokens `new` [B, K, S, N] from the slot `first` on."""
    count, size = new.shape[2], a.shape[-2]
    if is_ring and count > 1:  # may go round
        return _scattered(a, new, (first + jnp.arange(count)) % size, row)
    return _placed(a, new, first % size if is_ring else first, row)


def _put_in_parts(
    sharding: Sharding, dims: Dims, a: jax.Array, new: jax.Array, first: jax.Array, row: jax.Array | None
) -> jax.Array:
    """As `_put`, where each device has a part of the tokens: it writes those of its own."""
    batch, heads, over, _ = sharding.activation(dims, a.shape[-4:])
    lies, of_new = PartitionSpec(*[None] * (a.ndim - 4), batch, heads, over), PartitionSpec(batch, heads)
    whole, count, total = PartitionSpec(), new.shape[2], a.shape[-2]

    def put(a: jax.Array, new: jax.Array, first: jax.Array, row: jax.Array | None = None) -> jax.Array:
        size = a.shape[-2]
        places = (first + jnp.arange(count)) % total - jax.lax.axis_index(axes_of(over)) * size
        mine = (places >= 0) & (places < size)
        if count > 1:
            return _scattered(a, new, jnp.where(mine, places, size), row)
        place = jnp.clip(places[0], 0, size - 1)
        old = jax.lax.dynamic_slice_in_dim(_layer(a, row), place, 1, axis=2)
        return _placed(a, jnp.where(mine, new.astype(a.dtype), old), place, row)

    given = (a, new, first) if row is None else (a, new, first, row)
    return sharding.per_device(put, (lies, of_new, whole, whole)[: len(given)], lies)(*given)


def _placed(a: jax.Array, new: jax.Array, place: jax.Array, row: jax.Array | None) -> jax.Array:
    """With `new` in the places from `place` on."""
    if row is None:
        return jax.lax.dynamic_update_slice_in_dim(a, new.astype(a.dtype), place, axis=2)
    zero = jnp.zeros_like(place)
    # The new tokens alone: a layer that is taken out, written and put back is copied twice.
    return jax.lax.dynamic_update_slice(
        a, new.astype(a.dtype)[None], (row.astype(place.dtype), zero, zero, place, zero)
    )


def _scattered(a: jax.Array, new: jax.Array, places: jax.Array, row: jax.Array | None) -> jax.Array:
    """With `new` in these places, each of its own; what has a place beyond the last is dropped."""
    layer = _layer(a, row).at[:, :, places].set(new.astype(a.dtype), mode="drop")
    return layer if row is None else a.at[row].set(layer)


def slots_at(length: jax.Array, size: int) -> jax.Array:
    """Which slot of the sequence stands at each place of a ring of `size`, of which `length` slots have been written.

    Slot s stands at place s % size as long as it is among the last `size`; one below zero has never been.
    """
    last = length - 1
    return last - (last - jnp.arange(size)) % size
