"""A run whose hosts come and go: what each change costs, and whether the losses know of it.

    python -m benchmarks.elastic           # four workers; a host is killed in a step, and comes back
    python -m benchmarks.elastic --cut     # two hosts in network namespaces, and the link between them is cut (root)

A host is a torchrun agent with its workers, all on this machine; each worker has one CPU device. Its death is SIGKILL
to a worker in the middle of a step, and then to all the rest of it. The run is `tbjax train --mesh plan`: the planner
lays it out anew for the devices that are left. The run beside it, which nothing disturbs, keeps to one mesh.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent

MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "dtype": "float32",
}

# A step takes some tenths of a second, so that a host has time to join before the run has ended.
BATCH, LENGTH, SAVE_EVERY = 8, 128, 5

# A machine that is busy with other things may take minutes to start four workers.
PATIENCE_SECONDS = 600.0

# The programs are tiny and compiled four times over: quickly is better than well.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# How long a host must be silent to be missed, and a process.
SILENCE_SECONDS = 10


# What JAX says as it ends a process whose job is no longer whole.
_LOST = "the JAX distributed service detected fatal errors"


class Agent:
    """One host: a torchrun agent and its workers."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], output: Path) -> None:
        self.output = output
        with output.open("a") as file:
            self.process = subprocess.Popen(
                list(command), env=dict(variables), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def die(self) -> None:
        """A worker first, in the middle of what it does; then the rest of the host."""
        for pid in [*reversed(_descendants(self.process.pid)), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.die()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What became of a run when its hosts changed."""

    what: str
    seconds: float  # until the run had done a step that it had not done before
    repeated: int  # steps that were done again, from the newest checkpoint on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run with changes, beside one without."""

    changes: list[Change]
    processes: list[int]  # that took part, one number for each time that the run was started
    meshes: set[str]  # that the planner chose on the way
    losses: dict[int, float]  # by step; of a step that was done again, the last
    undisturbed: dict[int, float]
    data: tuple[Any, Any]  # where the data stood at the end, of either

    @property
    def largest_difference(self) -> float:
        return max(abs(loss - self.losses[step]) for step, loss in self.undisturbed.items())


def kill_and_return(folder: Path, steps: int = 60) -> Outcome:
    """Four workers on two hosts; one host dies in a step, two workers go on, the host comes back."""
    data = _prepare(folder)
    arguments, log = [*_training(folder, data, steps, "elastic"), "--mesh", "plan"], folder / "elastic.jsonl"
    port, variables = _free_port(), _variables(1)

    def start(name: str) -> Agent:
        return Agent(torchrun(arguments, port=port, host=name == "first"), variables, folder / f"{name}.txt")

    changes = []
    with start("first") as first, contextlib.ExitStack() as others:
        second = others.enter_context(start("second"))
        # Where the second host came late, the first one has begun alone.
        _wait(lambda: _sessions(first)[-1:] == [4] and _steps(log) >= steps // 4, [first, second])
        reached, lines, since = _steps(log), len(_records(log)), time.time()
        second.die()
        _wait(lambda: len(_records(log)) > lines and _steps(log) > reached, [first])
        again = [record["step"] for record in _records(log)[lines:]]
        changes.append(_change("2 of 4 workers killed", since, again, reached))
        _wait(lambda: _steps(log) >= steps // 2, [first])
        sessions = _sessions(first)
        third = others.enter_context(start("third"))
        _wait(lambda: len(_sessions(first)) > len(sessions), [first, third])
        # The last step before is the last that was written: none can be taken until all are there.
        reached, lines, since = _steps(log), len(_records(log)), log.stat().st_mtime
        _wait(lambda: _steps(log) > reached, [first, third])
        again = [record["step"] for record in _records(log)[lines:]]
        changes.append(_change("2 workers joined 2", since, again, reached))
        _wait(lambda: first.process.poll() == 0 and third.process.poll() == 0, [first, third], ending=True)
        processes = _sessions(first)
        said = "".join(agent.text for agent in (first, second, third))
        meshes = set(re.findall(r"tbjax: mesh (\(.*?\)|\{.*?\}), as the planner", said))
    undisturbed = folder / "undisturbed.jsonl"
    alone = [sys.executable, "-m", "tbjax", *_training(folder, data, steps, "undisturbed"), "--mesh", "1,4,1"]
    subprocess.run(alone, env=_variables(4), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return Outcome(
        changes=changes,
        processes=processes,
        meshes=meshes,
        losses={record["step"]: record["loss"] for record in _records(log)},
        undisturbed={record["step"]: record["loss"] for record in _records(undisturbed)},
        data=(_data_at_end(folder / "elastic-run"), _data_at_end(folder / "undisturbed-run")),
    )


def cut_the_link(folder: Path, steps: int = 60) -> tuple[Change, tuple[str, str]]:
    """Two hosts with a network between them, which is cut: what it cost, and what either said of it.

    The one that keeps the rendezvous goes on alone. The worker of the other ends too; its agent has nobody to ask.
    """
    data = _prepare(folder)
    arguments, log = [*_training(folder, data, steps, "cut"), "--mesh", "plan"], folder / "cut.jsonl"
    with _two_hosts(folder) as hosts:

        def start(number: int) -> Agent:
            command = torchrun(
                arguments, port=29400, host=number == 0, workers=1, at=hosts[0].address, own=hosts[number].address
            )
            return Agent([*hosts[number].inside, *command], _variables(1), folder / f"host{number}.txt")

        with start(0) as near, start(1) as far:
            _wait(lambda: _steps(log) >= steps // 4, [near, far])
            reached, lines, since = _steps(log), len(_records(log)), time.time()
            hosts[0].cut()
            _wait(lambda: len(_records(log)) > lines and _steps(log) > reached, [near])
            change = _change("the link was cut", since, [r["step"] for r in _records(log)[lines:]], reached)
            _wait(lambda: near.process.poll() == 0, [near], ending=True)
            _wait(lambda: _LOST in far.text, [])
            return change, (near.text, far.text)


def torchrun(
    arguments: Sequence[str],
    *,
    port: int,
    host: bool,
    workers: int = 2,
    at: str = "localhost",
    own: str = "localhost",
) -> list[str]:
    """The command line of an agent; `host` is the one that keeps the rendezvous, and must stay."""
    waits = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,read_timeout=20"
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1:2", f"--nproc-per-node={workers}", "--max-restarts=5", "--rdzv-id=run"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={at}:{port}", f"--local-addr={own}"),
        *(f"--rdzv-conf=is_host={int(host)},{waits}", "--shutdown-timeout=60"),
        *("-m", "tbjax", *arguments),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Host:
    """A network namespace with a name and a file of hosts of its own."""

    name: str
    address: str
    inside: tuple[str, ...]  # what comes before a command that is to run there

    def cut(self) -> None:
        subprocess.run(["ip", "-n", self.name, "link", "set", "eth0", "down"], check=True)


@contextlib.contextmanager
def _two_hosts(folder: Path) -> Iterator[list[_Host]]:
    names = folder / "hosts"
    found = []
    for number in (0, 1):
        name, address = f"tbjax{os.getpid()}-{number}", f"10.97.0.{number + 1}"
        named = f'hostname {name} && mount --bind {names} /etc/hosts && exec "$@"'
        inside = ("ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", named, "sh")
        found.append(_Host(name=name, address=address, inside=inside))
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in found))
    near, far = found
    with contextlib.ExitStack() as stack:
        for host in found:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "del", host.name)
        _ip("link", "add", "eth0", "netns", near.name, "type", "veth", "peer", "name", "eth0", "netns", far.name)
        for host in found:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield found


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def can_make_networks() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"tbjax{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


def _prepare(folder: Path) -> Path:
    """A model of random weights, and tokens of which no two batches are alike: a few of them make up most of a text."""
    import numpy as np

    from benchmarks.checkpoints import synthetic

    synthetic(folder / "model", dict(MODEL))
    data = folder / "tokens.npy"
    drawn = np.random.default_rng(0).zipf(1.3, 1 << 18) % MODEL["vocab_size"]
    np.save(data, drawn.astype(np.int32))
    return data


def _training(folder: Path, data: Path, steps: int, name: str) -> list[str]:
    return [
        *("train", str(folder / "model"), "--data", str(data), "--steps", str(steps), "--seed", "1"),
        *("--batch-size", str(BATCH), "--device-batch", "2", "--seq-len", str(LENGTH), "--precision", "float32"),
        *("--learning-rate", "0.01"),
        *("--checkpoint-dir", str(folder / f"{name}-run"), "--save-every", str(SAVE_EVERY)),
        *("--log-file", str(folder / f"{name}.jsonl"), "--log-every", "1"),
        *("--step-timeout", "60", "--heartbeat-timeout", str(SILENCE_SECONDS), "--meeting-timeout", "120"),
    ]


def _variables(devices: int) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": COMPILE_QUICKLY,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "OMP_NUM_THREADS": "1",
        # Agents that share a store do not find each other again once they have changed places (torch 2.13): whoever
        # joins waits for an address that the first agent published in an earlier round only.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _records(log: Path) -> list[dict[str, Any]]:
    """What a run has written so far; its last line may be half written."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _steps(log: Path) -> int:
    return max((record["step"] for record in _records(log)), default=0)


def _sessions(agent: Agent, workers: int = 2) -> list[int]:
    """How many processes there were, each time that the run was started; each worker of a host says so."""
    return [int(count) for count in re.findall(r"tbjax: process \d+ of (\d+)", agent.text)][::workers]


def _change(what: str, since: float, again: Sequence[int], reached: int) -> Change:
    repeated = len({step for step in again if step <= reached})
    return Change(what=what, seconds=time.time() - since, repeated=repeated)


def _data_at_end(run: Path) -> Any:
    from tbjax.training.saving import Saver

    with Saver(run, keep=1) as saver:
        return saver.progress().data


def _wait(done: Callable[[], bool], agents: Sequence[Agent], *, ending: bool = False) -> None:
    """Until something has come true, while the agents live, or end well where they are `ending`."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        said = "\n".join(f"--- {agent.output.name}\n{agent.text[-4000:]}" for agent in agents)
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {PATIENCE_SECONDS:.0f} s:\n{said}")
        if any(agent.process.poll() not in ((None, 0) if ending else (None,)) for agent in agents):
            raise RuntimeError(f"a host ended:\n{said}")
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in _descendants(child))]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cut", action="store_true", help="cut a link between network namespaces instead")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.cut:
            change, _ = cut_the_link(Path(folder), asked.steps)
            print(
                f"{change.what}: {change.seconds:.0f} s lost, {change.repeated} steps done again, on with 1 of 2 hosts"
            )
            return
        outcome = kill_and_return(Path(folder), asked.steps)
    for change in outcome.changes:
        print(f"{change.what}: {change.seconds:.0f} s lost, {change.repeated} steps done again")
    print(f"workers, by start: {', '.join(map(str, outcome.processes))}; meshes: {', '.join(sorted(outcome.meshes))}")
    print(
        f"loss against the undisturbed run, largest difference of {asked.steps} steps: "
        f"{outcome.largest_difference:.1e}; data at the same place: {outcome.data[0] == outcome.data[1]}"
    )


if __name__ == "__main__":
    main()
