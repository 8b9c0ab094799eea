"""Products of bfloat16 on CPUs that have them, without a float32 copy of the weight.

XLA for the CPU has kernels for these, and takes them under narrow conditions: the sum stays float32, both operands and
the result lie row by row, and neither of them is a vector. Missing one it casts the whole weight to float32 first, in
every call anew, and multiplies that. So here the product is put as the kernels want it, the weight first, and every
array is pinned to its order, lest the compiler turn one round on the way.

A single row, as in decoding one answer, is not a matter of arithmetic but of reading the weight, in which the kernels
are slow: they run on one thread. It is written out as multiplications and sums, which the compiler makes one loop of,
casts included, and shares out among threads. Its loops are fast where neighbours are summed into neighbours, so a row
of the weight is cut into up to fifteen stretches that are added up side by side, and what is left is a small product.

Generation alone asks for them (`where_it_serves`): there is no way back through a pinned array, and it is one device
that gains, since of several each would have to be told.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, SingleDeviceSharding

if TYPE_CHECKING:
    from tbjax.sharding import Sharding

_asked = ContextVar("asked", default=False)

# Of a product to try them with.
_SIDE = 64

# Into how many stretches a row of a weight is cut: within its loop the compiler casts a weight for up to fifteen, and
# with few, or long ones, the sums of the stretches are too many beside the weight. On a machine with two cores, of
# bfloat16 weights with 576 and 1536 features, twelve stretches were read at 18 to 30 GB/s, six at 14 to 16, and rows
# that were summed whole at 11 to 16.
_MOST_STRETCHES = 15
_FEWEST_STRETCHES = 9
_LONGEST_STRETCH = 128
_STRETCH_MULTIPLE = 16  # numbers in the widest register


@contextlib.contextmanager
def where_it_serves(sharding: "Sharding") -> Iterator[None]:
    """Within it products are native, on a mesh of one CPU that has them."""
    mesh = sharding.mesh
    device: Any = mesh.devices.flat[0] if isinstance(mesh, Mesh) and mesh.size == 1 else None
    token = _asked.set(device is not None and device.platform == "cpu" and _works(device))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `matmul` is to be taken."""
    return _asked.get() and x.dtype == weight.dtype == jnp.bfloat16


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ for x [..., in] and a weight [out, in]."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        product = _of_one_row(rows[0], weight)
    else:
        product = _pinned(jnp.matmul(_pinned(weight), _pinned(rows.T), preferred_element_type=jnp.float32)).T
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _of_one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    """W x, [out], for x [in]; float32."""
    # Held to x, which every step of a loop makes anew: the compiler would cast the weight once, before the loop, and
    # then read twice the bytes in every step.
    x, weight = jax.lax.optimization_barrier((x, weight))
    x = x.astype(jnp.float32)
    features = x.shape[0]
    length = _stretch(features)
    if length is None:
        return jnp.sum(weight.astype(jnp.float32) * x, axis=1)
    stretches = [slice(first, first + length) for first in range(0, features, length)]
    summed = functools.reduce(jnp.add, [weight[:, s].astype(jnp.float32) * x[s] for s in stretches])
    return summed @ jnp.ones(length, jnp.float32)


def _stretch(features: int) -> int | None:
    """The length of the stretches into which so many features are best cut; None: they are best left whole."""
    for count in range(_MOST_STRETCHES, _FEWEST_STRETCHES - 1, -1):
        length, rest = divmod(features, count)
        if not rest and not length % _STRETCH_MULTIPLE and length <= _LONGEST_STRETCH:
            return length
    return None


def _pinned(a: jax.Array) -> jax.Array:
    return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


@functools.cache
def _works(device: Any) -> bool:
    """Whether the compiler takes its kernels: it says so by not casting the weight."""
    given = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(matmul).lower(given, given).compile()
    if re.search(r"= f32\S+ convert\(", compiled.as_text() or "") is not None:
        return False
    try:
        with jax.ensure_compile_time_eval():  # the question comes up while a program is traced
            zeros = jax.device_put(jnp.zeros((_SIDE, _SIDE), jnp.bfloat16), device)
            compiled(zeros, zeros)
    except jax.errors.JaxRuntimeError:  # taken by one pass of the compiler and refused by a later one
        return False
    return True
