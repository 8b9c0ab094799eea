"""tbjax: any Hugging Face decoder, sharded over any mesh of NVIDIA GPUs or TPUs.

    plan = tbjax.plan("meta-llama/Llama-2-70b-hf", hardware="h100:8x8")        # which mesh, what it costs, and why
    model = tbjax.load("HuggingFaceTB/SmolLM2-135M-Instruct", mesh=(2, 2, 2))  # (dp, fsdp, tp), or a plan
    logits = model(tokens)
    print(model.generate("The capital of France is"))
    tbjax.train(model, data, tbjax.TrainConfig(steps=1000))
    model.save_pretrained("out/")

Names are imported when first asked for, so that `tbjax --help` need not wait for JAX.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tbjax import elsewhere

if TYPE_CHECKING:
    from tbjax import checkpoint, layers, training
    from tbjax.api import CausalLM, from_config, load, plan, save
    from tbjax.compat.auto import AutoModelForCausalLM
    from tbjax.config import LayerKind, ModelConfig, MoE, Rope
    from tbjax.hosts import initialize
    from tbjax.mesh import make_mesh
    from tbjax.model import Decoder
    from tbjax.planner.plan import Plan
    from tbjax.sharding import Sharding, ShardingStrategy
    from tbjax.training.config import TrainConfig
    from tbjax.training.loop import TrainResult, make_train_step, train

_HOMES = {
    "AutoModelForCausalLM": "tbjax.compat.auto",
    "CausalLM": "tbjax.api",
    "Decoder": "tbjax.model",
    "LayerKind": "tbjax.config",
    "MoE": "tbjax.config",
    "ModelConfig": "tbjax.config",
    "Plan": "tbjax.planner.plan",
    "Rope": "tbjax.config",
    "Sharding": "tbjax.sharding",
    "ShardingStrategy": "tbjax.sharding",
    "TrainConfig": "tbjax.training.config",
    "TrainResult": "tbjax.training.loop",
    "from_config": "tbjax.api",
    "initialize": "tbjax.hosts",
    "load": "tbjax.api",
    "make_mesh": "tbjax.mesh",
    "make_train_step": "tbjax.training.loop",
    "plan": "tbjax.planning",
    "save": "tbjax.api",
    "train": "tbjax.training.loop",
}
_MODULES = ("checkpoint", "collectives", "compat", "layers", "quantize", "training")

__all__ = [  # noqa: RUF022 (in the order of a reader's interest)
    "plan",
    "load",
    "from_config",
    "train",
    "save",
    "AutoModelForCausalLM",
    "initialize",
    "TrainConfig",
    "TrainResult",
    "make_train_step",
    "Plan",
    "CausalLM",
    "Decoder",
    "ModelConfig",
    "LayerKind",
    "MoE",
    "Rope",
    "make_mesh",
    "Sharding",
    "ShardingStrategy",
    "checkpoint",
    "layers",
    "training",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("tbjax")
    if name in _MODULES:
        return importlib.import_module(f"tbjax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in importlib.import_module("tbjax.compat").__all__:
        raise ImportError(f"tbjax: {name!r} is in tbjax.compat: from tbjax.compat import {name}.")
    elsewhere.refuse_import("tbjax", name)
    raise AttributeError(f"module 'tbjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
