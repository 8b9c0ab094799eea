"""Loading a model over several devices as PyTorch libraries spell it.

    model, tokenizer = create_distributed_llm("meta-llama/Llama-2-70b-hf", world_size=8)
    model = DistributedLLMOptimizer("meta-llama/Llama-2-70b-hf", num_gpus=8, tensor_parallel_size=8).load_model()
    model = apply_tensor_parallelism(model, TensorParallelConfig(world_size=8, sequence_parallel=True))

Sizes that are given are taken as they are; what is left of the devices goes where the strategy says, and under AUTO
where the planner says. A rank there is a process with one device; here one process has many, so a rank is checked and
otherwise without effect.
"""

import dataclasses
import enum
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tbjax import api, layers
from tbjax.api import CausalLM
from tbjax.compat.training import first_devices, with_defaults
from tbjax.elsewhere import told_by_name
from tbjax.mesh import make_mesh
from tbjax.planner import estimates
from tbjax.planner.hardware import cluster
from tbjax.planning import model_config
from tbjax.quantize import RULES
from tbjax.sharding import Sharding
from tbjax.training.config import Defaults


class ParallelismStrategy(enum.StrEnum):
    """Where the devices go that no size claims."""

    AUTO = "auto"  # where the planner says
    DATA_PARALLEL = "data_parallel"
    FSDP = "fsdp"
    TENSOR_PARALLEL = "tensor_parallel"
    PIPELINE_PARALLEL = "pipeline_parallel"
    HYBRID = "hybrid"  # tensor and pipeline parallel as given, and FSDP with the rest


# The axis that takes what the given sizes leave.
FILLED = {
    ParallelismStrategy.DATA_PARALLEL: "dp",
    ParallelismStrategy.FSDP: "fsdp",
    ParallelismStrategy.TENSOR_PARALLEL: "tp",
    ParallelismStrategy.PIPELINE_PARALLEL: "pp",
    ParallelismStrategy.HYBRID: "fsdp",
}


@told_by_name
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How a model is to be spread. Sizes that are None are chosen."""

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    data_parallel_size: int | None = None  # with its parts of the weights, as FSDP has them
    strategy: ParallelismStrategy | str = ParallelismStrategy.AUTO
    sequence_parallel: bool = False
    enable_gradient_checkpointing: bool = False
    quantization: str = "none"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "strategy", ParallelismStrategy(self.strategy))
        except ValueError:
            known = ", ".join(map(repr, map(str, ParallelismStrategy)))
            raise ValueError(f"strategy={self.strategy!r} is unknown: tbjax knows {known}.") from None
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if self.quantization not in ("none", *RULES):
            known = ", ".join(map(repr, ("none", *RULES)))
            raise ValueError(f"quantization={self.quantization!r} is unknown: tbjax knows {known}.")

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh axes that are given."""
        named = {"pp": self.pipeline_parallel_size, "fsdp": self.data_parallel_size, "tp": self.tensor_parallel_size}
        return {axis: size for axis, size in named.items() if size is not None}


