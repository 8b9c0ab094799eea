"""A step that takes too long ends the process; one that does not, does not."""

import sys

from tests import processes

HANGING = """
import threading
from tbjax.training.watchdog import Watchdog
with Watchdog(0.5, who="process 2 of 4") as watchdog:
    for step in range(1, 4):
        watchdog.beat(step)
    def of_the_users():
        threading.Event().wait()
    of_the_users()
"""

IN_TIME = """
import time
from tbjax.training.watchdog import Watchdog
with Watchdog(1.0) as watchdog, Watchdog(None) as none:
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
