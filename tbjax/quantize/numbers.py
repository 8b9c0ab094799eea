"""How floats become integers: the arithmetic alone, the same on the host and on a device.

Both functions take the array library (`numpy` or `jax.numpy`) as their first argument and look at one group of numbers
at a time, in float32: what is loaded in slices on any mesh is, bit for bit, what would be computed from the whole.
(They multiply by constants, and do not divide by them, since XLA would make that of it.)

A group of inputs has a scale and an offset, the number in its middle: all integers are used, from the smallest number
of the group to the largest, on whichever side of zero they lie. That the middle is kept, and not the smallest number or
the integer that is zero, keeps it near zero, where bfloat16 rounds it least.

A whole channel has a scale alone, and in 8 bits it is Qwix's: the largest magnitude is put half a step beyond the last
integer on either side, which rounding then uses as fully as any other.

Inputs are the last dimension here, and groups of them follow each other.
"""

from typing import Any

import jax.numpy as jnp

from tbjax.quantize.rules import Encoding


def frames(xp: Any, values: Any, encoding: Encoding) -> tuple[Any, Any]:
    """The scale and the offset of every group of `values` [..., inputs], float32: [..., groups].

    They are rounded to what is stored of them, so that numbers are held against what they will become. A channel has no
    offset.
    """
    parts = _parts(xp, values, encoding)
    if encoding.group is None:
        unit = xp.float32(1 / (2 ** (encoding.bits - 1) - 0.5))
        return _kept(xp, xp.max(xp.abs(parts), axis=-1) * unit, encoding), None
    least, most = xp.min(parts, axis=-1), xp.max(parts, axis=-1)
    scale = _kept(xp, (most - least) * xp.float32(1 / (2**encoding.bits - 1)), encoding)
    return scale, _kept(xp, least + xp.float32(2 ** (encoding.bits - 1)) * scale, encoding)


def integers(xp: Any, values: Any, scale: Any, offset: Any, encoding: Encoding) -> Any:
    """`values` [..., inputs] as steps of their scales, int8 whatever the bits."""
    parts = _parts(xp, values, encoding)
    parts = parts if offset is None else parts - offset[..., None]
    # Numbers that are all the same have the scale zero.
    steps = xp.round(parts / xp.where(scale == 0, xp.float32(1), scale)[..., None])
    most = 2 ** (encoding.bits - 1)
    return xp.clip(steps, 1 - most if offset is None else -most, most - 1).astype(xp.int8).reshape(values.shape)


def _parts(xp: Any, values: Any, encoding: Encoding) -> Any:
    groups = encoding.groups(values.shape[-1])
    return values.astype(xp.float32).reshape(*values.shape[:-1], groups, -1)


def _kept(xp: Any, frame: Any, encoding: Encoding) -> Any:
    return frame.astype(jnp.dtype(encoding.frame_dtype)).astype(xp.float32)
