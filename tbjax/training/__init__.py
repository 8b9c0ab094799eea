"""Training: `train`, and the pieces of it for a loop of your own.

    result = train(model, data.load("corpus/", model.tokenizer, seq_len=1024, batch_size=8), TrainConfig(steps=1000))

Names are imported when first asked for, so that `tbjax --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbjax.training import data
    from tbjax.training.config import TrainConfig
    from tbjax.training.evaluation import Evaluation, evaluate
    from tbjax.training.loop import DataEnded, Diverged, TrainResult, make_train_step, train
    from tbjax.training.loss import IGNORED, cross_entropy
    from tbjax.training.metrics import Record
    from tbjax.training.nonfinite import Nonfinite, find_nonfinite
    from tbjax.training.optimizer import Layerwise, clip_by_norm, make_optimizer
    from tbjax.training.precision import LossScale, LossScaling
    from tbjax.training.state import (
        Batch,
        Metrics,
        TrainState,
        abstract_batch,
        abstract_state,
        init_state,
        resumed,
    )
    from tbjax.training.step import make_step

_HOMES = {
    "IGNORED": "loss",
    "Batch": "state",
    "DataEnded": "loop",
    "Evaluation": "evaluation",
    "Layerwise": "optimizer",
    "LossScale": "precision",
    "LossScaling": "precision",
    "Metrics": "state",
    "Diverged": "loop",
    "Nonfinite": "nonfinite",
    "Record": "metrics",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainState": "state",
    "abstract_batch": "state",
    "abstract_state": "state",
    "clip_by_norm": "optimizer",
    "cross_entropy": "loss",
    "evaluate": "evaluation",
    "find_nonfinite": "nonfinite",
    "init_state": "state",
    "make_optimizer": "optimizer",
    "make_step": "step",
    "make_train_step": "loop",
    "resumed": "state",
    "train": "loop",
}

__all__ = [
    "IGNORED",
    "Batch",
    "DataEnded",
    "Diverged",
    "Evaluation",
    "Layerwise",
    "LossScale",
    "LossScaling",
    "Metrics",
    "Nonfinite",
    "Record",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "clip_by_norm",
    "cross_entropy",
    "data",
    "evaluate",
    "find_nonfinite",
    "init_state",
    "make_optimizer",
    "make_step",
    "make_train_step",
    "resumed",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "data":
        return importlib.import_module("tbjax.training.data")
    if name in _HOMES:
        return getattr(importlib.import_module(f"tbjax.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tbjax.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
