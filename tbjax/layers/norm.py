"""Normalisation, computed in float32 whatever the precision of the model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tbjax.layers.linear import parameter
from tbjax.sharding import Sharding


class RMSNorm(nnx.Module):
    """x over its root mean square, times (weight + offset)."""

    def __init__(
        self, features: int, sharding: Sharding, *, epsilon: float, offset: float = 0.0, dtype: Any, key: Any
    ) -> None:
        self.epsilon = epsilon
        self.offset = offset
        self.weight = parameter(key, (features,), (None,), dtype, sharding, fill=1.0 - offset)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (self.weight[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """x less its mean, over its standard deviation, times weight plus bias."""

    def __init__(self, features: int, sharding: Sharding, *, epsilon: float, dtype: Any, key: Any) -> None:
        self.epsilon = epsilon
        self.weight = parameter(key, (features,), (None,), dtype, sharding, fill=1.0)
        self.bias = parameter(key, (features,), (None,), dtype, sharding, fill=0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        wide = wide * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)