@told_by_name
class DistributedLLMOptimizer:
    """Loads a model over `num_gpus` devices (default: all)."""

    def __init__(
        self,
        model_name: str | Path,
        config: DistributedConfig | None = None,
        *,
        num_gpus: int | None = None,
        strategy: ParallelismStrategy | str | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        quantization: str = "none",
    ) -> None:
        given = {
            "strategy": strategy,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "quantization": None if quantization == "none" else quantization,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if config is not None and given:
            raise ValueError(f"{', '.join(given)}: they are in the config that is given too. Say them in one place.")
        self.model_name = model_name
        self.config = DistributedConfig(**given) if config is None else config
        self.devices = first_devices(num_gpus)

    @property
    def quantization_or_none(self) -> Any:
        """As tbjax has it, which says None for "none"."""
        return None if self.config.quantization == "none" else self.config.quantization

    @property
    def mesh(self) -> Mesh:
        """The mesh that the model will lie on."""
        asked, count = self.config.sizes, len(self.devices)
        if math.prod(asked.values()) == count:
            return make_mesh(asked, self.devices)
        if self.config.strategy is not ParallelismStrategy.AUTO:
            axis = FILLED[ParallelismStrategy(self.config.strategy)]
            return make_mesh(asked if axis in asked else {**asked, axis: -1}, self.devices)
        where = cluster("auto")
        if count != where.devices:
            where = cluster(f"{where.hardware.name}:{count}")
        wanted: dict[str, Any] = {"mesh": asked or None, "quantization": self.quantization_or_none}
        plan = api.plan(self.model_name, where, task="inference", **wanted)
        return make_mesh(plan.mesh, self.devices)

    def load_model(self) -> CausalLM:
        """The model."""
        layout = {"mesh": self.mesh, "sequence_parallel": self.config.sequence_parallel}
        model = api.load(self.model_name, **layout, quantization=self.quantization_or_none)
        if self.config.enable_gradient_checkpointing:
            with_defaults(model, Defaults(remat="full"))
        return model

    def optimize(self) -> tuple[CausalLM, Any]:
        """The model and its tokenizer."""
        model = self.load_model()
        return model, model.tokenizer


def create_distributed_llm(
    model_name: str | Path, world_size: int | None = None, config: DistributedConfig | None = None, **options: Any
) -> tuple[CausalLM, Any]:
    """A model over `world_size` devices (default: all), and its tokenizer; `options` are DistributedConfig's."""
    if config is not None and options:
        raise ValueError(f"{', '.join(options)}: they are in the config that is given too. Say them in one place.")
    config = DistributedConfig(**options) if config is None else config
    return DistributedLLMOptimizer(model_name, config, num_gpus=world_size).optimize()


def estimate_gpu_requirements(
    model: Any, max_sequence_length: int = 4096, max_batch_size: int = 1, quantization: Any = "none", **options: Any
) -> dict[str, Any]:
    """As `tbjax.planner.estimates.estimate_gpu_requirements`, of a model by name too."""
    config, _ = model_config(model)
    return estimates.estimate_gpu_requirements(config, max_sequence_length, max_batch_size, quantization, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorParallelConfig:
    """Over how many devices layers are cut; with `sequence_parallel` what lies between them is cut too."""

    world_size: int = 1
    rank: int = 0
    sequence_parallel: bool = False
    # XLA runs collectives beside computation wherever it can: either way the results are the same.
    async_tensor_model_parallel_allreduce: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.world_size, int) or isinstance(self.world_size, bool) or self.world_size < 1:
            raise ValueError(f"TensorParallelConfig.world_size={self.world_size!r} must be a positive integer.")
        if self.rank not in range(self.world_size):
            raise ValueError(
                f"TensorParallelConfig.rank={self.rank!r} is none of world_size={self.world_size}: they count from 0 "
                f"to {self.world_size - 1}."
            )
        if self.world_size > len(jax.devices()):
            raise ValueError(
                f"TensorParallelConfig.world_size={self.world_size}: there are {len(jax.devices())} devices."
            )

    @property
    def mesh(self) -> Mesh:
        return make_mesh({"tp": self.world_size}, jax.devices()[: self.world_size])

    @property
    def sharding(self) -> Sharding:
        return Sharding(self.mesh, sequence_parallel=self.sequence_parallel)


def apply_tensor_parallelism(model: CausalLM, config: TensorParallelConfig) -> CausalLM:
    """The model, with its layers cut over the first `config.world_size` devices."""
    return model.moved(config.mesh, sequence_parallel=config.sequence_parallel)


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """`tbjax.layers.ColumnParallelLinear`, whose mesh a TensorParallelConfig may stand for."""

    def __init__(
        self, in_features: int, out_features: int, config: Any = None, *, gather_output: bool = True, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, _mesh(config), gather_output=gather_output, **options)


class RowParallelLinear(layers.RowParallelLinear):
    """`tbjax.layers.RowParallelLinear`, whose mesh a TensorParallelConfig may stand for."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: Any = None,
        *,
        input_is_parallel: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, _mesh(config), input_is_parallel=input_is_parallel, **options)


class TensorParallelEmbedding(layers.TensorParallelEmbedding):
    """`tbjax.layers.TensorParallelEmbedding`, whose mesh a TensorParallelConfig may stand for."""

    def __init__(self, num_embeddings: int, embedding_dim: int, config: Any = None, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, _mesh(config), **options)


def _mesh(config: Any) -> Any:
    return config.sharding if isinstance(config, TensorParallelConfig) else config
