"""The key-value cache: for each layer the keys and values of the tokens so far, cut like the attention that reads them.

B batch, T capacity in tokens, K key-value heads as `HeadLayout` lays them out, N head dimension, R repeats of a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbjax.config import ModelConfig
from tbjax.layers.attention import HeadLayout
from tbjax.sharding import Sharding


class KVCache(NamedTuple):
    """`layers[group][position]` holds (keys, values), each [R, B, T, K, N]."""

    layers: list[list[tuple[jax.Array, jax.Array]]]
    valid: jax.Array  # [B, T] bool: a real token stands there
    length: jax.Array  # slots used so far, by every row alike (shorter rows are padded on the left)


def make_cache(config: ModelConfig, sharding: Sharding, batch: int, capacity: int, dtype: Any) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens."""
    heads = HeadLayout.fit(config.heads, config.kv_heads, sharding.size("tp")).total

    def empty(repeats: int) -> jax.Array:
        a = jnp.zeros((repeats, batch, capacity, heads, config.head_dim), dtype)
        return sharding.constrain(a, None, "batch", None, "kv_heads", None)

    return KVCache(
        [[(empty(g.repeats), empty(g.repeats)) for _ in g.pattern] for g in config.groups],
        jnp.zeros((batch, capacity), bool),
        jnp.int32(0),
    )
