"""What a step turns into the next, and what it learns from: the values that go in and out, and where they lie.

Everything about where things lie is decided before a step exists: `abstract_state` says it for parameters and optimizer
state, on devices that need not be there. `init_state` makes the real thing, in the same places.

B batch, S sequence.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.config import ModelConfig
from tbjax.model import Decoder
from tbjax.quantize.convert import refuse
from tbjax.sharding import Sharding, by_path, leaves, on_host
from tbjax.training import compression as compressing
from tbjax.training.optimizer import Parameters, in_host, place_state
from tbjax.training.precision import (
    LossScale,
    LossScaling,
    OnNonfinite,
    Precision,
    check_on_nonfinite,
    dtypes,
    first_scale,
    scaling_of,
)
from tbjax.training.rules import Rule, chosen
from tbjax.training.update import check_offload


class TrainState(NamedTuple):
    """What a step turns into the next. All of it belongs into a checkpoint."""

    model: Decoder
    optimizer: Any  # optax's state, over the parameters by path
    step: Any  # how many batches there have been, those that were skipped too
    loss_scale: LossScale | None = None  # in float16
    # Where on_nonfinite="stop": whether that has happened, after which no step changes anything.
    stopped: Any = None
    # With top-k compression: what of its gradients each device has not sent yet, [dp, ...] by path.
    residual: Parameters | None = None


class Batch(NamedTuple):
    """What a step learns from: integer arrays, or their shapes."""

    tokens: Any  # [B, S]
    targets: Any  # [B, S] the token that follows each; negative (IGNORED) where there is nothing to learn
    mask: Any = None  # [B, S] 1 where a real token stands; None: everywhere
    # [B, S] of each token; None: counted, from the start of its document where there are segments
    positions: Any = None
    segments: Any = None  # [B, S] which of the documents packed in a row (1, 2, ...) a token belongs to; 0: padding


class Metrics(NamedTuple):
    """What a step reports, as arrays that are still being computed: reading one waits for the step."""

    loss: jax.Array  # mean over targets, with the auxiliary loss and the z-loss
    gradient_norm: jax.Array
    targets: jax.Array  # how many there were
    finite: (
        jax.Array
    )  # whether loss and gradients were; an overflow that float16's next scale may mend counts as finite
    skipped: jax.Array  # whether the step has left parameters and optimizer state as they were
    loss_scale: jax.Array | None = None  # of this step, in float16


def abstract_state(
    config: ModelConfig,
    sharding: Sharding,
    optimizer: Callable[[Decoder], optax.GradientTransformation],
    *,
    precision: Precision = "mixed",
    offload: Iterable[str] = (),
    frozen: Rule | None = None,
    on_nonfinite: OnNonfinite = "keep",
    loss_scaling: LossScaling | None = None,
    compression: compressing.Asked = None,
) -> TrainState:
    """The shape, dtype and place of everything that a step holds on to; `optimizer` makes one for an abstract model.

    The options are those of `make_step`.
    """
    parameter_dtype, _ = dtypes(precision)
    model = sharding.place(jax.eval_shape(lambda: Decoder(config, sharding, dtype=parameter_dtype)))
    rule, compress = optimizer(model), compressing.parse(compression)
    check_offload(offload, rule)
    compressing.check(compress, model, offload)
    state = _abstract_optimizer_state(model, rule, offload, frozen)
    residual = compressing.abstract_residual(compress, model, trainable(model, frozen))
    if "parameters" in offload:
        model = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=in_host(a.sharding)), model)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    rest = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
        jax.eval_shape(lambda: _rest(precision, on_nonfinite, loss_scaling)),
    )
    return TrainState(model, state, *rest, residual=residual)


def init_state(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    precision: Precision = "mixed",
    offload: Iterable[str] = (),
    frozen: Rule | None = None,
    on_nonfinite: OnNonfinite = "keep",
    loss_scaling: LossScaling | None = None,
    compression: compressing.Asked = None,
) -> TrainState:
    """The state before the first step, with the optimizer's born where it is to lie. Options as of `make_step`."""
    check_dtype(model, precision)
    check_offload(offload, optimizer)
    compress = compressing.parse(compression)
    compressing.check(compress, model, offload)
    residual = compressing.first_residual(compress, model, trainable(model, frozen))
    placed = _abstract_optimizer_state(model, optimizer, offload, frozen)
    state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda a: a.sharding, placed))(trainable(model, frozen))
    if "parameters" in offload:
        model = jax.tree.map(lambda a: jax.device_put(a, in_host(a.sharding)), model)
    replicated = NamedSharding(model.sharding.mesh, PartitionSpec())
    rest = jax.device_put(_rest(precision, on_nonfinite, loss_scaling), replicated)
    return TrainState(model, state, *rest, residual=residual)


