"""Products and what stands between them, on one CPU as its compiler does them best.

Bfloat16 first of all is multiplied without a float32 copy of the weight.

XLA for the CPU has kernels for these, and takes them under narrow conditions: the sum stays float32, both operands and
the result lie row by row, and neither of them is a vector. Missing one it casts the whole weight to float32 first, in
every call anew, and multiplies that. So here the product is put as the kernels want it, and every array is pinned to
its order, lest the compiler turn one round on the way.

A single row, as in decoding one answer, is not a matter of arithmetic but of reading the weight, in which the kernels
are slow: they run on one thread. A vector before a transposed weight, cast to float32, the compiler makes one loop of,
casts included, and shares it out among threads. Put the other way round, W x, it casts the whole weight first.

Float32 products of a few rows, as in decoding a batch, gain by the weight standing first: with 8 to 128 rows they take
a half to four fifths of the time.

What stands between the products is slow where the compiler rounds to bfloat16 after every step, which takes several
instructions (`wide`); where it puts parts together and turns them round at once, element by element
(`laid_heads_first`); where a row's features are found by dividing, for every row of the weight anew (`heads_joined`);
and where it casts a whole table in order to look up a row of it (`take`).

Generation alone asks for all this (`where_it_serves`): there is no way back through a pinned array, and it is one
device that gains, since of several each would have to be told.
"""

import contextlib
import functools
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

# The most rows of float32 that count as a few: of 1024 either order takes as long.
_FEW_ROWS = 512

# Of the products to try them with: rows, and a weight's features out and in.
_ROWS = (1, 8)
_TRIED = (512, 64)


@contextlib.contextmanager
def where_it_serves(sharding: "Sharding") -> Iterator[None]:
    """Within it all of the above is done, on a mesh of one CPU that has native products."""
    mesh = sharding.mesh
    device: Any = mesh.devices.flat[0] if isinstance(mesh, Mesh) and mesh.size == 1 else None
    token = _asked.set(device is not None and device.platform == "cpu" and _works(device))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `matmul` is to be taken."""
    if not _asked.get() or x.dtype != weight.dtype:
        return False
    few = 1 < x.size // x.shape[-1] <= _FEW_ROWS
    return x.dtype == jnp.bfloat16 or (x.dtype == jnp.float32 and few)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ for x [..., in] and a weight [out, in]."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        product = _of_one_row(rows[0], weight)
    elif x.dtype == jnp.bfloat16:
        product = _pinned(jnp.einsum("ri,oi->ro", _pinned(rows), _pinned(weight), preferred_element_type=jnp.float32))
    else:
        product = _pinned(_pinned(weight) @ _pinned(rows.T)).T
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def dot_summed_wide(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    """`jax.lax.dot_general`, whose sums stay float32 where native products are asked for."""
    summed = jnp.float32 if _asked.get() else None
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=summed)


def wide(a: jax.Array) -> jax.Array:
    """In float32 where native products are asked for: what is computed of it is then rounded once, at its end."""
    return a.astype(jnp.float32) if _asked.get() else a


def laid_heads_first(a: jax.Array) -> jax.Array:
    """[B, S, H, N], lying in memory as [B, H, S, N] where native products of bfloat16 are asked for."""
    if not _asked.get() or a.dtype != jnp.bfloat16:
        return a
    return with_layout_constraint(a, Layout((0, 2, 1, 3)))


def heads_joined(a: jax.Array, dtype: Any) -> jax.Array:
    """[B, S, H, N] as [B, S, H * N], rounded to `dtype`."""
    joined = a.reshape(*a.shape[:2], -1)
    if _asked.get() and joined.dtype != dtype:
        # Left to itself the compiler rounds first and joins afterwards. What a product's loop reads is then the rounded
        # array, not yet joined, and joining becomes a part of the loop: a division by N for each number of the weight.
        joined = jax.lax.optimization_barrier(joined)
    return joined.astype(dtype)


def take(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """The table's rows of `tokens`. One beyond the last row gets the last, one below zero the first."""
    if not _asked.get() or table.dtype != jnp.bfloat16:
        return jnp.take(table, tokens, axis=0, mode="clip")
    # Integers are looked up where they lie; of bfloat16 the compiler would cast the whole table.
    bits = jnp.take(jax.lax.bitcast_convert_type(table, jnp.uint16), tokens, axis=0, mode="clip")
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _of_one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    """W x, [out], for x [in]; float32."""
    # The row is cast before the loop, not in it again for every feature that the product has. The weight is held to it
    # as every step of decoding makes a new one: the compiler would cast the weight before all steps, and read twice the
    # bytes in each.
    x, weight = jax.lax.optimization_barrier((x.astype(jnp.float32), weight))
    return (x[None] @ weight.astype(jnp.float32).T)[0]


def _pinned(a: jax.Array) -> jax.Array:
    return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


@functools.cache
def _works(device: Any) -> bool:
    """Whether the compiler does as said above: if it casts the weight, it needs the room for that."""
    weight = jax.ShapeDtypeStruct(_TRIED, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    try:
        for rows in _ROWS:
            given = jax.ShapeDtypeStruct((rows, _TRIED[1]), jnp.bfloat16, sharding=weight.sharding)
            compiled = jax.jit(matmul).lower(given, weight).compile()
            needed = compiled.memory_analysis()
            if needed is None or needed.temp_size_in_bytes >= 4 * weight.size:
                return False
            with jax.ensure_compile_time_eval():  # the question comes up while a program is traced
                compiled(*(jax.device_put(jnp.zeros(a.shape, a.dtype), device) for a in (given, weight)))
    except jax.errors.JaxRuntimeError:  # taken by one pass of the compiler and refused by a later one
        return False
    return True
