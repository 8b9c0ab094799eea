"""A weight in few bits, where a model has a parameter otherwise.

It is two parameters or three: integers in the weight's own shape, and the scales and offsets of its groups
(`tbjax.quantize.numbers`), which are as many along the inputs as there are groups. All have names for their dimensions,
so that meshes, checkpoints and tables treat them like any other parameter, under the paths `WEIGHT.values`,
`WEIGHT.scale` and `WEIGHT.offset`.

One scale for a whole output channel waits until the matmul is done, which then reads the integers themselves: those of
8 bits are exact in bfloat16. Scales and offsets of groups cannot wait. XLA makes the floats of one matrix and
multiplies with those; of a stack of layers it never has more than that, but in decoding it writes and reads them.

The inputs of a weight are its second dimension without the layers, both of a matrix [out, in] and of experts
[E, in, out].
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from tbjax.quantize import numbers
from tbjax.quantize.rules import Encoding

Dims: TypeAlias = tuple[str | None, ...]  # as `tbjax.sharding` has them


class Parts(NamedTuple):
    """What a quantised weight consists of: arrays, or anything that there is one of for each."""

    values: Any
    scale: Any
    offset: Any  # None where one scale is of a whole channel


class QuantizedWeight(nnx.Module):
    """Integers and what they mean, in place of a weight with the dimensions `dims`.

    `frame_dims`, of scales and offsets, differ from them along the inputs: they have no name there where a mesh does
    not cut them, be it that there is only one, or that a cut would go through a group.
    """

    def __init__(self, parts: Parts, dims: Dims, frame_dims: Dims, encoding: Encoding) -> None:
        self.values = nnx.Param(parts.values, dims=dims)
        self.scale = nnx.Param(parts.scale, dims=frame_dims)
        self.offset = None if parts.offset is None else nnx.Param(parts.offset, dims=frame_dims)
        self.encoding = encoding

    @property
    def parts(self) -> Parts:
        return Parts(self.values, self.scale, self.offset)

    @property
    def dims(self) -> Dims:
        return tuple(self.values.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def inputs_of(dims: Dims) -> int:
    """The dimension of the inputs of a weight with these dimensions (without the layers), counted from the last."""
    return 1 - len(dims)


def encoded(value: jax.Array, inputs: int, encoding: Encoding) -> Parts:
    """A weight, quantised."""
    turned = jnp.moveaxis(value, inputs, -1)
    scale, offset = numbers.frames(jnp, turned, encoding)
    values = numbers.integers(jnp, turned, scale, offset, encoding)
    dtypes = Parts(encoding.kind, encoding.frame_dtype, encoding.frame_dtype)
    found = zip(Parts(values, scale, offset), dtypes, strict=True)
    return Parts(*(None if a is None else jnp.moveaxis(a, -1, inputs).astype(dtype) for a, dtype in found))


def decoded(parts: Parts, dtype: Any) -> jax.Array:
    """The weight in full."""
    qwix = _qwix()
    full = qwix.dequantize(qwix.QArray(parts.values, parts.scale.astype(dtype)))
    if parts.offset is None:
        return full
    # The offsets of groups, in the shape in which each is of the inputs of its own.
    shape, axis = list(full.shape), _grouped(parts)
    shape[axis : axis + 1] = [parts.offset.shape[axis], -1]
    offset = jnp.expand_dims(parts.offset.astype(dtype), axis + 1)
    return (full.reshape(shape) + offset).reshape(full.shape)


def matmul(x: jax.Array, parts: Parts) -> jax.Array:
    """x Wᵀ for x [..., in] and W [out, in]."""
    if parts.offset is not None:
        return jnp.einsum("...i,oi->...o", x, decoded(parts, x.dtype))
    y = jnp.einsum("...i,oi->...o", x, parts.values.astype(x.dtype), preferred_element_type=_wide(x.dtype))
    return (y * parts.scale[:, 0]).astype(x.dtype)


def ragged_matmul(rows: jax.Array, parts: Parts, sizes: jax.Array, expert: jax.Array) -> jax.Array:
    """Rows [T, in] times matrices [E, in, out], of which each takes as many as `sizes` says; `expert` [T] names it."""
    if parts.offset is not None:
        return jax.lax.ragged_dot(rows, decoded(parts, rows.dtype), sizes)
    wide = _wide(rows.dtype)
    y = jax.lax.ragged_dot(rows, parts.values.astype(rows.dtype), sizes, preferred_element_type=wide)
    return (y * jnp.take(parts.scale[:, 0], expert, axis=0, mode="clip")).astype(rows.dtype)


def _grouped(parts: Parts) -> int:
    """The dimension along which there are fewer offsets than integers; any, where there are as many."""
    pairs = zip(parts.values.shape, parts.offset.shape, strict=True)
    return next((axis for axis, (whole, groups) in enumerate(pairs) if whole != groups), 0)


def _wide(dtype: Any) -> Any:
    """In what a product waits for its scale: float16 cannot hold it. None: as it comes."""
    return jnp.float32 if dtype == jnp.float16 else None


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "quantised weights are read by Qwix, which is not installed: pip install 'tbjax[quantize]'."
        ) from error
    return qwix
