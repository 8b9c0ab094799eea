"""How fast and in how much memory SmolLM2-135M trains on this machine's CPU: tbjax beside PyTorch with transformers.

    python -m benchmarks.train                   4 x 512 tokens a step, float32, AdamW; minutes
    python -m benchmarks.train --remat none      keeping everything, in both

Both learn from the same rows (the reference that Python's help() shows) with the same settings; their losses are
compared as well. Each contender runs in a fresh process, on one device with all cores, and they take turns, round after
round: on a shared machine the times swing, the ratios within a round much less. The median of the rounds' ratios is
printed, with the lowest and the highest. A processor second is one that the system's scheduler has given to the
process: tokens for each of those hardly depend on what else the machine does.

What the backward pass computes again is said in each title. full: each layer keeps its input alone, `remat="full"` here
and `gradient_checkpointing_enable()` there. none: both keep everything. dots: what matmuls give is kept. cheap: what is
wide or dear is kept, and what costs little is computed again (`benchmarks.trainers.REMATS`). PyTorch has nothing like
the last two, and keeps everything beside them.

Memory is anonymous memory of the whole process at its peak, the interpreter and the libraries' own included, from
before the weights are read to the last step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.trainers import CONTENDERS, REMATS

MIB = 1 << 20

# The aim: at least as many tokens/s, in at most this part of the memory.
WANTED_SPEED, WANTED_MEMORY = 1.0, 0.6


def measure(contender: str, remat: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `contender` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.trainers", contender, "--remat", remat]
    for name in ("rows", "sequence", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def rounds(remat: str, options: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """Each round's result of each contender; who goes first alternates."""
    found = []
    for number in range(options.rounds):
        order = list(CONTENDERS)[:: 1 if number % 2 == 0 else -1]
        found.append({name: measure(name, remat, options) for name in order})
    return found


def table(remat: str, found: Sequence[dict[str, dict[str, Any]]]) -> Table:
    figures = {"tokens_per_second": 1, "tokens_per_processor_second": 1, "peak_bytes": MIB}
    result = Table("", "tokens/s", "tokens/processor s", "peak MiB", title=f"remat: {remat}")
    for name in CONTENDERS:
        medians = [statistics.median(taken[name][figure] for taken in found) / unit for figure, unit in figures.items()]
        result.add_row(name, *(f"{median:.0f}" for median in medians))
    result.add_section()
    ratios = [[taken["tbjax"][figure] / taken["transformers"][figure] for taken in found] for figure in figures]
    result.add_row("tbjax / transformers", *map(_spread, ratios))
    result.add_row("wanted", f"at least {WANTED_SPEED}", "", f"at most {WANTED_MEMORY}")
    return result


def difference(found: Sequence[dict[str, dict[str, Any]]]) -> float:
    """The largest relative difference between the two losses of any step."""
    return max(
        float(np.max(np.abs(np.divide(taken["tbjax"]["losses"], taken["transformers"]["losses"]) - 1)))
        for taken in found
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="of each run, the first two of which are not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remat", nargs="+", choices=REMATS, default=["cheap", "full"])
    options = parser.parse_args()
    console = Console(width=110)
    console.print(f"{os.cpu_count()} cores; {options.rows} x {options.sequence} tokens a step, {options.steps} steps")
    for remat in options.remat:
        found = rounds(remat, options)
        console.print(table(remat, found))
        console.print(f"losses differ by at most {difference(found):.1e}, relatively\n")


if __name__ == "__main__":
    main()
