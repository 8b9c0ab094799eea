"""Pipelines as PyTorch libraries spell them: stages made from a model's layers, and a scheduler that runs them.

    config = PipelineParallelConfig(num_stages=4, num_micro_batches=8)
    stages = create_pipeline_stages(model, config)
    scheduler = InterleavedScheduler(stages, config)
    total_loss = scheduler.run_forward_backward(split_batch(tokens, num_micro_batches=8), loss_fn)
    scheduler.gradients  # by the parameters' paths, where PyTorch would have put them on the parameters

There a process runs one stage; here one program runs all, so `stage_id` is checked and otherwise without effect. A
scheduler lays the model over its stages once, when it is made. `loss_fn` is traced by JAX: it takes the logits of a
microbatch, and the microbatch too if it has a second parameter.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbjax import rows
from tbjax.compat.devices import device as device_of
from tbjax.config import Group
from tbjax.cut import cut
from tbjax.mesh import make_mesh
from tbjax.model import Decoder, Hidden
from tbjax.pipeline.execute import pipelined_gradients
from tbjax.pipeline.schedule import GPipe, Interleaved1F1B, OneFOneB, Schedule
from tbjax.planner.estimates import estimate_pipeline_memory as estimate_pipeline_memory  # one of the names
from tbjax.sharding import Sharding, leaves
from tbjax.views import Layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineParallelConfig:
    """How many stages, how many microbatches a step has, and whether layers are run again in the backward pass."""

    num_stages: int
    num_micro_batches: int
    stage_id: int = 0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("num_stages", "num_micro_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"PipelineParallelConfig.{name} must be a positive integer, not {value!r}.")
        if self.stage_id not in range(self.num_stages):
            raise ValueError(
                f"PipelineParallelConfig.stage_id={self.stage_id!r} is none of num_stages={self.num_stages}: they "
                f"count from 0 to {self.num_stages - 1}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """Layers that follow each other (`model.layers[8:16]`), and the device that runs them.

    A device is JAX's own, or a text such as "cuda:1": of whatever kind JAX has here, the one with that number.
    """

    layers: Layers
    device: Any

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Layers) or not self.layers or self.layers.numbers.step != 1:
            raise ValueError(f"PipelineStage.layers={self.layers!r}: a slice of `model.layers` without gaps is needed.")
        object.__setattr__(self, "device", device_of(self.device))


def create_pipeline_stages(model: Decoder, config: PipelineParallelConfig) -> list[PipelineStage]:
    """The model's layers in `num_stages` stages, as equal as can be, each on a device of its own.

    A model that lies over that many stages already stays where it is, with whatever its mesh has inside of them.
    """
    group = _group(model)
    shares = cut(group.repeats, config.num_stages)
    devices = _first_devices(model)
    if len(devices) != config.num_stages:
        devices = list(model.mesh.devices.flat)
        devices += [device for device in jax.devices() if device not in devices]
    if len(devices) < config.num_stages:
        raise ValueError(f"num_stages={config.num_stages} needs as many devices, but there are {len(devices)}.")
    width = len(group.pattern)
    return [
        PipelineStage(layers=model.layers[run.first * width : (run.first + run.length) * width], device=device)
        for run, device in zip(shares.pieces, devices, strict=False)
    ]


def split_batch(batch: Any, num_micro_batches: int) -> list[Any]:
    """A batch (an array, or a tree of them) as so many equal parts of its rows."""
    whole, *others = [len(a) for a in jax.tree.leaves(batch)]
    if any(other != whole for other in others) or whole % num_micro_batches:
        raise ValueError(f"{[whole, *others]} rows do not divide into num_micro_batches={num_micro_batches}.")
    share = whole // num_micro_batches
    return [jax.tree.map(lambda a, m=m: a[m * share : (m + 1) * share], batch) for m in range(num_micro_batches)]


class _Scheduler:
    """Stages, and the schedule by which they are run."""

    def __init__(self, stages: Sequence[PipelineStage], config: PipelineParallelConfig, schedule: Schedule) -> None:
        if len(stages) != config.num_stages:
            raise ValueError(f"there are {len(stages)} stages, but the config says num_stages={config.num_stages}.")
        self.config = config
        self.schedule = schedule
        self.model = _laid_over(stages)
        self.gradients: dict[str, jax.Array] | None = None

    def run_forward_backward(self, micro_batches: Sequence[Any], loss_fn: Callable[..., jax.Array]) -> jax.Array:
        """The mean of the microbatches' losses; its gradients are then in `gradients`.

        A microbatch is token ids [B, S], or a tree of arrays with `tokens` or `input_ids` in it, or with them first.
        """
        if len(micro_batches) != self.config.num_micro_batches:
            raise ValueError(
                f"there are {len(micro_batches)} microbatches, but the config says "
                f"num_micro_batches={self.config.num_micro_batches}."
            )
        # Row b of a batch belongs to microbatch b % M.
        interleaved = jax.tree.map(lambda *parts: jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:]), *micro_batches)
        remat = "full" if self.config.activation_checkpointing else "none"
        total, found = _run(self.model, interleaved, loss_fn, self.schedule, len(micro_batches), remat)
        self.gradients = dict(zip((leaf.path for leaf in leaves(found)), jax.tree.leaves(found), strict=True))
        return total


class GPipeScheduler(_Scheduler):
    """All forwards, then all backwards."""

    def __init__(self, stages: Sequence[PipelineStage], config: PipelineParallelConfig) -> None:
        super().__init__(stages, config, GPipe())


class InterleavedScheduler(_Scheduler):
    """Forwards and backwards in turn (1F1B), over one chunk of layers a stage or several."""

    def __init__(self, stages: Sequence[PipelineStage], config: PipelineParallelConfig, chunks: int = 1) -> None:
        super().__init__(stages, config, OneFOneB() if chunks == 1 else Interleaved1F1B(chunks))


class _Part(NamedTuple):
    """A microbatch for the stages (see `Tokens`), and as the user gave it."""

    tokens: Any
    given: Any
    mask: Any = None
    positions: Any = None
    segments: Any = None


@functools.partial(jax.jit, static_argnames=("loss_fn", "schedule", "microbatches", "remat"))
def _run(
    model: Decoder, batch: Any, loss_fn: Callable[..., jax.Array], schedule: Schedule, microbatches: int, remat: Any
) -> tuple[jax.Array, Decoder]:
    takes_batch = len(inspect.signature(loss_fn).parameters) > 1

    def loss(model: Decoder, hidden: Hidden, part: _Part, whole: _Part) -> jax.Array:
        output = model.logits(hidden.states)
        return (loss_fn(output, part.given) if takes_batch else loss_fn(output)).astype(jnp.float32) / microbatches

    whole = _Part(jnp.asarray(_tokens(batch)), batch, **_surroundings(batch))
    return pipelined_gradients(model, whole, loss, schedule=schedule, microbatches=microbatches, remat=remat)


def _surroundings(batch: Any) -> dict[str, Any]:
    """What a microbatch says of its tokens, under Hugging Face's names or ours."""
    names = {"attention_mask": "mask", "mask": "mask", "position_ids": "positions"}
    names |= {"positions": "positions", "segments": "segments"}
    given = batch if isinstance(batch, Mapping) else {}
    return {ours: jnp.asarray(given[name]) for name, ours in names.items() if name in given}


