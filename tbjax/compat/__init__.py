"""Names under which other libraries' documents know what tbjax does, thin, over the real API.

A snippet from there runs with its import line changed, on a model of ours. Names are imported when first asked for.
PyTorch's own modules stand here by their last names: `torch` (with `cuda`, `optim` and `distributed` in it),
`distributed` and `checkpoint`. A name of theirs that is not here is answered with ours (`tbjax.elsewhere`).
"""

import importlib
from typing import Any

from tbjax import elsewhere

_HOMES = {
    "auto": ("AutoModelForCausalLM", "NeMoAutoModelForCausalLM", "init_device_mesh"),
    "checkpoint": ("FileSystemReader", "FileSystemWriter"),
    "hosts": ("MultiNodeTrainingManager",),
    "zero": ("DeepSpeedSettings", "deepspeed"),
    "models": (
        "ColumnParallelLinear",
        "DistributedConfig",
        "DistributedLLMOptimizer",
        "ParallelismStrategy",
        "RowParallelLinear",
        "TensorParallelConfig",
        "TensorParallelEmbedding",
        "apply_tensor_parallelism",
        "create_distributed_llm",
        "estimate_gpu_requirements",
    ),
    "pipeline": (
        "GPipeScheduler",
        "InterleavedScheduler",
        "PipelineParallelConfig",
        "PipelineStage",
        "create_pipeline_stages",
        "estimate_pipeline_memory",
        "split_batch",
    ),
    "training": (
        "AdvancedFSDPManager",
        "ModelSharder",
        "SelectiveGradientCheckpointing",
        "ShardPlan",
        "ShardingStrategy",
    ),
    "wrapped": (
        "CPUOffload",
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "MixedPrecision",
        "apply_activation_checkpointing",
        "checkpoint_wrapper",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tbjax.compat.{_HOME[name]}"), name)
    elsewhere.refuse_import("tbjax.compat", name)
    raise AttributeError(f"module 'tbjax.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
