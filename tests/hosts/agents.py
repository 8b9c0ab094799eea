"""Hosts of an elastic run, on this machine: a torchrun agent each, which can be killed and started again.

The first one keeps the rendezvous (torchrun's c10d backend), so it is the others that may go.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import processes


class Agent:
    """One host: `torchrun` with its workers."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, env=variables, cwd=processes.ROOT, stdout=output, stderr=output, start_new_session=True
            )

    def workers(self) -> list[int]:
        """Process ids of the workers that run now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in children.read_text().split() if "tbjax" in _command(int(child))]

    def die(self) -> None:
        """Worker first, in the middle of what it does; then the whole host."""
        for pid in (*self.workers(), self.process.pid):
            _kill(pid)
        self.process.wait()

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.die()


def torchrun(*arguments: str, port: int, first: bool, nodes: str, workers: int, restarts: int) -> list[str]:
    """The command line of an agent, whose workers run `python -m tbjax` with `arguments`."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={nodes}", f"--nproc-per-node={workers}", f"--max-restarts={restarts}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=elastic"),
        # A host is missed after three silent seconds, and a round waits so long for one more to come.
        f"--rdzv-conf=is_host={int(first)},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3",
        *("-m", "tbjax", *arguments),
    ]


def records(log: Path) -> list[dict[str, float]]:
    """What a run has written to its --log-file so far; its last line may be half written."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(done: Callable[[], bool], agents: Sequence[Agent], seconds: float) -> float:
    """Wait for something to come true while the agents live; how long it took."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not so after {seconds} s:\n{tails(agents)}")
        if any(agent.process.poll() not in (None, 0) for agent in agents):
            raise RuntimeError(f"an agent ended:\n{tails(agents)}")
        time.sleep(0.05)
    return time.monotonic() - began


def tails(agents: Sequence[Agent]) -> str:
    return "\n".join(f"--- {agent.log.name}\n{agent.log.read_text()[-4000:]}" for agent in agents)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
