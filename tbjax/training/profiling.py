"""A trace of a few steps, by JAX's profiler: what ran on which device, and when.

The first steps of a run compile and settle; the trace begins after them. TensorBoard, xprof and Perfetto show it.
"""

import logging
from pathlib import Path

import jax

from tbjax.training.config import TrainConfig
from tbjax.training.state import TrainState

log = logging.getLogger("tbjax")

# Steps before a trace begins.
SETTLING = 2


class Profile:
    """A trace of a few steps."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        self.folder = config.profile
        self.first = step + SETTLING + 1
        self.last = self.first + config.profile_steps - 1
        self.running = False
        if self.folder is None or self.last <= config.steps:
            return
        if step == 0:
            raise ValueError(
                f"profile_steps={config.profile_steps} from step {self.first} on go beyond steps={config.steps}."
            )
        # A run that goes on has what is left to it; that is no reason to refuse the rest.
        self.last = config.steps
        if self.first > self.last:
            log.info("nothing is traced: too few of %d steps are left after step %d", config.steps, step)
            self.folder = None

    def before(self, step: int, state: TrainState) -> None:
        """Step `step` is about to be dispatched, from `state`."""
        if self.folder is None or step not in (self.first, self.last + 1):
            return
        jax.block_until_ready(state.step)  # what is under way belongs to the steps before
        if step == self.first:
            jax.profiler.start_trace(str(Path(self.folder).expanduser()))
            self.running = True
        else:
            self.close()

    def close(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            log.info("steps %d to %d are traced in %s", self.first, self.last, self.folder)
