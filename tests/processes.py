"""Real processes that together are one JAX program: real `jax.distributed`, real collectives (Gloo), CPU devices."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.xla import flags

ROOT = Path(__file__).parent.parent

# No process has reason to take longer; one that hangs (its peer died) is killed, and the test says so.
LIMIT_SECONDS = 300

PROLOGUE = """
import sys
import jax
import tbjax
tbjax.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""


def free_address() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def environment(devices: int, **more: str) -> dict[str, str]:
    """The environment of a process with so many CPU devices of its own."""
    return {
        **os.environ,
        "XLA_FLAGS": flags(devices),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def start(*command: str | Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process whose output is kept, in the environment `variables`."""
    return subprocess.Popen(
        list(map(str, command)),
        env=dict(variables),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(script: str, *arguments: str | Path, count: int = 2, devices: int = 4) -> list[str]:
    """What each of `count` processes prints that run `script`, whose `sys.argv[4:]` are `arguments`."""
    address, variables = free_address(), environment(devices)
    processes = [
        start(sys.executable, "-c", PROLOGUE + script, address, str(count), str(index), *arguments, variables=variables)
        for index in range(count)
    ]
    try:
        results = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, (process, (_, errors)) in enumerate(zip(processes, results, strict=True)):
        assert process.returncode == 0, f"process {index} failed:\n{errors[-4000:]}"
    return [output for output, _ in results]
