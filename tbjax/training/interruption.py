"""An end that comes from outside: a terminal's Ctrl-C, or the SIGTERM by which schedulers announce that they will kill.

Within the block the first signal only raises a flag, which the loop looks at between steps, so that what it holds can
be saved. A second Ctrl-C interrupts at once.

A run over several processes must stop at one step in all of them, or those that go on wait forever. The processes
therefore agree: `agreed` is a collective that every one of them calls after each step. None waits for it: it is one
flag of each device, summed behind the step that is under way, and what came of it is read a step later, when it is
there. So a signal ends the run after the two steps that follow at most, however long they take.
"""

import functools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Interruption:
    """Catches SIGINT and SIGTERM within a `with` block. Python delivers signals to the main thread alone: in another
    one, nothing is caught."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.cause: str | None = None  # the signal's name
        self._before: dict[signal.Signals, Any] = {}
        self._asked: jax.Array | None = None  # what came of the last question, as soon as it is there

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether this process has been interrupted; of several, whether any had been when they asked the last time.

        All processes must ask, after the same steps.
        """
        if jax.process_count() == 1:
            return self.cause is not None
        before, self._asked = self._asked, _any_process(self.cause is not None)
        if before is None or not bool(before):
            return False
        self.cause = self.cause or "a signal to another process"
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.cause = signal.Signals(number).name
        if number == signal.SIGINT:
            # Whoever presses Ctrl-C again means it.
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _any_process(flag: bool) -> jax.Array:
    """Whether the flag of any process is up, as a value that is still being computed."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    flags = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("all")), np.full(jax.local_device_count(), flag), (jax.device_count(),)
    )
    return _any(flags, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=1)
def _any(flags: jax.Array, everywhere: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.any(flags), everywhere)
