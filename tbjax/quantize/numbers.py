"""How floats become integers and a scale: the arithmetic alone, the same on the host and on a device.

Both functions take the array library (`numpy` or `jax.numpy`) as their first argument and look at one group of numbers
at a time, in float32: what is loaded in slices on any mesh is, bit for bit, what would be computed from the whole.

Eight bits are Qwix's: symmetric, the largest magnitude of a channel at 127.5, so that rounding uses the outermost
integer as fully as any other. Of four bits every level counts. Integers go from -8 to 7, so the scale is given the sign
that puts the number of largest magnitude at -8, and of a few factors, by which the largest is cut off or not reached,
each group takes the one that leaves the least squared error. It costs no bytes and is the difference between a third
more divergence and none (`python -m benchmarks.quantize`).

Inputs are the last dimension here, and groups of them follow each other.
"""

from typing import Any

import jax.numpy as jnp

from tbjax.quantize.rules import Encoding

# The largest magnitude over the scale, for 8 bits.
WIDEST = 127.5

# Factors of the scale that a group of 4-bit numbers tries, 1 being the one with which its largest is -8 exactly.
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05)


def scales(xp: Any, values: Any, encoding: Encoding) -> Any:
    """The scale of every group of `values` [..., inputs], float32: [..., groups, inputs of a group]."""
    groups = encoding.groups(values.shape[-1])
    parts = values.astype(xp.float32).reshape(*values.shape[:-1], groups, -1)
    if encoding.kind == "int8":
        return _kept(xp, xp.max(xp.abs(parts), axis=-1) / xp.float32(WIDEST), encoding)
    lowest, highest = xp.min(parts, axis=-1), xp.max(parts, axis=-1)
    largest = xp.where(highest > -lowest, highest, lowest)
    best, least = None, None
    for factor in FACTORS:
        scale = _kept(xp, largest * xp.float32(factor / -8), encoding)
        lost = xp.sum(xp.square(_rounded(xp, parts, scale, encoding) * scale[..., None] - parts), axis=-1)
        better = None if least is None else lost < least
        best = scale if better is None else xp.where(better, scale, best)
        least = lost if better is None else xp.where(better, lost, least)
    return best


def integers(xp: Any, values: Any, scale: Any, encoding: Encoding) -> Any:
    """`values` in units of their scales, as int8: [..., inputs], whatever the bits."""
    parts = values.astype(xp.float32).reshape(*scale.shape, -1)
    return _rounded(xp, parts, scale, encoding).astype(xp.int8).reshape(values.shape)


def _rounded(xp: Any, parts: Any, scale: Any, encoding: Encoding) -> Any:
    """The integer next to each number, still as float32."""
    most = 2 ** (encoding.bits - 1)
    # A group of zeros has the scale zero.
    divisor = xp.where(scale == 0, xp.float32(1), scale)[..., None]
    return xp.clip(xp.round(parts / divisor), -most, most - 1)


def _kept(xp: Any, scale: Any, encoding: Encoding) -> Any:
    """The scale as it is stored, so that numbers are rounded to what will be multiplied with."""
    return scale.astype(jnp.dtype(encoding.scale_dtype)).astype(xp.float32)
