"""The loss of a batch and its gradients, however the batch is walked through.

A batch may be walked through in microbatches, whose gradients are summed. Every token weighs the same whichever
microbatch it is in: each part is divided by the number of targets in the whole batch, not in itself. The routers'
auxiliary loss is the one exception: it balances the load within a microbatch, and is weighted by the microbatch's share
of tokens. With pp the microbatches go through the stages of a pipeline by a schedule (`tbjax.pipeline.execute`); the
loss is the same.

B batch, S sequence, M microbatches.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp

from tbjax.layers.context import to_ring_order
from tbjax.model import Decoder, Hidden
from tbjax.pipeline.execute import pipelined_gradients
from tbjax.pipeline.schedule import OneFOneB, Schedule
from tbjax.pipeline.stages import is_end
from tbjax.pipeline.training import StageRemat
from tbjax.remat import Remat
from tbjax.sharding import Sharding, by_path, on_host, to_device, with_arrays
from tbjax.training.loss import cross_entropy
from tbjax.training.optimizer import Parameters
from tbjax.training.state import Batch
from tbjax.training.update import added, lay


def gradients_of(
    model: Decoder,
    batch: Batch,
    *,
    dtype: Any,
    remat: StageRemat | Remat | str,
    microbatches: int,
    auxiliary: bool = True,
    schedule: Schedule | None = None,
    z_loss: float = 0.0,
    over_devices: str | None = None,
    over_microbatches: Any = None,
    trained: Iterable[str] | None = None,
    scale: jax.Array | None = None,
    targets: jax.Array | None = None,
) -> tuple[jax.Array, Parameters, jax.Array]:
    """The loss (with the routers' auxiliary loss or without), its gradient by path, and the number of targets.

    Gradients are summed in the dtypes `over_devices` (None: that of the matmuls) and `over_microbatches` (None: that of
    the parameters), and are those of the `trained` parameters (None: of all). The loss is multiplied by `scale` on the
    way, and loss and gradients are divided by it in the end. `targets` is their number in the whole, if `batch` is but
    a part (None: it is not).
    """
    check_rows(batch, model.sharding, microbatches)
    every = by_path(model)
    values = every if trained is None else {path: every[path] for path in trained}
    targets = jnp.sum(batch.targets >= 0) if targets is None else targets
    if over_devices is not None:
        model = with_sharding(model, dataclasses.replace(model.sharding, reduce_dtype=over_devices))

    def lay_gradients(gradients: Parameters) -> Parameters:
        return lay(gradients, model, model.sharding.strategy.cuts_gradients)

    def scaled(loss: jax.Array) -> jax.Array:
        return loss if scale is None else loss * scale

    def unscaled(total: jax.Array, gradients: Parameters) -> tuple[jax.Array, Parameters, jax.Array]:
        if (divisor := scale) is not None:
            total, gradients = jax.tree.map(lambda a: a / divisor.astype(a.dtype), (total, gradients))
        return total, gradients, targets

    if model.sharding.size("pp") > 1:
        total, found = pipelined_gradients(
            model,
            batch,
            lambda model, hidden, part, whole: scaled(
                loss_of_hidden(model, hidden, part, jnp.sum(whole.targets >= 0), auxiliary=auxiliary, z_loss=z_loss)
            ),
            schedule=schedule or OneFOneB(),
            microbatches=microbatches,
            dtype=dtype,
            remat=_of_stages(remat),
        )
        gradients = by_path(found)
        return unscaled(total, lay_gradients({path: gradients[path] for path in values}))
    if remat == "stage":
        raise ValueError("remat='stage' keeps the input of a pipeline stage: it is for meshes with pp > 1.")

    def loss(values: Parameters, part: Batch) -> jax.Array:
        running = with_arrays(model, every | values)
        return scaled(loss_of(running, part, targets, dtype=dtype, remat=remat, auxiliary=auxiliary, z_loss=z_loss))

    if microbatches == 1:
        total, gradients = jax.value_and_grad(loss)(values, batch)
        return unscaled(total, lay_gradients(gradients))

    def add(carry: tuple[jax.Array, Parameters], part: Batch) -> tuple[tuple[jax.Array, Parameters], None]:
        total, gradients = jax.value_and_grad(loss)(values, place_batch(part, model.sharding))
        return (carry[0] + total, lay_gradients(added(carry[1], lay_gradients(gradients), model))), None

    # Row b goes to microbatch b % M, so that a device's rows of every microbatch are rows that it has.
    parts = jax.tree.map(lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)
    if any(map(on_host, values.values())):
        # Zeros would have to be made on the device: sums in the host's memory begin with the first microbatch.
        first, parts = jax.tree.map(lambda a: a[0], parts), jax.tree.map(lambda a: a[1:], parts)
        begin = jax.value_and_grad(loss)(values, place_batch(first, model.sharding))
    else:
        zeros = jax.tree.map(lambda a: jnp.zeros_like(a, over_microbatches), values)
        begin = jnp.float32(0), lay_gradients(zeros)
    (total, gradients), _ = jax.lax.scan(add, begin, parts)
    return unscaled(total, gradients)


def loss_of(
    model: Decoder,
    batch: Batch,
    targets: jax.Array,
    *,
    dtype: Any,
    remat: Remat | str | None,
    auxiliary: bool = True,
    z_loss: float = 0.0,
) -> jax.Array:
    """The part of the loss that `batch` has in a whole of so many `targets`."""
    model = ends_on_device(model)
    given = batch.tokens, batch.mask, batch.positions
    hidden = model.hidden(*given, segments=batch.segments, dtype=dtype, remat=remat, ring_order=True)
    laid = batch._replace(targets=to_ring_order(batch.targets, model.sharding))
    return loss_of_hidden(model, hidden, laid, targets, auxiliary=auxiliary, z_loss=z_loss)


def loss_of_hidden(
    model: Decoder, hidden: Hidden, batch: Batch, targets: jax.Array, *, auxiliary: bool = True, z_loss: float = 0.0
) -> jax.Array:
    """As `loss_of`, from the hidden states."""
    loss = cross_entropy(model, hidden.states, batch.targets, z_loss=z_loss) / jnp.maximum(targets, 1)
    if auxiliary and hidden.auxiliary_loss is not None:
        share = jnp.sum(batch.targets >= 0) / jnp.maximum(targets, 1)
        loss += model.config.experts.auxiliary_loss_weight * share * hidden.auxiliary_loss
    return loss


def ends_on_device(model: Decoder) -> Decoder:
    """The model with what belongs to no layer on the device; layers come when it is their turn."""
    values = by_path(model)
    return with_arrays(model, {**values, **to_device({p: a for p, a in values.items() if is_end(p)})})


def check_rows(batch: Batch, sharding: Sharding, microbatches: int) -> None:
    """Raise unless every device gets as many sequences of every microbatch."""
    rows, devices = batch.tokens.shape[0], sharding.size("dp", "fsdp", "ep")
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches}: a batch is computed in one or more.")
    if rows % (microbatches * devices):
        raise ValueError(
            f"a batch of {rows} sequences does not divide over dp*fsdp*ep={devices} devices in {microbatches} "
            "microbatches."
        )


def place_batch(batch: Batch, sharding: Sharding) -> Batch:
    return jax.tree.map(lambda a: sharding.constrain(a, "batch", "sequence"), batch)


def with_sharding(model: Decoder, sharding: Sharding) -> Decoder:
    """The same parameters in a model that is laid out by another `Sharding`."""
    other = jax.eval_shape(lambda: Decoder(model.config, sharding, dtype=model.dtype, scan=model.scan))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


def _of_stages(remat: StageRemat | Remat | str) -> StageRemat:
    """The policy as a pipeline takes it, which knows those that are one word."""
    word = remat if remat == "stage" else Remat.parse(remat).word
    if word is None:
        raise ValueError(
            f"remat={str(remat)!r}: with pp > 1 the policies are 'none', 'dots', 'full' and 'stage', for all layers."
        )
    return cast(StageRemat, word)
