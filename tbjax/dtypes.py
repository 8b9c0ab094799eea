"""The numbers that weights are kept in, and what is lost between them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

KNOWN = ("float32", "bfloat16", "float16")
WIDE = "float64"  # JAX narrows it to float32 unless told otherwise


def float_dtype(dtype: Any, argument: str = "dtype") -> np.dtype:
    """`dtype` as numpy spells it; raises unless weights can be kept in it. `argument` is what an error calls it."""
    known = (*KNOWN, WIDE) if jax.config.read("jax_enable_x64") else KNOWN
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        more = "" if WIDE in known else f" (and {WIDE}, where jax_enable_x64 is on)"
        raise ValueError(f"{argument}={dtype!r} is not supported: dtype can be {', '.join(known)}{more}.")
    return found


def nbytes(shape: Sequence[int], dtype: Any) -> int:
    """The bytes of an array on a device: accelerators keep two 4-bit integers in one, which numpy does not count."""
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * np.dtype(dtype).itemsize
    return -(-math.prod(shape) * bits // 8)


def narrows(source: Any, target: Any) -> bool:
    """Whether a finite number of `source` may be too large for `target`."""
    source, target = np.dtype(source), np.dtype(target)
    if not (jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating)):
        return False
    return float(ml_dtypes.finfo(target).max) < float(ml_dtypes.finfo(source).max)
