"""Products of bfloat16 on CPUs that have them, without a float32 copy of the weight.

XLA for the CPU has kernels for these, and takes them under narrow conditions: the sum stays float32, both operands and
the result lie row by row, and neither of them is a vector (a single row goes as two). Missing one it casts the whole
weight to float32 first, in every call anew, and multiplies that. So here the product is put as the kernels want it, the
weight first, and every array is pinned to its order, lest the compiler turn one round on the way.

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
    count = rows.shape[0]
    if count == 1:
        rows = jnp.concatenate((rows, rows))
    columns = _pinned(rows.T)
    product = _pinned(jnp.matmul(_pinned(weight), columns, preferred_element_type=jnp.float32))
    return product[:, :count].T.reshape(*x.shape[:-1], -1).astype(x.dtype)


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