def check_dtype(model: Decoder, precision: Precision) -> None:
    """Refuse weights in another dtype than the precision's: small updates of 16-bit weights would vanish unsaid."""
    wanted = jnp.dtype(dtypes(precision)[0])
    if model.dtype != wanted:
        raise ValueError(
            f"precision={precision!r} trains {wanted} weights, but the model's are {model.dtype}: load it with "
            f"dtype={str(wanted)!r}, or ask for another precision."
        )


def check_state(state: TrainState, precision: Precision, on_nonfinite: OnNonfinite, offload: Iterable[str]) -> None:
    """Refuse a state that was made for a step with other options."""
    check_dtype(state.model, precision)
    needed = {
        f"precision={precision!r}": (precision == "float16") == (state.loss_scale is not None),
        f"on_nonfinite={on_nonfinite!r}": (on_nonfinite == "stop") == (state.stopped is not None),
        "offload=('optimizer',)": "optimizer" not in offload
        or any(on_host(array) for array in jax.tree.leaves(state.optimizer)),
        "offload=('parameters',)": "parameters" not in offload
        or all(on_host(array) for array in jax.tree.leaves(state.model)),
    }
    for option, met in needed.items():
        if not met:
            raise ValueError(f"the step has {option}, but the state was made without it: give init_state the same.")


def resumed(state: TrainState) -> TrainState:
    """A state that had stopped, ready to go on."""
    return state if state.stopped is None else state._replace(stopped=jnp.zeros_like(state.stopped))


def abstract_batch(
    rows: int, sequence: int, sharding: Sharding, *, mask: bool = False, segments: bool = False
) -> Batch:
    """The shape and place of a batch of `rows` sequences of `sequence` tokens."""
    spec = sharding.activation(("batch", "sequence"), (rows, sequence))
    array = jax.ShapeDtypeStruct((rows, sequence), jnp.int32, sharding=NamedSharding(sharding.mesh, spec))
    return Batch(array, array, array if mask else None, None, array if segments else None)


def trainable(model: Decoder, frozen: Rule | None) -> Parameters:
    """The parameters that a step trains, by path."""
    refuse(model, "are not trained")
    values = by_path(model)
    left_out = chosen(frozen, (leaf.path for leaf in leaves(model)), "frozen")
    if len(left_out) == len(values):
        raise ValueError(f"frozen={frozen!r} leaves nothing to train: it is about all {len(values)} parameters.")
    return {path: value for path, value in values.items() if path not in left_out}


def _abstract_optimizer_state(
    model: Decoder, optimizer: optax.GradientTransformation, offload: Iterable[str], frozen: Rule | None
) -> Any:
    made = jax.eval_shape(optimizer.init, trainable(model, frozen))
    return place_state(made, model, model.sharding, host="optimizer" in offload)


def _rest(precision: Precision, on_nonfinite: OnNonfinite, loss_scaling: LossScaling | None) -> Any:
    """What a state has besides parameters and the optimizer's, at the start."""
    check_on_nonfinite(on_nonfinite)
    scaling = scaling_of(precision, loss_scaling)
    scale = None if scaling is None else first_scale(scaling)
    return jnp.int32(0), scale, jnp.zeros((), bool) if on_nonfinite == "stop" else None
