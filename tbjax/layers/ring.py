"""The keys and values of one layer, and where in them a token's stand.

A layer that sees the last `window` tokens only keeps no more of them than it must: it is a ring, in which a new token
takes the place of one that no query looks at any more. To be written a chunk at a time and then read by all queries of
the chunk, it has room for the window and the chunk.

Heads come before tokens: attention multiplies each head by itself, and a compiler that found them in any other order
would turn all keys and values round for every token.

B batch, S new tokens, T capacity, K key-value heads, N head dimension, R layers of a stack.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tbjax.layers.attend import Keys


class LayerCache(NamedTuple):
    """Keys and values [B, K, T, N]; or, with a `row`, the stacks [R, B, K, T, N] of which it is the layer's."""

    keys: jax.Array
    values: jax.Array
    row: jax.Array | None = None

    def write(self, key: jax.Array, value: jax.Array, keys: Keys) -> tuple["LayerCache", jax.Array, jax.Array, Keys]:
        """With the tokens [B, S, K, N] of `keys.query_slots` written in: the cache, all of the layer's keys and
        values [B, T, K, N], and what queries have to know of those."""
        size, known = self.keys.shape[-2], keys.valid
        is_ring = known is not None and size < known.shape[1]
        first = keys.query_slots[0]
        written = LayerCache(
            self._with(self.keys, key, first, is_ring), self._with(self.values, value, first, is_ring), self.row
        )
        if known is not None and is_ring:
            places = slots(first + key.shape[1], size)
            there = jnp.maximum(places, 0)
            keys = keys._replace(
                valid=known[:, there] & (places >= 0), positions=keys.positions[:, there], slots=places
            )
        return written, self._own(written.keys), self._own(written.values), keys

    def _own(self, a: jax.Array) -> jax.Array:
        """[B, T, K, N]"""
        return (a if self.row is None else a[self.row]).swapaxes(1, 2)

    def _with(self, a: jax.Array, new: jax.Array, first: jax.Array, is_ring: bool) -> jax.Array:
        count, size = new.shape[1], a.shape[-2]
        if is_ring and count > 1:  # may go round
            own = self._own(a).at[:, (first + jnp.arange(count)) % size].set(new.astype(a.dtype)).swapaxes(1, 2)
            return own if self.row is None else a.at[self.row].set(own)
        new, place = new.astype(a.dtype).swapaxes(1, 2), first % size if is_ring else first
        if self.row is None:
            return jax.lax.dynamic_update_slice_in_dim(a, new, place, axis=2)
        zero = jnp.zeros_like(place)
        # The new tokens alone: a layer that is taken out, written and put back is copied twice.
        return jax.lax.dynamic_update_slice(a, new[None], (self.row.astype(place.dtype), zero, zero, place, zero))


def room(window: int | None, capacity: int, chunk: int) -> int:
    """How many tokens a layer keeps of up to `capacity`, of which `chunk` are written at once."""
    return capacity if window is None else min(capacity, window + chunk - 1)


def slots(length: jax.Array, size: int) -> jax.Array:
    """Which slot of the sequence stands at each place of a ring of `size`, of which `length` slots have been written.

    Slot s stands at place s % size as long as it is among the last `size`; one below zero has never been.
    """
    last = length - 1
    return last - (last - jnp.arange(size)) % size
