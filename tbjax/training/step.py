"""One step of training: a jitted function from (state, batch) to (state, metrics), on any mesh.

Everything about where things lie is decided before the step exists: `abstract_state` says it for parameters and
optimizer state, the strategy says it for gradients, and the step repeats it to the compiler wherever it might choose
otherwise. The same abstract values compile the step for machines that are not there (`tbjax.planner.verify`).

A batch may be walked through in microbatches, whose gradients are summed. Every token weighs the same whichever
microbatch it is in: each part is divided by the number of targets in the whole batch, not in itself. The routers'
auxiliary loss is the one exception: it balances the load within a microbatch, and is weighted by the microbatch's share
of tokens. With pp the microbatches go through the stages of a pipeline by a schedule (`tbjax.pipeline.execute`); the
loss is the same.

B batch, S sequence, M microbatches.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.config import ModelConfig
from tbjax.layers.context import to_ring_order
from tbjax.model import Decoder, Hidden
from tbjax.pipeline.execute import pipelined_gradients
from tbjax.pipeline.schedule import OneFOneB, Schedule
from tbjax.pipeline.training import StageRemat
from tbjax.remat import Remat
from tbjax.sharding import Sharding, leaves
from tbjax.training.loss import cross_entropy
from tbjax.training.optimizer import Parameters, as_dict, place_state, with_parameters

Precision: TypeAlias = Literal["mixed", "bfloat16", "float32"]

# The dtype of parameters, gradients and optimizer state, and that of matmuls and activations.
DTYPES = {
    "mixed": (jnp.float32, jnp.bfloat16),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "float32": (jnp.float32, jnp.float32),
}


class TrainState(NamedTuple):
    """What a step turns into the next."""

    model: Decoder
    optimizer: Any  # optax's state, over the parameters by path
    step: Any


class Batch(NamedTuple):
    """What a step learns from: integer arrays, or their shapes."""

    tokens: Any  # [B, S]
    targets: Any  # [B, S] the token that follows each; negative (IGNORED) where there is nothing to learn
    mask: Any = None  # [B, S] 1 where a real token stands; None: everywhere
    positions: Any = (
        None  # [B, S] of each token; None: counted, from the start of its document where there are segments
    )
    segments: Any = None  # [B, S] which of the documents packed in a row (1, 2, ...) a token belongs to; 0: padding


class Metrics(NamedTuple):
    """What a step reports, as arrays that are still being computed: reading one waits for the step."""

    loss: jax.Array  # mean over targets, with the auxiliary loss
    gradient_norm: jax.Array
    targets: jax.Array  # how many there were


def abstract_state(
    config: ModelConfig,
    sharding: Sharding,
    optimizer: Callable[[Decoder], optax.GradientTransformation],
    *,
    precision: Precision = "mixed",
) -> TrainState:
    """The shape, dtype and place of everything that a step holds on to; `optimizer` makes one for an abstract model."""
    parameter_dtype, _ = _dtypes(precision)
    model = sharding.place(jax.eval_shape(lambda: Decoder(config, sharding, dtype=parameter_dtype)))
    state = place_state(jax.eval_shape(optimizer(model).init, as_dict(model)), model, sharding)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return TrainState(model, state, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated))


def init_state(model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with the optimizer's born where it is to lie."""
    values = as_dict(model)
    placed = place_state(jax.eval_shape(optimizer.init, values), model, model.sharding)
    state = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda a: a.sharding, placed))(values)
    step = jax.device_put(jnp.int32(0), NamedSharding(model.sharding.mesh, PartitionSpec()))
    return TrainState(model, state, step)


def abstract_batch(
    rows: int, sequence: int, sharding: Sharding, *, mask: bool = False, segments: bool = False
) -> Batch:
    """The shape and place of a batch of `rows` sequences of `sequence` tokens."""
    spec = sharding.activation(("batch", "sequence"), (rows, sequence))
    array = jax.ShapeDtypeStruct((rows, sequence), jnp.int32, sharding=NamedSharding(sharding.mesh, spec))
    return Batch(array, array, array if mask else None, None, array if segments else None)


