"""An end that comes from outside: a terminal's Ctrl-C, or the SIGTERM by which schedulers announce that they will kill.

Within the block the first signal only raises a flag, which the loop looks at between steps, so that what it holds can
be saved. A second Ctrl-C interrupts at once.

A run over several processes must stop at one step in all of them, or those that go on wait forever. The processes
therefore agree: `agreed` is a collective that every one of them calls after the same steps.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interruption:
    """Catches SIGINT and SIGTERM within a `with` block. Python delivers signals to the main thread alone: in another
    one, nothing is caught."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.cause: str | None = None  # the signal's name
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any process has been interrupted. All processes must ask, after the same step."""
        if jax.process_count() == 1:
            return self.cause is not None
        flags = multihost_utils.process_allgather(np.int32(self.cause is not None))
        if np.any(flags) and self.cause is None:
            self.cause = "a signal to another process"
        return bool(np.any(flags))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.cause = signal.Signals(number).name
        if number == signal.SIGINT:
            # Whoever presses Ctrl-C again means it.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
