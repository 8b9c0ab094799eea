"""The host's memory that a compiler leaves behind, given back to the system.

XLA takes hundreds of MiB while it compiles a large step, in many small pieces. The C library keeps them for what the
process may ask for next; but what comes next are a step's arrays, too large for such pieces, so for the rest of a run
the memory would lie idle. On a CPU, whose host memory is the device's, that is room for activations.
"""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return to the system what the process has freed. It takes milliseconds, and without glibc nothing is done."""
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no such handle
        return None