def make_step(
    optimizer: optax.GradientTransformation,
    *,
    precision: Precision = "mixed",
    remat: StageRemat = "full",
    microbatches: int = 1,
    schedule: Schedule | None = None,
) -> jax.stages.Wrapped:
    """The step, jitted; it takes the state's memory for the next state.

    `schedule` is for meshes with pp > 1 (default: 1F1B), and so is remat="stage", which keeps the least: the input of a
    stage.
    """
    _, dtype = _dtypes(precision)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        model = state.model
        batch = place_batch(batch, model.sharding)
        loss, gradients, targets = gradients_of(
            model, batch, dtype=dtype, remat=remat, microbatches=microbatches, schedule=schedule
        )
        values = as_dict(model)
        # The optimizer works where its state lies, on the parts of parameters and gradients that belong there.
        values, gradients = (_lay(tree, model, model.sharding.strategy.cuts_optimizer) for tree in (values, gradients))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, values)
        optimizer_state = _lay_state(optimizer_state, model)
        values = _lay(optax.apply_updates(values, updates), model, model.sharding.strategy.cuts_parameters)
        metrics = Metrics(loss, optax.tree.norm(gradients), targets)
        return TrainState(with_parameters(model, values), optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def gradients_of(
    model: Decoder,
    batch: Batch,
    *,
    dtype: Any,
    remat: StageRemat,
    microbatches: int,
    auxiliary: bool = True,
    schedule: Schedule | None = None,
) -> tuple[jax.Array, Parameters, jax.Array]:
    """The loss (with the routers' auxiliary loss or without), its gradient by path, and the number of targets."""
    if batch.tokens.shape[0] % (microbatches * model.sharding.size("dp", "fsdp", "ep")):
        raise ValueError(
            f"a batch of {batch.tokens.shape[0]} sequences does not divide over "
            f"dp*fsdp*ep={model.sharding.size('dp', 'fsdp', 'ep')} devices in {microbatches} microbatches."
        )
    targets = jnp.sum(batch.targets >= 0)

    def lay(gradients: Parameters) -> Parameters:
        return _lay(gradients, model, model.sharding.strategy.cuts_gradients)

    if model.sharding.size("pp") > 1:
        total, found = pipelined_gradients(
            model,
            batch,
            lambda model, hidden, part, whole: loss_of_hidden(
                model, hidden, part, jnp.sum(whole.targets >= 0), auxiliary=auxiliary
            ),
            schedule=schedule or OneFOneB(),
            microbatches=microbatches,
            dtype=dtype,
            remat=remat,
        )
        return total, lay(as_dict(found)), targets
    if remat == "stage":
        raise ValueError("remat='stage' keeps the input of a pipeline stage: it is for meshes with pp > 1.")

    def loss(values: Parameters, part: Batch) -> jax.Array:
        return loss_of(with_parameters(model, values), part, targets, dtype=dtype, remat=remat, auxiliary=auxiliary)

    values = as_dict(model)
    if microbatches == 1:
        total, gradients = jax.value_and_grad(loss)(values, batch)
        return total, lay(gradients), targets

    def add(carry: tuple[jax.Array, Parameters], part: Batch) -> tuple[tuple[jax.Array, Parameters], None]:
        total, gradients = jax.value_and_grad(loss)(values, place_batch(part, model.sharding))
        return (carry[0] + total, lay(jax.tree.map(jnp.add, carry[1], lay(gradients)))), None

    zero = jnp.float32(0), lay(jax.tree.map(jnp.zeros_like, values))
    # Row b goes to microbatch b % M, so that a device's rows of every microbatch are rows that it has.
    parts = jax.tree.map(lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)
    (total, gradients), _ = jax.lax.scan(add, zero, parts)
    return total, gradients, targets


def loss_of(
    model: Decoder, batch: Batch, targets: jax.Array, *, dtype: Any, remat: Remat | None, auxiliary: bool = True
) -> jax.Array:
    """The part of the loss that `batch` has in a whole of so many `targets`."""
    given = batch.tokens, batch.mask, batch.positions
    hidden = model.hidden(*given, segments=batch.segments, dtype=dtype, remat=remat, ring_order=True)
    laid = batch._replace(targets=to_ring_order(batch.targets, model.sharding))
    return loss_of_hidden(model, hidden, laid, targets, auxiliary=auxiliary)


def loss_of_hidden(
    model: Decoder, hidden: Hidden, batch: Batch, targets: jax.Array, *, auxiliary: bool = True
) -> jax.Array:
    """As `loss_of`, from the hidden states."""
    loss = cross_entropy(model, hidden.states, batch.targets) / jnp.maximum(targets, 1)
    if auxiliary and hidden.auxiliary_loss is not None:
        share = jnp.sum(batch.targets >= 0) / jnp.maximum(targets, 1)
        loss += model.config.experts.auxiliary_loss_weight * share * hidden.auxiliary_loss
    return loss


def place_batch(batch: Batch, sharding: Sharding) -> Batch:
    return jax.tree.map(lambda a: sharding.constrain(a, "batch", "sequence"), batch)


def _lay(values: Any, model: Decoder, cut: bool) -> Parameters:
    """Values by path, constrained to lie like the parameters that they belong to, cut over the data axes or not."""
    sharding = model.sharding
    if sharding.mesh.size == 1:
        return values
    return {
        leaf.path: jax.lax.with_sharding_constraint(
            values[leaf.path], sharding.parameter(leaf.dims, leaf.variable.shape, leaf.path, cut=cut)
        )
        for leaf in leaves(model)
    }


def _lay_state(state: Any, model: Decoder) -> Any:
    """The optimizer's state, constrained to lie where it lay."""
    if model.sharding.mesh.size == 1:
        return state
    placed = place_state(state, model, model.sharding)
    return jax.tree.map(lambda a, b: jax.lax.with_sharding_constraint(a, b.sharding), state, placed)


def _dtypes(precision: Precision) -> tuple[Any, Any]:
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is unknown: tbjax knows {', '.join(map(repr, DTYPES))}.")
    return DTYPES[precision]
