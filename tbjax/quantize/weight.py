"""A weight in few bits, where a model has a parameter otherwise.

It is two parameters: integers in the weight's own shape, and scales, which are as many along the inputs as there are
groups. Both have names for their dimensions, so that meshes, checkpoints and tables treat them like any other
parameter, under the paths `WEIGHT.values` and `WEIGHT.scale`.

A matmul takes them as a `qwix.QArray`. One scale for a whole output channel waits until the matmul is done: integers of
8 bits are exact in bfloat16, and no weight is ever multiplied. Scales of groups cannot wait, so Qwix multiplies them in
first, which compilers do where the matmul reads its operand.

The inputs of a weight are its second dimension without the layers, both of a matrix [out, in] and of experts
[E, in, out].
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from tbjax.quantize import numbers
from tbjax.quantize.rules import Encoding

Dims: TypeAlias = tuple[str | None, ...]  # as `tbjax.sharding` has them
VALUES, SCALE = "values", "scale"


class QuantizedWeight(nnx.Module):
    """Integers and scales in place of a weight with the dimensions `dims`.

    `scale_dims` differ from them along the inputs: they have no name there where a mesh does not cut the scales along
    them, be it that there is only one, or that a cut would go through a group.
    """

    def __init__(
        self,
        values: Any,
        scale: Any,
        dims: Dims,
        scale_dims: Dims,
        encoding: Encoding,
    ) -> None:
        self.values = nnx.Param(values, dims=dims)
        self.scale = nnx.Param(scale, dims=scale_dims)
        self.encoding = encoding

    @property
    def dims(self) -> Dims:
        return tuple(self.values.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def inputs(self) -> int:
        """Which dimension has them, counted from the last."""
        return inputs_of(self.dims)


def inputs_of(dims: Dims) -> int:
    """The dimension of the inputs of a weight with these dimensions (without the layers), counted from the last."""
    return 1 - len(dims)


def encoded(value: jax.Array, inputs: int, encoding: Encoding) -> tuple[jax.Array, jax.Array]:
    """The integers and the scales of a weight."""
    turned = jnp.moveaxis(value, inputs, -1)
    scale = numbers.scales(jnp, turned, encoding)
    values = numbers.integers(jnp, turned, scale, encoding)
    values, scale = (jnp.moveaxis(a, -1, inputs) for a in (values, scale))
    return values.astype(encoding.kind), scale.astype(encoding.scale_dtype)


def q_array(values: jax.Array, scale: jax.Array, dtype: Any) -> Any:
    """As Qwix has it, to be multiplied in `dtype`."""
    return _qwix().QArray(values, scale.astype(dtype))


def decoded(values: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The weight in full."""
    return _qwix().dequantize(q_array(values, scale, dtype))


def matmul(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """x Wᵀ for x [..., in], integers [out, in] and scales [out, groups]."""
    if scale.shape[-1] > 1:
        return jnp.einsum("...i,oi->...o", x, decoded(values, scale, x.dtype))
    y = jnp.einsum("...i,oi->...o", x, values.astype(x.dtype), preferred_element_type=_wide(x.dtype))
    return (y * scale[:, 0]).astype(x.dtype)


def ragged_matmul(
    rows: jax.Array, values: jax.Array, scale: jax.Array, sizes: jax.Array, expert: jax.Array
) -> jax.Array:
    """Rows [T, in] times matrices [E, in, out], of which each takes as many as `sizes` says; `expert` [T] names it."""
    if scale.shape[-2] > 1:
        return _qwix().ragged_dot(rows, q_array(values, scale, rows.dtype), sizes)
    wide = _wide(rows.dtype)
    y = jax.lax.ragged_dot(rows, values.astype(rows.dtype), sizes, preferred_element_type=wide)
    return (y * jnp.take(scale[:, 0], expert, axis=0, mode="clip")).astype(rows.dtype)


def _wide(dtype: Any) -> Any:
    """In what a product waits for its scale: float16 cannot hold it. None: as it comes."""
    return jnp.float32 if dtype == jnp.float16 else None


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "quantised weights are multiplied by Qwix, which is not installed: pip install 'tbjax[quantize]'."
        ) from error
    return qwix
