"""Where the constants of the planner's cost model come from: a fit to measured training runs, and a test of the fit.

    python -m benchmarks.calibrate

Eight constants, each with a meaning (`tbjax/planner/stack.py`), are fitted at once to the vTrain authors' single-node
and multi-node rows. What is minimised is the relative error, with large errors counted linearly, so that a few runs on
a congested network do not bend the constants; both files weigh the same. Each constant has a prior, from what is known
of the device without these runs, which decides where the rows say nothing.

Then the test: each hidden size is left out in turn and predicted with constants fitted to the other two, and so is each
degree of tensor parallelism and each size of a microbatch. All single-node rows have one hidden size, and only they are
so small that the host is the bottleneck: without them nothing but the prior says how fast it is.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from benchmarks.measured import ROWS, Case, mean_absolute, read, row_case
from tbjax.planner.stack import MEGATRON_2021, Stack


class Prior(NamedTuple):
    """What is believed of a constant beforehand: its value, and by what share it may well be off."""

    value: float
    spread: float


PRIORS: Mapping[str, Prior] = {
    "matmul_fraction": Prior(0.8, 0.1),  # cuBLAS's best on an A100: about 250 of 312 TFLOP/s
    "matmul_half": Prior(150, 0.4),  # FLOP/s over bytes/s of an A100: a product that thin is as slow as its memory
    "memory_fraction": Prior(0.75, 0.1),  # copies reach 0.85 to 0.9, kernels with arithmetic less
    "link_fraction": Prior(0.76, 0.1),  # NCCL all-reduces among eight A100s: 229 of 300 GB/s
    "network_fraction": Prior(0.8, 0.15),  # RDMA's headers, and several rings sharing an adapter
    "collective_start": Prior(35e-6, 0.4),  # NCCL all-reduces of 1 to 4 MB, less their bytes and steps
    "kernel_gap": Prior(6e-6, 0.5),
    "host_per_kernel": Prior(40e-6, 0.4),  # PyTorch's dispatch, autograd and Megatron's Python
}

# Relative errors beyond this count linearly: the spread of repeated measurements.
_ORDINARY_ERROR = 0.06

# The 720 single-node rows are few measurements many times over (they are linear in layers and microbatches): every
# eighth is as good as all, and each file counts as so many independent observations.
_STRIDE = 8
_OBSERVATIONS = 45


def cases() -> list[Case]:
    """Every measured row."""
    return [row_case(row) for path in ROWS for row in read(path)]


def fit(measured: Sequence[Case]) -> Stack:
    """The constants that explain these rows best."""
    single = [case for case in measured if case.cluster.hosts == 1][::_STRIDE]
    multi = [case for case in measured if case.cluster.hosts > 1]
    rows = [*single, *multi]
    weights = np.array([math.sqrt(_OBSERVATIONS / len(part)) for part in (single, multi) for _ in part])
    spreads = np.array([prior.spread for prior in PRIORS.values()])

    def residuals(steps: np.ndarray) -> np.ndarray:
        stack = _stack(steps * spreads)
        errors = np.array([math.log(case.predicted(stack).total / case.measured) for case in rows])
        large = np.sqrt(1 + (errors / _ORDINARY_ERROR) ** 2)
        return np.concatenate([np.sign(errors) * np.sqrt(2 * (large - 1)) * weights, steps])

    return _stack(least_squares(residuals, np.zeros(len(PRIORS)), xtol=1e-4, ftol=1e-4).x * spreads)


def _stack(exponents: np.ndarray) -> Stack:
    moved = {name: prior.value * math.exp(step) for (name, prior), step in zip(PRIORS.items(), exponents, strict=True)}
    return dataclasses.replace(MEGATRON_2021, **moved)


# By what rows are left out.
KEYS: Mapping[str, Callable[[Case], int]] = {
    "hidden": lambda case: case.config.embed,
    "tp": lambda case: case.layout.tp,
    "microbatch": lambda case: case.layout.rows(case.workload),
}


class Blind(NamedTuple):
    """A prediction of rows that the constants have not seen."""

    stack: Stack
    rows: list[Case]

    @property
    def error(self) -> float:
        return mean_absolute(self.rows, self.stack)


def left_out(measured: Sequence[Case], key: Callable[[Case], int]) -> dict[int, Blind]:
    """For each value of `key`, the constants fitted without the rows that have it, and those rows."""
    return {
        value: Blind(
            fit([case for case in measured if key(case) != value]), [case for case in measured if key(case) == value]
        )
        for value in sorted({key(case) for case in measured})
    }


def blind_error(blind: Mapping[int, Blind], *, several_nodes: bool) -> float:
    """The mean absolute error over all rows of one file, each predicted without those that are like it."""
    errors = [
        abs(case.error(part.stack))
        for part in blind.values()
        for case in part.rows
        if (case.cluster.hosts > 1) is several_nodes
    ]
    return statistics.fmean(errors)


def main() -> None:
    console, measured = Console(width=120), cases()
    fitted = fit(measured)
    blind = {name: left_out(measured, key) for name, key in KEYS.items()}
    without = blind["hidden"]
    table = Table(title="Constants: prior, fitted, fitted without one hidden size")
    for heading in ("", "prior", "fitted", *(f"without {hidden}" for hidden in without), "in use"):
        table.add_column(heading, justify="right")
    for name, prior in PRIORS.items():
        stacks = (fitted, *(part.stack for part in without.values()), MEGATRON_2021)
        table.add_row(name, *(f"{value:.4g}" for value in (prior.value, *(getattr(s, name) for s in stacks))))
    console.print(table)
    errors = Table(title="Mean absolute error")
    for heading in ("rows", "constants in use", "fitted to all", "fitted without them"):
        errors.add_column(heading, justify="right")
    for key, parts in blind.items():
        for value, part in parts.items():
            found = mean_absolute(part.rows), mean_absolute(part.rows, fitted), part.error
            errors.add_row(f"{key} {value} ({len(part.rows)})", *(f"{error:.1%}" for error in found))
        errors.add_section()
    for name, several in (("single-node", False), ("multi-node", True)):
        rows = [case for case in measured if (case.cluster.hosts > 1) is several]
        for key, parts in blind.items():
            found = mean_absolute(rows), mean_absolute(rows, fitted), blind_error(parts, several_nodes=several)
            errors.add_row(f"{name} ({len(rows)}), by {key}", *(f"{error:.1%}" for error in found))
    console.print(errors)


if __name__ == "__main__":
    main()
