"""A step that takes too long ends the process; one that does not, does not."""

import sys

import pytest

from tests import processes

HANGING = """
import contextlib, threading
from tbjax.training.watchdog import Watchdog
with contextlib.closing(Watchdog(0.5, who="process 2 of 4")) as watchdog:
    for step in range(1, 4):
        watchdog.beat(step)
    def of_the_users():
        threading.Event().wait()
    of_the_users()
"""

IN_TIME = """
import contextlib, time
from tbjax.training.watchdog import Watchdog
with contextlib.closing(Watchdog(1.0)) as watchdog, contextlib.closing(Watchdog(None)) as none:
    none.beat(1)
    watchdog.beat(1, longer=True)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:  # longer than a step may take, shorter than what compiles
        pass
    watchdog.beat(2)
"""


def test_a_hang_ends_with_its_place_and_a_code_of_its_own():
    hanging, in_time = (
        processes.start(sys.executable, "-c", script, variables=processes.environment(1))
        for script in (HANGING, IN_TIME)
    )
    _, said = hanging.communicate(timeout=processes.LIMIT_SECONDS)
    assert hanging.returncode == 124
    assert "error: process 2 of 4 did nothing for 0.5 s after step 3, so it ends here (exit code 124)" in said
    assert "in of_the_users" in said
    _, said = in_time.communicate(timeout=processes.LIMIT_SECONDS)
    assert (in_time.returncode, said) == (0, "")


STUCK = """
import sys, threading
import tbjax
from tests import tiny

tbjax.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax
import numpy as np

def batches():
    for number in range(100):
        if number == 5 and jax.process_index() == 1:
            waits_for_a_disk_that_does_not_answer()
        yield {"tokens": np.full((2, 16), number), "targets": np.full((2, 16), number)}

def waits_for_a_disk_that_does_not_answer():
    threading.Event().wait()

model = tbjax.from_config(tiny.our_config(tiny.BY_NAME["llama"]), (1, 2, 1), dtype="float32")
tbjax.train(model, batches(), tbjax.TrainConfig(steps=50, step_timeout=10), progress=False)
"""


@pytest.mark.slow
def test_a_process_whose_data_does_not_come_ends_the_run_of_all():
    address = processes.free_address()
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    started = [
        processes.start(
            *(sys.executable, "-c", STUCK, address, str(index)), variables=processes.environment(1, XLA_FLAGS=quick)
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=processes.LIMIT_SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    # The other one waits in a collective: its own watchdog ends it, or the news that its peer is gone.
    assert started[1].returncode == 124, errors[1]
    assert started[0].returncode != 0
    assert "process 1 of 2 did nothing for 10 s after step 5" in errors[1]
    assert "in waits_for_a_disk_that_does_not_answer" in errors[1]
