"""How fast and in how much memory a checkpoint loads: tbjax, transformers, Orbax, and the machine's own limit.

    python -m benchmarks.load                            SmolLM2 in three formats and a synthetic 1.1B model
    python -m benchmarks.load --path FOLDER_OR_FILE      a checkpoint of your own

Every loader runs in a fresh process, on (dp, fsdp, tp) = (1, 4, 2) over eight virtual devices where it is JAX's, and is
timed until every weight has been read once (see `benchmarks.contenders`). They take turns, round after round, on a warm
page cache. A ratio is taken within each round and the median of the rounds is printed, with the lowest and the highest:
on a shared machine the times swing, the ratios much less.

The limit is the fastest, in each round, of three ways to read the same bytes into fresh memory. On a virtual machine
that hands freed memory back to its host, the first touch of a page waits for the host, which may take longer than all
the rest, but not if another process has freed the page a moment ago. So every process waits a few seconds before its
clock starts (`--settle`), and all meet memory that is equally fresh. With `--backed`, each writes as much memory as
will be needed and lets it go just before: what remains is the work of the loader itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import checkpoints
from benchmarks.contenders import DEVICES, LIMITS, LOADERS, MESH

MIB = 1 << 20


class Measurement(NamedTuple):
    """One run of one contender."""

    seconds: float
    weight_bytes: int
    peak_bytes: int

    @property
    def overhead(self) -> int:
        """The most memory held beyond the weights themselves."""
        return max(0, self.peak_bytes - self.weight_bytes)


class Case(NamedTuple):
    """What is loaded, in a dtype other than its own if one is given."""

    title: str
    path: Path
    dtype: str | None = None


# Each round's measurement of each contender.
Rounds = list[dict[str, Measurement]]


def measure(contender: str, path: Path, dtype: str | None, options: argparse.Namespace) -> Measurement:
    """Run `contender` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.contenders", contender, str(path)]
    command += ["--threads", str(options.threads), "--budget", str(options.budget * MIB)]
    command += ["--dtype", dtype] if dtype else []
    command += ["--backed", str(options.backed * MIB), "--settle", str(options.settle)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} on {path} failed:\n{done.stderr}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def rounds(case: Case, contenders: Sequence[str], options: argparse.Namespace, console: Console) -> Rounds:
    """Rounds in which each contender runs once, in an order that turns with every round."""
    found = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(case.title, total=(options.rounds + 1) * len(contenders))
        # One round more, the first, fills the page cache and counts for nothing.
        for number in range(options.rounds + 1):
            turn = number % len(contenders)
            taken = {}
            for name in (*contenders[turn:], *contenders[:turn]):
                taken[name] = measure(name, case.path, case.dtype, options)
                progress.advance(task)
            if number:
                found.append(taken)
    return found


def limit(taken: dict[str, Measurement]) -> float:
    """The seconds of the fastest raw read of a round."""
    return min(taken[name].seconds for name in LIMITS)


def table(title: str, found: Rounds, loaders: Iterable[str]) -> Table:
    result = Table("", "seconds", "GB/s", "of the limit", "faster than transformers", "MiB beyond weights", title=title)
    for name in loaders:
        seconds = [taken[name].seconds for taken in found]
        result.add_row(
            name,
            f"{statistics.median(seconds):.2f}",
            f"{found[0][name].weight_bytes / statistics.median(seconds) / 1e9:.2f}",
            _spread([limit(taken) / taken[name].seconds for taken in found]),
            _spread([taken["transformers"].seconds / taken[name].seconds for taken in found]),
            str(max(taken[name].overhead for taken in found) // MIB),
        )
    seconds = statistics.median(map(limit, found))
    size = found[0][LIMITS[0]].weight_bytes
    result.add_section()
    result.add_row("limit: raw read", f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", "1", "", "")
    return result


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, help="a checkpoint to load, instead of those that are made here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the raw reads")
    parser.add_argument("--budget", type=int, default=256, help="MiB that tbjax may hold beyond the weights")
    parser.add_argument("--backed", type=int, default=0, help="MiB of memory to write before each clock starts")
    parser.add_argument(
        "--settle", type=float, default=4, help="seconds that each process waits before its clock starts"
    )
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores, {options.threads} threads, mesh {MESH}, budget {options.budget} MiB")
    with tempfile.TemporaryDirectory(prefix="tbjax-bench-") as folder:
        for case in [Case(str(options.path), options.path)] if options.path else _made(Path(folder), console):
            # Orbax reads safetensors alone, and as they are.
            whole = case.path.is_dir() and any(case.path.glob("*.safetensors")) and case.dtype is None
            loaders = LOADERS if whole else LOADERS[:-1]
            found = rounds(case, (*loaders, *LIMITS), options, console)
            console.print(table(case.title, found, loaders))


def _made(folder: Path, console: Console) -> Iterable[Case]:
    """The checkpoints of the comparison."""
    with console.status("writing the checkpoints"):
        checkpoints.smollm2(folder / "smollm2")
        checkpoints.synthetic(folder / "synthetic")
    yield Case("Llama 1.1B, bfloat16, safetensors", folder / "synthetic")
    yield Case("SmolLM2-135M, float32, safetensors", folder / "smollm2" / "safetensors")
    yield Case("SmolLM2-135M, float32 to bfloat16, safetensors", folder / "smollm2" / "safetensors", "bfloat16")
    yield Case("SmolLM2-135M, float32, .bin", folder / "smollm2" / "bin")
    yield Case("SmolLM2-135M, Q4_1, GGUF", next((folder / "smollm2" / "gguf").iterdir()), "float32")


if __name__ == "__main__":
    main()
