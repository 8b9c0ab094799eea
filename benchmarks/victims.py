"""Training runs to be killed: a process that has imported everything forks one after the other.

    with Nursery(tmp) as nursery:
        victim = nursery.start(checkpoint_dir, save_every=20)
        victim.wait_for(lambda: len(victim.steps) >= 7)
        victim.kill()

Importing JAX takes seconds, and is done once; it starts no threads, and the devices are made after the fork. What a
step compiles to is kept on the disk. So a victim takes its first step about a second after it was born. The model is a
few thousand numbers, whose losses are exact: every process that does step 17 gets the same bits.
"""

import contextlib
import ctypes
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tbjax.config import ModelConfig

# No run is to be waited for longer, however busy the machine is.
PATIENCE_SECONDS = 300
# Between two looks at one: less than a step takes.
POLL_SECONDS = 0.0005

VOCABULARY, ROWS, SEQUENCE = 64, 4, 16
STEPS = 1_000_000  # none of them gets so far
DEVICES = 2


# Of Linux's prctl.h.
PR_SET_PDEATHSIG = 1

# Within it a user who is not root may mount a file system.
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def mounts() -> bool:
    """Whether this user may mount a file system in a namespace of its own."""
    try:
        tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


class Victim:
    """A run in a process of its own, and what it has said so far."""

    def __init__(self, nursery: "Nursery", pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self.status: int | None = None  # what it exited with; negative, the signal that ended it
        self._nursery = nursery

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def steps(self) -> dict[int, str]:
        """The losses of the steps that it has done, to the last bit."""
        return {int(step): loss for step, loss in re.findall(r"^step (\d+) (\S+)\n", self.text, re.MULTILINE)}

    @property
    def began(self) -> int:
        """The step that it went on from; 0 if it began anew."""
        found = re.search(r"going on from step (\d+)", self.text)
        return int(found[1]) if found else 0

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it, and wait for the end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        if self.status is None:
            self.status = self._nursery.wait(self.pid)
        return self.status

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Look until the condition holds, or until the process has ended: then False."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self._nursery.has_ended(self.pid):
                return condition()
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a run did not get there in {PATIENCE_SECONDS} s:\n{self.text[-4000:]}")
        return True


class Nursery:
    """The process that forks."""

    def __init__(self, folder: Path, *, disk: str | None = None) -> None:
        """With `disk`, a size such as "8m", the process sees a file system of that size at `mounted`.

        Nobody else does, but for this process, at `disk`.
        """
        self._folder = folder
        self._count = 0
        self._ended: dict[int, int] = {}
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES),
            # Of two that say how many devices there are, the last counts.
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-m", "benchmarks.victims"]
        self.mounted = folder / "disk"
        if disk is not None:
            self.mounted.mkdir()
            mount = f"mount -t tmpfs -o size={disk} tmpfs '{self.mounted}' && exec \"$@\""
            command = [*NAMESPACE, "sh", "-c", mount, "sh", *command]
        self._process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answers: queue.Queue[dict[str, int]] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def disk(self) -> Path:
        """The file system that only the process has mounted, as it is seen from here."""
        return Path(f"/proc/{self._process.pid}/root{self.mounted}")

    def start(self, checkpoint_dir: Path, **settings: Any) -> Victim:
        """A run with these settings of its `TrainConfig`, from what lies in `checkpoint_dir`."""
        self._count += 1
        output = self._folder / f"victim-{self._count}.log"
        output.touch()
        asked = {"checkpoint_dir": str(checkpoint_dir), "output": str(output), "settings": settings}
        self._process.stdin.write(json.dumps(asked) + "\n")
        return Victim(self, self._answer()["born"], output)

    def has_ended(self, pid: int) -> bool:
        with contextlib.suppress(queue.Empty):
            while pid not in self._ended:
                self._note(self._answers.get(timeout=POLL_SECONDS))
        return pid in self._ended

    def wait(self, pid: int) -> int:
        while pid not in self._ended:
            self._note(self._answer())
        return self._ended[pid]

    def _note(self, answer: dict[str, int]) -> None:
        self._ended[answer["ended"]] = answer["status"]

    def _answer(self) -> dict[str, int]:
        return self._answers.get(timeout=PATIENCE_SECONDS)

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._process.stdout.close()


# --- In the process that forks ----------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends: nobody else would."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    import tbjax
    import tbjax.training.loop

    tbjax.from_config  # noqa: B018 - imported when first asked for

    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            status = 1
            try:
                live(Path(asked["output"]), Path(asked["checkpoint_dir"]), asked["settings"])
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(json.dumps({"born": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


def live(output: Path, checkpoint_dir: Path, settings: dict[str, Any]) -> None:
    """A run that says on `output` what it does."""
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s", force=True)
    ours = logging.getLogger("tbjax")
    ours.setLevel(logging.INFO)
    ours.addFilter(lambda record: not record.getMessage().startswith("step "))  # those are said to the last bit
    try:
        learn(checkpoint_dir, settings)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        raise


def llama(layers: int = 2, **sizes: Any) -> "ModelConfig":
    """A few thousand numbers, or as many as its sizes ask for.

    In our own words: Hugging Face's would have to be asked for its defaults, which takes seconds.
    """
    from tbjax.config import LayerKind, ModelConfig, Rope

    little = {"vocab_size": VOCABULARY, "embed": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
    usual = {"max_positions": 1024, "rope": Rope(), "tie_embeddings": True}
    return ModelConfig(family="llama", layer_kinds=(LayerKind(),) * layers, **usual | little | sizes)


def learn(checkpoint_dir: Path, settings: dict[str, Any]) -> Any:
    import numpy as np

    import tbjax
    from tbjax.training import Batch
    from tbjax.training.config import TrainConfig
    from tbjax.training.loop import train

    class Batches:
        """Batches by their number, endless."""

        def __init__(self) -> None:
            self.position = 0

        def __iter__(self) -> Any:
            while True:
                self.position += 1
                rows = (
                    np.random.default_rng(self.position).integers(0, VOCABULARY, (ROWS, SEQUENCE + 1)).astype(np.int32)
                )
                yield Batch(rows[:, :-1], rows[:, 1:])

        def state(self) -> Any:
            return {"position": self.position}

        def restore(self, state: Any) -> None:
            self.position = state["position"]

    usual = {"steps": STEPS, "learning_rate": 1e-3, "schedule": "constant", "precision": "float32", "remat": "none"}
    config = TrainConfig(**usual | {"log_every": 1} | settings)
    model = tbjax.from_config(llama(), (1, DEVICES, 1), dtype="float32")
    return train(
        model,
        Batches(),
        config,
        checkpoint_dir=checkpoint_dir,
        progress=False,
        on_record=lambda record: print("step", record.step, float(record.loss).hex(), flush=True),
    )


if __name__ == "__main__":
    main()
