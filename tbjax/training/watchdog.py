"""A hang becomes a failure: whoever takes too long over a step is ended, and says where it stood.

A process that waits for another in a collective waits without end, and so does a scheduler that only looks at exit
codes. JAX's heartbeats find processes that are dead or cut off; a watchdog finds those that live and get nowhere: a
step that one process runs and another does not, data that does not come, a disk that does not answer.

The loop reports between its steps, by `beat`. Where it does not in time, a thread writes the stacks of all threads to
standard error and ends the process. No Python exception could: the thread that would have to raise it is waiting
inside the runtime.
"""

import faulthandler
import os
import sys
import threading

import jax

# As coreutils' timeout(1) ends: a launcher's log tells it from an error.
HUNG = 124

# What the first steps may take, which compile, and what saving and evaluating may: so many times as long as a step.
LONGER = 10.0

# Of a run over several processes that does not say: what PyTorch gives a collective of NCCL.
USUAL_SECONDS = 600.0


class Watchdog:
    """Ends this process where more than `limit` seconds pass between two beats; with None, never. To be closed."""

    def __init__(self, limit: float | None, *, who: str = "this process") -> None:
        self._limit, self._who = limit, who
        self._changed = threading.Condition()
        self._step, self._allowed, self._beats, self._over = 0, 0.0, 0, False
        self._thread: threading.Thread | None = None

    def beat(self, step: int, *, longer: bool = False) -> None:
        """All is well after `step` steps. The next beat follows in time, or what comes now may take `longer`."""
        if self._limit is None:
            return
        with self._changed:
            self._step, self._beats = step, self._beats + 1
            self._allowed = self._limit * (LONGER if longer else 1.0)
            self._changed.notify()
        if self._thread is None:
            # Not before the first beat: until then it is the caller who knows how long things take.
            self._thread = threading.Thread(target=self._watch, name="tbjax watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._over:
                beats, allowed = self._beats, self._allowed
                if not self._changed.wait_for(lambda beats=beats: self._over or self._beats != beats, allowed):
                    self._end(allowed)

    def _end(self, waited: float) -> None:
        sys.stderr.write(
            f"\nerror: {self._who} did nothing for {waited:g} s after step {self._step}, so it ends here (exit code "
            f"{HUNG}). Another process may be gone, or run another step; the stacks of all threads follow. If a step "
            "may take that long, give it a longer --step-timeout (TrainConfig.step_timeout).\n"
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HUNG)


def watchdog_of(limit: float | None) -> Watchdog:
    """The watchdog of a run that asks for `limit`; None: the usual one on several processes, on one none."""
    processes = jax.process_count()
    if limit is None and processes > 1:
        limit = USUAL_SECONDS
    return Watchdog(limit, who=f"process {jax.process_index()} of {processes}" if processes > 1 else "this process")
