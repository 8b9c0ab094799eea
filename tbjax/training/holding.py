"""How a model holds its weights while it is trained in place: in whose memory, in which dtype, on which side."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tbjax.model import Decoder
from tbjax.sharding import leaves
from tbjax.training.optimizer import HOST


def own(model: Decoder) -> None:
    """Have JAX itself hold the weights of `model`, in place, on a CPU.

    What was read from files there lies in the reader's memory, which a step cannot take for the next state: the first
    one would hold all weights twice.
    """
    if model.sharding.platform != "cpu":
        return
    for leaf, array in zip(leaves(model), jax.tree.leaves(model), strict=True):
        if array.sharding.memory_kind != HOST:
            leaf.variable.set_value(jnp.copy(array))


def with_dtype(model: Decoder, dtype: Any) -> None:
    """Convert the weights of `model`, in place."""
    if model.dtype == dtype:
        return
    convert = jax.jit(
        lambda model: jax.tree.map(lambda a: a.astype(dtype), model),
        out_shardings=jax.tree.map(lambda a: a.sharding, model),
        donate_argnums=0,
    )
    adopt(model, convert(model))


def adopt(model: Decoder, other: Decoder) -> None:
    """Give `model` the arrays of `other`."""
    for leaf, array in zip(leaves(model), jax.tree.leaves(other), strict=True):
        leaf.variable.set_value(array)


def on_devices(model: Decoder) -> Decoder:
    """`model`, with such weights as lie in the host's memory brought to the devices."""

    def bring(array: jax.Array) -> jax.Array:
        where = array.sharding
        if where.memory_kind != HOST or not isinstance(where, NamedSharding):
            return array
        return jax.device_put(array, NamedSharding(where.mesh, where.spec))

    return jax.tree.map(bring, model)
