"""One step of training: a jitted function from (state, batch) to (state, metrics), on any mesh.

Where things lie is decided before (`tbjax.training.state`); the step repeats it to the compiler wherever that might
choose otherwise. The same abstract values compile the step for machines that are not there (`tbjax.planner.verify`).

The parts are files of their own: gradients (`gradients`), the optimizer's turn (`update`), what is done about numbers
that are none (`precision`), and what is looked at when there were such (`nonfinite`).
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from tbjax.pipeline.schedule import Schedule
from tbjax.pipeline.training import StageRemat
from tbjax.remat import Remat
from tbjax.sharding import by_path, with_arrays
from tbjax.training import compression as compressing
from tbjax.training.gradients import gradients_of, place_batch
from tbjax.training.per_device import gradients_per_device
from tbjax.training.precision import (
    LossScaling,
    OnNonfinite,
    Precision,
    check_on_nonfinite,
    dtypes,
    next_scale,
    reduction,
    scaling_of,
)
from tbjax.training.rules import Rule
from tbjax.training.state import Batch, Metrics, TrainState, check_state, trainable
from tbjax.training.update import Update, apply, check_offload, lay, norm_of


def make_step(
    optimizer: optax.GradientTransformation,
    *,
    precision: Precision = "mixed",
    remat: StageRemat | Remat | str = "full",
    microbatches: int = 1,
    schedule: Schedule | None = None,
    z_loss: float = 0.0,
    reduce_dtype: str | None = None,
    offload: Iterable[str] = (),
    frozen: Rule | None = None,
    on_nonfinite: OnNonfinite = "keep",
    loss_scaling: LossScaling | None = None,
    compression: compressing.Asked = None,
) -> jax.stages.Wrapped:
    """The step, jitted; it takes the state's memory for the next state.

    `remat` says what the backward pass computes again (`tbjax.remat`). `schedule` is for meshes with pp > 1 (default:
    1F1B), and so is remat="stage", which keeps the least: the input of a stage.

    `reduce_dtype` is that in which gradients are summed, over devices and over microbatches. By default devices sum
    what the matmuls give, and microbatches are summed in the parameters' dtype.

    `offload` names what lies in the host's memory: "optimizer" and "parameters", which then come to the device layer by
    layer, and "activations": what `remat` keeps. `frozen` parameters get neither a gradient nor optimizer state.

    A step whose loss or gradients are not finite is applied all the same ("keep"), leaves parameters and optimizer
    state as they were ("skip"), or does that and so does every step that follows ("stop"): whoever reads
    `Metrics.finite` then finds the state as it was before. In float16 a step that overflows is left out in any case.

    `compression` is how gradients are summed over dp by sending less than all of them: "top-k:0.01", "random-k:0.1",
    "int8" or a value of `tbjax.training.compression`. Microbatches are summed before anything is sent.
    """
    _, dtype = dtypes(precision)
    over_devices, over_microbatches = reduction(precision, reduce_dtype)
    offload, scaling = tuple(offload), scaling_of(precision, loss_scaling)
    check_on_nonfinite(on_nonfinite)
    check_offload(offload, optimizer)
    compress = compressing.parse(compression)
    if "activations" in offload:
        remat = Remat.parse(remat).offloading()
    layerwise = "optimizer" in offload or "parameters" in offload

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        model = state.model
        check_state(state, precision, on_nonfinite, offload)
        batch = place_batch(batch, model.sharding)
        values, scale = trainable(model, frozen), state.loss_scale
        compressing.check(compress, model, offload)
        compressing.check_residual(compress, state.residual)
        find = gradients_of if compress is None else gradients_per_device
        loss, gradients, targets = find(
            model,
            batch,
            dtype=dtype,
            remat=remat,
            microbatches=microbatches,
            schedule=schedule,
            z_loss=z_loss,
            over_devices=over_devices,
            over_microbatches=over_microbatches,
            trained=values.keys(),
            scale=None if scale is None else scale.value,
        )
        residual, all_finite = None, True
        if compress is not None:
            gradients, residual, all_finite = compressing.reduced(
                compress, model, gradients, state.residual, state.step
            )
        gradients = lay(gradients, model, model.sharding.strategy.cuts_optimizer)
        norm = norm_of(gradients, model)
        loss_finite = jnp.isfinite(loss)
        finite = well = loss_finite & jnp.isfinite(norm) & all_finite
        if scale is not None and scaling is not None:
            # A gradient that overflows is the scale's fault, as long as there is a smaller one.
            well = finite | (loss_finite & (scale.value > scaling.lowest))
        stopped = None if state.stopped is None else state.stopped | ~well
        applies = finite if stopped is None else finite & ~stopped
        guarded = on_nonfinite != "keep" or scale is not None
        update = Update(optimizer, model, norm, applies if guarded else None)
        values, optimizer_state = apply(update, gradients, state.optimizer, values, layerwise=layerwise)
        if guarded:
            residual = jax.tree.map(lambda old, new: jnp.where(applies, new, old), state.residual, residual)
        if scale is not None and scaling is not None:
            scale = next_scale(scale, finite, scaling)
        following = TrainState(
            with_arrays(model, by_path(model) | values),
            optimizer_state,
            state.step + (1 if stopped is None else jnp.where(stopped, 0, 1)),
            scale,
            stopped,
            residual,
        )
        metrics = Metrics(
            loss,
            norm,
            targets,
            finite=well if stopped is None else ~stopped,
            skipped=~applies if guarded else jnp.zeros((), bool),
            loss_scale=None if state.loss_scale is None else state.loss_scale.value,
        )
        return following, metrics

    return jax.jit(step, donate_argnums=0)