def _tokens(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        for name in ("tokens", "input_ids"):
            if name in batch:
                return batch[name]
        raise ValueError(f"a microbatch with {', '.join(map(repr, batch))} has neither 'tokens' nor 'input_ids'.")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _laid_over(stages: Sequence[PipelineStage]) -> Decoder:
    """The model of the stages, each of its layers on its stage's device."""
    model = stages[0].layers.model
    group = _group(model)
    numbers = [number for stage in stages for number in stage.layers.numbers]
    if any(stage.layers.model is not model for stage in stages) or numbers != [*range(model.config.layers)]:
        raise ValueError(
            f"the stages hold {', '.join(str(stage.layers) for stage in stages)}: together they must be all layers of "
            "one model, each once and in order."
        )
    width = len(group.pattern)
    counts = [len(stage.layers) for stage in stages]
    if any(count % width for count in counts):
        raise ValueError(f"stages of {counts} layers: this model repeats a pattern of {width}, which is not cut.")
    wanted = cut(group.repeats, len(stages), counts=[count // width for count in counts])
    devices = [stage.device for stage in stages]
    if devices == _first_devices(model) and model.sharding.stack(group.repeats) == wanted:
        return model
    if len({*devices}) < len(devices):
        raise ValueError(f"the stages lie on {', '.join(map(str, devices))}: each needs a device of its own.")
    return rows.moved(model, Sharding(make_mesh({"pp": len(stages)}, devices), cut=wanted))


def _first_devices(model: Decoder) -> list[Any]:
    """Of each stage that the model lies on already, the first device."""
    axis = model.mesh.axis_names.index("pp")
    return list(np.moveaxis(model.mesh.devices, axis, 0).reshape(model.sharding.size("pp"), -1)[:, 0])


def _group(model: Decoder) -> Group:
    group, *others = model.config.groups
    if others:
        raise ValueError(
            f"the {model.config.layers} layers of this model follow no single pattern, but {1 + len(others)} one after "
            "the other: a pipeline cuts one."
        )
    return group
