"""Training: the loss, the optimizers, and the step that joins them on any mesh."""

from tbjax.training.loss import IGNORED, cross_entropy
from tbjax.training.optimizer import make_optimizer
from tbjax.training.step import Batch, Metrics, TrainState, abstract_batch, abstract_state, init_state, make_step

__all__ = [
    "IGNORED",
    "Batch",
    "Metrics",
    "TrainState",
    "abstract_batch",
    "abstract_state",
    "cross_entropy",
    "init_state",
    "make_optimizer",
    "make_step",
]
