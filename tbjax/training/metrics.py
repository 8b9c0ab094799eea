"""What a run reports: the loss, and how fast and in how much memory it goes.

MFU is the share of the devices' peak that the model's own FLOPs take. They are counted causally, that is, attention
only over the pairs of tokens that are not masked (as MaxText counts since July 2025; Megatron's figure for the same
speed is higher), and what is computed again in the backward pass is not counted. There is none on CPUs, nor on a device
that the catalogue does not know.

Only steps are timed, and not the first one, which compiles; evaluating and saving take none of their time.
"""

import dataclasses
import time
from typing import Any

import jax

from tbjax.config import ModelConfig
from tbjax.planner.hardware import recognise
from tbjax.planner.work import training_flops
from tbjax.planner.workload import Workload
from tbjax.training.batches import Shape
from tbjax.training.precision import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What is known after `step`, over the steps since the record before."""

    step: int
    loss: float  # mean over the targets of these steps
    gradient_norm: float  # of this step
    learning_rate: float | None = None  # of this step
    tokens: int = 0  # that have been learned from (targets), since the run began
    tokens_per_second: float | None = None  # of the batches, all devices together; None before the clock runs
    mfu: float | None = None
    memory: int | None = None  # most bytes in use on a device of this process; None where it does not say
    skipped: int = 0  # steps that were skipped, since the run began

    def values(self) -> dict[str, float]:
        """What is known of it, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Pace:
    """How long steps take: the seconds between the end of one and the end of the next."""

    def __init__(self) -> None:
        self._ended: float | None = None  # when the last step did; None: there was none yet
        self._seconds, self._steps = 0.0, 0

    def step_ended(self, at: float) -> None:
        if self._ended is not None:
            self._seconds += at - self._ended
            self._steps += 1
        self._ended = at

    def pause_ended(self) -> None:
        """What was done since the last step was no step."""
        self._ended = time.perf_counter()

    def read(self) -> tuple[float, int]:
        """The seconds since the last reading, and how many steps they were for."""
        found = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return found


def peak_flops(devices: Any, precision: Precision) -> float | None:
    """The FLOP/s of all `devices` together in the dtype of the matmuls; None where they have no meaningful figure."""
    try:
        found = [recognise(device.device_kind) for device in devices]
    except ValueError:
        return None
    if any(record.vendor == "cpu" for record in found):
        return None
    dtype = "float32" if precision == "float32" else "bfloat16"
    return sum(record.flops[dtype] for record in found)


def step_flops(config: ModelConfig, shape: Shape) -> float:
    """The model's FLOPs in a step, counted causally."""
    return training_flops(config, Workload(global_batch=shape.rows, seq_len=shape.sequence), causal=True)


def peak_memory(devices: Any) -> int | None:
    """The most bytes that one of this process's devices has held at once."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return max(peaks, default=None)
