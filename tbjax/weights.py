"""What happens to a weight between where it is stored and where it is used, and to its gradient on the way back.

Left to itself the compiler lays a gradient as it lays the value, orders a gathered weight as its links like it best,
and sums in the dtype of the matmul. Each function here computes something plain (a cast, a matmul, a lookup, or nothing
at all) and says one of these things of the way forward or of the way back. `tbjax.sharding` decides which one is due.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from tbjax import native

if TYPE_CHECKING:
    from tbjax.sharding import Sharding


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(value: jax.Array, sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    """`value` laid as `used`, and its gradient as `stored`: left to itself the gradient would be laid as the value is,
    which sums all of it onto every device only to drop most.

    Both are pinned to the order of dimensions in which parameters are stored. A gather over NVLink wants its dimension
    outermost, and the compiler would otherwise carry that wish through the cast and the slice of a layer to the stack
    of all layers, and keep a second stack in that order for the whole step.
    """
    return sharding.lay(pinned(value, sharding, _at_rest(sharding, used, stored)), used)


def _at_rest(sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec) -> PartitionSpec:
    """How a parameter itself lies: under ZeRO-2 its gradient alone is cut."""
    return stored if sharding.strategy.cuts_parameters else used


def _gathered_forward(value: jax.Array, sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec) -> Any:
    return gathered(value, sharding, used, stored), None


def _gathered_backward(
    sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec, kept: None, gradient: jax.Array
) -> Any:
    return (pinned(sharding.lay(gradient, stored), sharding, stored),)


def pinned(value: jax.Array, sharding: "Sharding", spec: PartitionSpec) -> jax.Array:
    """`value`, laid as `spec`, with its dimensions in memory in the order that they have in its shape."""
    pin = partial(with_layout_constraint, layouts=Layout(tuple(range(value.ndim))))
    return sharding.per_device(pin, spec, spec)(value)


gathered.defvjp(_gathered_forward, _gathered_backward)


def gathered_integers(value: jax.Array, sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    """As `gathered`, of what is quantised and has no gradient."""
    return sharding.lay(pinned(value, sharding, stored), used)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def rounded(
    value: jax.Array, sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec, dtype: str
) -> jax.Array:
    """As `gathered`, of `value` rounded to `dtype`, but in the dtype in which its gradient is to be summed: what
    travels here is `dtype`, and what comes back is not."""
    value = value.astype(dtype)
    if used != stored:
        value = pinned(value, sharding, _at_rest(sharding, used, stored))
    return sharding.lay(value, used).astype(cast(Any, sharding.reduce_dtype))


def _rounded_forward(
    value: jax.Array, sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec, dtype: str
) -> Any:
    # What is kept is an empty array: of the value, the backward pass has to know its dtype alone.
    return rounded(value, sharding, used, stored, dtype), jnp.zeros(0, value.dtype)


def _rounded_backward(
    sharding: "Sharding", used: PartitionSpec, stored: PartitionSpec, dtype: str, kept: jax.Array, gradient: jax.Array
) -> Any:
    if used != stored:
        gradient = pinned(sharding.lay(gradient, stored), sharding, stored)
    return (gradient.astype(kept.dtype),)


rounded.defvjp(_rounded_forward, _rounded_backward)


@jax.custom_vjp
def matmul_summed_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ in the dtype of x. The weight comes in the wider dtype in which its gradient is to be summed: the compiler
    sums over devices what a matmul gives on each, before any cast that follows."""
    return matmul(x, weight.astype(x.dtype))


def _matmul_summed_wide_forward(x: jax.Array, weight: jax.Array) -> Any:
    narrow = weight.astype(x.dtype)
    return matmul(x, narrow), (x, narrow, jnp.zeros(0, weight.dtype))


def _matmul_summed_wide_backward(kept: Any, gradient: jax.Array) -> Any:
    x, weight, wide = kept
    of_weight = jnp.einsum("...o,...i->oi", gradient, x, preferred_element_type=wide.dtype)
    return jnp.einsum("...o,oi->...i", gradient, weight), of_weight


matmul_summed_wide.defvjp(_matmul_summed_wide_forward, _matmul_summed_wide_backward)


@jax.custom_vjp
def matmul_turning_less(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ, for CPUs. Their matmul takes its left operand row by row, so of the two that make the weight's gradient one
    is turned around in memory first, together with all that leads to it: here it is the narrower of them."""
    return matmul(x, weight)


def _matmul_turning_less_forward(x: jax.Array, weight: jax.Array) -> Any:
    return matmul(x, weight), (x, weight)


def _matmul_turning_less_backward(kept: Any, gradient: jax.Array) -> Any:
    x, weight = kept
    if x.shape[-1] <= gradient.shape[-1]:
        of_weight = jnp.einsum("...i,...o->io", x, gradient).T
    else:
        of_weight = jnp.einsum("...o,...i->oi", gradient, x)
    return jnp.einsum("...o,oi->...i", gradient, weight), of_weight


matmul_turning_less.defvjp(_matmul_turning_less_forward, _matmul_turning_less_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def take(table: jax.Array, tokens: jax.Array, rows: int) -> jax.Array:
    """The rows of `tokens`. A row's gradient is summed in float32: thousands of tokens may share one."""
    return native.take(table, tokens)


def _take_forward(table: jax.Array, tokens: jax.Array, rows: int) -> Any:
    return take(table, tokens, rows), tokens


def _take_backward(rows: int, tokens: jax.Array, gradient: jax.Array) -> Any:
    # The zeros depend on the gradient, or the compiler makes them early and keeps them through the backward pass.
    zero, gradient = jax.lax.optimization_barrier((jnp.float32(0), gradient))
    zeros = jnp.broadcast_to(zero, (rows, gradient.shape[-1]))
    summed = zeros.at[tokens].add(gradient.astype(jnp.float32), mode="clip")
    return summed.astype(gradient.dtype), None


take.defvjp(_take_forward, _take_backward)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    if native.asked_for(x, weight):
        return native.matmul(x, weight)
    return jnp.einsum("...i,oi->...o", x, weight)
