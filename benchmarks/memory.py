"""How much memory of its own a process takes, while something runs.

Counted is anonymous memory (RssAnon): what the process wrote and the system must keep. Pages of mapped files are not
counted: the system drops them when it needs the room.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS = Path("/proc/self/status")

# Short beside the time in which a buffer is allocated and filled, long beside reading the counter.
INTERVAL = 0.002


def anonymous_bytes() -> int:
    """What the process holds now."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no RssAnon: Linux 4.5 or later is needed to measure memory.")


class AnonymousMemory:
    """Samples the process's anonymous memory within a `with` block: `before`, `peak` and `after`, in bytes."""

    def __init__(self) -> None:
        self.before = self.peak = self.after = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self.before = self.peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.after = anonymous_bytes()
        self.peak = max(self.peak, self.after)

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, anonymous_bytes())
