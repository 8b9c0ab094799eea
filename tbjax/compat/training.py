"""FSDP, model sharding and activation checkpointing as PyTorch libraries spell them.

    manager = AdvancedFSDPManager(sharding_strategy="FULL_SHARD", mixed_precision=True, activation_checkpointing=True)
    model = manager.wrap_model(model)
    checkpointing = SelectiveGradientCheckpointing(model, checkpoint_ratio=0.5)
    tbjax.train(model, data, TrainConfig(steps=1000))

There a wrapper changes how a module runs. Here the model says how it is to be trained (`model.training_defaults`), and
training does so wherever its own config leaves it open. A model that lies on one device is moved to all of them; one
that its mesh already cuts stays on that mesh, and only the strategy is changed.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from tbjax.api import CausalLM
from tbjax.mesh import make_mesh
from tbjax.placement import readable
from tbjax.sharding import Sharding, ShardingStrategy, axes_of, leaves
from tbjax.training.config import Defaults


class AdvancedFSDPManager:
    """What the data-parallel devices share out between them, and what is saved besides.

    `mixed_precision` is float32 weights with bfloat16 matmuls, without it everything is float32. `cpu_offload` keeps
    the optimizer's state in the host's memory. `activation_checkpointing` runs each layer again in the backward pass.
    """

    def __init__(
        self,
        sharding_strategy: ShardingStrategy | str = "FULL_SHARD",
        mixed_precision: bool = True,
        cpu_offload: bool = False,
        activation_checkpointing: bool = True,
    ) -> None:
        self.sharding_strategy = ShardingStrategy(sharding_strategy)
        self.training_defaults = Defaults(
            precision="mixed" if mixed_precision else "float32",
            remat="full" if activation_checkpointing else "none",
            offload=("optimizer",) if cpu_offload else (),
        )

    def wrap_model(self, model: CausalLM) -> CausalLM:
        """The model, laid out by the strategy, and trained as the manager says."""
        laid = model.moved(mesh_of(model, self.sharding_strategy), sharding=self.sharding_strategy)
        with_defaults(laid, self.training_defaults)
        return laid


class SelectiveGradientCheckpointing:
    """Of the layers of `model`, the share `checkpoint_ratio` is run again in the backward pass; the others keep all."""

    def __init__(self, model: CausalLM, checkpoint_ratio: float = 1.0) -> None:
        if isinstance(checkpoint_ratio, bool) or not isinstance(checkpoint_ratio, int | float):
            raise TypeError(f"checkpoint_ratio={checkpoint_ratio!r} must be a number from 0 to 1.")
        if not 0 <= checkpoint_ratio <= 1:
            raise ValueError(f"checkpoint_ratio={checkpoint_ratio} must be from 0 to 1.")
        self.model = model
        self.checkpoint_ratio = checkpoint_ratio
        whole = {0.0: "none", 1.0: "full"}
        with_defaults(model, Defaults(remat=whole.get(float(checkpoint_ratio), f"full:{checkpoint_ratio:g}")))


class Shard(NamedTuple):
    """Where one parameter is to lie."""

    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]  # of the mesh, that cut each dimension
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class ShardPlan(Mapping[str, Shard]):
    """Where each parameter is to lie, by path."""

    shards: Mapping[str, Shard]

    @property
    def bytes_per_device(self) -> int:
        return sum(shard.bytes_per_device for shard in self.shards.values())

    def __getitem__(self, path: str) -> Shard:
        return self.shards[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __str__(self) -> str:
        rows = [
            f"{path} {list(shard.shape)}: "
            f"{' and '.join('*'.join(axes) for axes in shard.axes if axes) or 'whole on every device'}, "
            f"{readable(shard.bytes_per_device)} a device"
            for path, shard in self.items()
        ]
        return "\n".join([*rows, f"together {readable(self.bytes_per_device)} a device"])


class ModelSharder:
    """Lays a model's parameters out over the first `num_gpus` devices (default: all), by a sharding strategy."""

    def __init__(
        self, strategy: ShardingStrategy | str = ShardingStrategy.FULL_SHARD, num_gpus: int | None = None
    ) -> None:
        self.strategy = ShardingStrategy(strategy)
        self.devices = first_devices(num_gpus)

    def analyze_model(self, model: CausalLM) -> ShardPlan:
        """Where each parameter would lie, and what that takes. Nothing is moved."""
        layout = Sharding(mesh_of(model, self.strategy, self.devices), self.strategy)
        shards = {}
        for leaf in leaves(model):
            array = leaf.variable[...]
            placed = layout.parameter(leaf.dims, array.shape, leaf.path)
            entries = [*placed.spec, *[None] * (array.ndim - len(placed.spec))]
            axes = tuple(map(axes_of, entries))
            size = math.prod(placed.shard_shape(array.shape)) * array.dtype.itemsize
            shards[leaf.path] = Shard(array.shape, axes, size)
        return ShardPlan(shards)

    def apply(self, model: CausalLM) -> CausalLM:
        """The model, laid out so."""
        return model.moved(mesh_of(model, self.strategy, self.devices), sharding=self.strategy)


def mesh_of(model: CausalLM, strategy: ShardingStrategy, devices: list[Any] | None = None) -> Any:
    """The mesh to lay `model` out on: its own if it has several devices of these, and else all devices as data axes."""
    devices = jax.devices() if devices is None else devices
    if model.mesh.size > 1 and set(model.mesh.devices.flat) <= set(devices):
        return model.mesh
    # Replicas across hosts, parts within each: what HYBRID_SHARD is for. On one host it has nothing to replicate over.
    hosts = len({device.process_index for device in devices}) if strategy is ShardingStrategy.HYBRID_SHARD else 1
    sizes = {"dp": hosts, "fsdp": len(devices) // hosts}
    return make_mesh({"dp": len(devices)} if strategy is ShardingStrategy.NO_SHARD else sizes, devices)


def first_devices(count: int | None) -> list[Any]:
    """The first `count` devices (None: all)."""
    there = jax.devices()
    if count is None:
        return there
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(there):
        raise ValueError(f"num_gpus={count!r}: there are {len(there)} devices.")
    return there[:count]


def with_defaults(model: CausalLM, defaults: Defaults) -> None:
    """Have `model` say this of its training, beside what it says already."""
    model.training_defaults = dataclasses.replace(model.training_defaults or Defaults(), **defaults.given)
