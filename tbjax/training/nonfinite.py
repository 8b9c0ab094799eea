"""Where numbers stopped being numbers: the first parameter, layer or gradient of a step that is not finite.

A step only says that something was not. What it was is found by running its parts again, one after the other, with the
state and the batch of that step: the parameters; the forward pass layer by layer; the loss; the gradients, in the order
in which the backward pass makes them. Each part is compiled when those before it were found sound, so nothing of this
costs anything until it is needed.
"""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.layers import context
from tbjax.model import Decoder
from tbjax.pipeline.schedule import Schedule
from tbjax.pipeline.training import StageRemat
from tbjax.remat import Remat
from tbjax.sharding import Leaf, by_path, leaves, to_device
from tbjax.training.gradients import ends_on_device, gradients_of, place_batch
from tbjax.training.precision import Precision, dtypes
from tbjax.training.state import Batch, TrainState

Part: TypeAlias = Literal["parameter", "forward", "loss", "gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nonfinite:
    """What was found first. `str` says it in a sentence."""

    where: Part
    layer: int | None = None  # counted from 0; None: outside of all layers
    path: str | None = None  # of the parameter, or of the gradient's

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" in layer {self.layer}"
        match self.where:
            case "parameter":
                return f"Before the step, the parameter {self.path} was not finite already{layer}."
            case "forward" if self.layer is None:
                return "In the forward pass, the embedding is the first that is not finite."
            case "forward":
                return f"In the forward pass, layer {self.layer} is the first whose output is not finite."
            case "loss":
                return "All layers are finite in the forward pass, and the loss is not."
            case "gradient":
                return f"In the backward pass, the gradient of {self.path}{layer} is the first that is not finite."


def find_nonfinite(
    state: TrainState,
    batch: Batch,
    *,
    precision: Precision = "mixed",
    remat: StageRemat | Remat | str = "full",
    microbatches: int = 1,
    schedule: Schedule | None = None,
) -> Nonfinite | None:
    """The first part of a step from `state` with `batch` that is not finite; None if all of it is.

    The options are those of `make_step`. With pp > 1 the forward pass is not looked at by itself, as its layers are not
    all in one place: what it spoils shows in the gradients.
    """
    model, (_, dtype) = state.model, dtypes(precision)
    # What the host reads lies whole in every process.
    everywhere = NamedSharding(model.sharding.mesh, PartitionSpec())
    unsound = jax.jit(lambda model: _unsound(model, by_path(model)), out_shardings=everywhere)(model)
    for leaf in leaves(model):
        if (rows := np.flatnonzero(unsound[leaf.path])).size:
            return Nonfinite(where="parameter", layer=_layer(model, leaf, rows[0]), path=leaf.path)
    if model.sharding.size("pp") == 1:
        layers = jax.jit(lambda model, batch: _sound_layers(model, batch, dtype), out_shardings=everywhere)
        sound = np.concatenate(jax.device_get(layers(model, batch)))
        if not sound.all():
            first = int(np.argmin(sound))
            return Nonfinite(where="forward", layer=first - 1 if first else None)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def backward(state: TrainState, batch: Batch) -> Any:
        loss, gradients, _ = gradients_of(
            state.model,
            place_batch(batch, state.model.sharding),
            dtype=dtype,
            remat=remat,
            microbatches=microbatches,
            schedule=schedule,
            scale=None if state.loss_scale is None else state.loss_scale.value,
        )
        return jnp.isfinite(loss), _unsound(state.model, gradients)

    loss_is_finite, unsound = backward(state, batch)
    if not loss_is_finite:
        return Nonfinite(where="loss")
    found = []
    for leaf in leaves(model):
        for row in np.flatnonzero(unsound[leaf.path]):
            layer = _layer(model, leaf, row)
            # From the head down: what lies behind the layers, then the last of them, and the embedding in the end.
            behind = -1 if leaf.path.startswith("embedding") else model.config.layers
            found.append((behind if layer is None else layer, leaf.path, layer))
    if not found:
        return None
    _, path, layer = max(found, key=lambda one: one[0])
    return Nonfinite(where="gradient", layer=layer, path=path)


def _unsound(model: Decoder, values: Any) -> dict[str, jax.Array]:
    """By path, for each row of a stack (or for a whole parameter) whether any number in it is not finite."""
    result = {}
    for leaf in leaves(model):
        if leaf.path in values:
            value = to_device(values[leaf.path])
            rows = value.reshape(value.shape[0] if "layers" in leaf.dims else 1, -1)
            result[leaf.path] = ~jnp.all(jnp.isfinite(rows), axis=1)
    return result


def _layer(model: Decoder, leaf: Leaf, row: Any) -> int | None:
    """The layer of a row of a stack: of the parameter `stacks.<group>.<position>...`."""
    if "layers" not in leaf.dims:
        return None
    group, position = map(int, leaf.path.split(".")[1:3])
    pattern, repeats, first = model.config.groups[group]
    repeat = model.sharding.stack(repeats).order[int(row)]
    return first + repeat * len(pattern) + position


def _sound_layers(model: Decoder, batch: Batch, dtype: Any) -> list[jax.Array]:
    """Whether the embedding's output is finite, and each layer's, in order."""
    around = model.surroundings(batch.tokens, batch.mask, batch.positions, segments=batch.segments)
    tokens = batch.tokens
    if context.cuts(model.sharding, tokens.shape[1]):
        tokens = context.to_ring_order(tokens, model.sharding)
    x = ends_on_device(model).start(tokens, dtype)
    sound = [jnp.isfinite(x).all()[None]]
    for group, stack in zip(model.config.groups, model.stacks, strict=True):

        def repeat(x: jax.Array, blocks: Any, pattern: Any = group.pattern) -> tuple[jax.Array, jax.Array]:
            sound = []
            for block, kind in zip(blocks, pattern, strict=True):
                angles = around.window_angles if kind.window else around.angles
                x, *_ = to_device(block)(x, around.keys, angles, around.valid)
                sound.append(jnp.isfinite(x).all())
            return x, jnp.stack(sound)

        x, found = jax.lax.scan(repeat, x, list(stack))
        sound.append(found.reshape(-1))
    return sound
