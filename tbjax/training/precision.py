"""In which numbers a step computes, and what it does about those that are none.

    mixed      float32 parameters and optimizer state, bfloat16 matmuls and activations
    bfloat16   bfloat16 for all
    float32    float32 for all
    float16    as mixed, with float16: small gradients vanish in it, so the loss is scaled up and gradients down again

The scale of float16 is sought while training: it doubles after so many good steps, and where a gradient overflows it
halves and the step is left out. It is part of the state, and of every checkpoint.

Whether a step was finite is decided on the device, where all processes see the same, and from two numbers that it has
anyway: the loss, and the norm of all gradients together.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp

Precision: TypeAlias = Literal["mixed", "bfloat16", "float32", "float16"]
OnNonfinite: TypeAlias = Literal["keep", "skip", "stop"]

# The dtype of parameters, gradients and optimizer state, and that of matmuls and activations.
DTYPES = {
    "mixed": (jnp.float32, jnp.bfloat16),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float32": (jnp.float32, jnp.float32),
    "float16": (jnp.float32, jnp.float16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaling:
    """How the scale of float16's loss is sought. The defaults are PyTorch's (`torch.amp.GradScaler`)."""

    initial: float = 2.0**16
    growth_interval: int = 2000  # good steps in a row, after which the scale doubles
    factor: float = 2.0
    lowest: float = 1.0  # below it no scale is sought: gradients that overflow even so are not the scale's fault

    def __post_init__(self) -> None:
        if self.growth_interval < 1:
            raise ValueError(f"LossScaling.growth_interval={self.growth_interval}: at least one good step is needed.")
        if self.factor <= 1:
            raise ValueError(f"LossScaling.factor={self.factor}: a scale grows by a factor above one.")
        if not 0 < self.lowest <= self.initial:
            raise ValueError(f"LossScaling.initial={self.initial} must not be below lowest={self.lowest}, nor that 0.")


class LossScale(NamedTuple):
    """The scale, as it stands."""

    value: Any  # float32
    good_steps: Any  # int32, since it last changed


def first_scale(scaling: LossScaling) -> LossScale:
    return LossScale(jnp.float32(scaling.initial), jnp.int32(0))


def next_scale(scale: LossScale, finite: jax.Array, scaling: LossScaling) -> LossScale:
    """The scale for the next step, given whether this one was finite."""
    good = jnp.where(finite, scale.good_steps + 1, 0)
    grows = good >= scaling.growth_interval
    larger, smaller = scale.value * scaling.factor, jnp.maximum(scale.value / scaling.factor, scaling.lowest)
    # Not beyond what float32 holds: a model whose gradients vanish would otherwise have them multiplied by infinity.
    larger = jnp.where(jnp.isfinite(larger), larger, scale.value)
    value = jnp.where(finite, jnp.where(grows, larger, scale.value), smaller)
    return LossScale(value, jnp.where(grows, 0, good))


def dtypes(precision: Precision) -> tuple[Any, Any]:
    """The dtypes of parameters and of matmuls."""
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is unknown: tbjax knows {', '.join(map(repr, DTYPES))}.")
    return DTYPES[precision]


def scaling_of(precision: Precision, asked: LossScaling | None) -> LossScaling | None:
    """How the loss is scaled: in float16, and there alone."""
    if precision == "float16":
        return LossScaling() if asked is None else asked
    if asked is not None:
        raise ValueError(f"loss_scaling is for precision='float16': {precision!r} needs none.")
    return None


def check_on_nonfinite(on_nonfinite: OnNonfinite) -> None:
    if on_nonfinite not in get_args(OnNonfinite):
        known = ", ".join(map(repr, get_args(OnNonfinite)))
        raise ValueError(f"on_nonfinite={on_nonfinite!r} is unknown: tbjax knows {known}.")


def reduction(precision: Precision, asked: str | None) -> tuple[str | None, Any]:
    """In which dtype gradients are summed over devices (None: that of the matmuls) and over microbatches.

    Unless told otherwise the first is what the matmuls give and the second is the parameters' own.
    """
    kept, computed = dtypes(precision)
    if asked is None:
        return None, kept
    allowed = dict.fromkeys(("float32", jnp.dtype(computed).name))
    if asked not in allowed:
        raise ValueError(
            f"reduce_dtype={asked!r}: with precision={precision!r} gradients can be summed in "
            f"{' or '.join(map(repr, allowed))}."
        )
    return (asked if asked != jnp.dtype(computed).name else None), jnp.dtype(asked)
