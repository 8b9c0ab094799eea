"""What the backward pass keeps of each layer's forward pass, and what it computes again.

    none   keeps every intermediate value
    dots   keeps what matmuls with weights gave, and computes what lies between them again
    full   keeps the layer's input alone, and runs the layer again

Under no policy is a gathered weight kept: with FSDP that would keep the whole model on every device, so weights are
gathered a second time. A gathered weight is a cast and a relayout of a stored one, and so all casts and relayouts are
among what is computed again; others of them cost next to nothing. Nor are attention's scores ever kept: its backward
pass is its own (`tbjax.layers.attend`).
"""

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import jax

Remat: TypeAlias = Literal["none", "dots", "full"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# How a weight becomes what a matmul takes, by the names of JAX's primitives.
CASTS_AND_RELAYOUTS = ("convert_element_type", "sharding_constraint", "layout_constraint")

# The parameters by which primitives hold the functions that they call.
CALLED = ("call_jaxpr", "jaxpr")


def rematerialised(layer: Callable[Arguments, Result], remat: Remat | None) -> Callable[Arguments, Result]:
    """`layer`, with the policy for its backward pass (None where there is no backward pass)."""
    if remat is None:
        return layer
    policies = {
        "none": _all_but_casts_and_relayouts,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    if remat not in policies:
        raise ValueError(f"remat={remat!r} is unknown: tbjax knows {', '.join(map(repr, policies))}.")
    # Inside a scan XLA cannot merge the second computation with the first, so it need not be prevented from it.
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)


def _all_but_casts_and_relayouts(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return not _is_cast_or_relayout(primitive, parameters)


def _is_cast_or_relayout(primitive: Any, parameters: dict[str, Any]) -> bool:
    """Whether a primitive is one of them, or calls nothing else."""
    called = next((parameters[name] for name in CALLED if name in parameters), None)
    if called is None:
        return primitive.name in CASTS_AND_RELAYOUTS
    equations = getattr(called, "jaxpr", called).eqns
    return bool(equations) and all(_is_cast_or_relayout(equation.primitive, equation.params) for equation in equations)
