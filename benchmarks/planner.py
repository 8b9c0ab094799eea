"""The planner's step times beside measured ones.

    python -m benchmarks.planner                     the files in tests/data
    python -m benchmarks.planner --rows FILE.csv     rows with the columns of tests/data/vtrain_*.csv
    python -m benchmarks.planner --runs FILE.csv     rows with the columns of tests/data/measured_runs.csv
    python -m benchmarks.planner --search            how long the search for 405B on 16,384 GPUs takes

Every row is printed with its prediction and error, and after each file the mean absolute error. The constants behind
the predictions are those in `tbjax/planner/stack.py`; `benchmarks/calibrate.py` says where they come from.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measured import ROWS, RUNS, Case, Row, mean_absolute, read, row_case, run_case
from interop.families import Fields, family
from tbjax.planner.cost import mfu
from tbjax.planner.hardware import cluster
from tbjax.planner.legal import Space
from tbjax.planner.models import describe
from tbjax.planner.search import search
from tbjax.planner.workload import Workload


def show(console: Console, path: Path, make: Callable[[Row], Case], *, brief: bool) -> list[Case]:
    """Prints a file's rows, or with `brief` only its errors, and returns the cases that could be predicted."""
    table = Table(title=path.name, title_justify="left")
    table.add_column("run")
    for heading in ("measured s", "predicted s", "error", "MFU", "most of it"):
        table.add_column(heading, justify="right")
    cases = []
    for row in read(path):
        try:
            case = make(row)
            time = case.predicted()
        except ValueError as reason:  # it does not say enough, or its sizes do not divide
            named = (row.get(column) for column in ("source", "model", "hidden", "global_batch"))
            table.add_row(" ".join(name for name in named if name), "", "", "", "", str(reason))
            continue
        cases.append(case)
        longest = sorted(time.parts, key=lambda part: -time.parts[part])[:3]
        table.add_row(
            case.name,
            f"{case.measured:.3f}",
            f"{time.total:.3f}",
            f"{case.error():+.1%}",
            f"{mfu(time, case.config, case.workload, case.cluster):.1%}",
            ", ".join(f"{part} {time.parts[part] / time.total:.0%}" for part in longest),
        )
    if not brief:
        console.print(table)
    if cases:
        worst = max(cases, key=lambda case: abs(case.error()))
        console.print(
            f"{path.name}: {len(cases)} rows, mean absolute error {mean_absolute(cases):.1%}, "
            f"worst {worst.error():+.1%} ({worst.name})\n",
            highlight=False,
        )
    return cases


def show_search(console: Console) -> None:
    """Prints how long the largest search takes, for three batches so that none profits from the one before."""
    values = describe("llama-3.1-405b")
    config = family("llama").config(Fields(values, "llama-3.1-405b"))
    for batch in (2048, 1024, 4096):
        began = time.process_time()
        search(Space(config, Workload(global_batch=batch, seq_len=8192), cluster("h100:2048x8"), {"offload": ()}))
        console.print(f"405B on 16,384 H100s, batch {batch}: {time.process_time() - began:.1f} s of one core")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="files with the columns of vtrain_*.csv")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="files with the columns of measured_runs.csv")
    parser.add_argument("--brief", action="store_true", help="only the errors of each file")
    parser.add_argument("--search", action="store_true", help="time the largest search")
    given = parser.parse_args(arguments)
    if given.search:
        show_search(Console(width=160))
        return
    if not (given.rows or given.runs):
        given.rows, given.runs = list(ROWS), list(RUNS)
    console = Console(width=160)
    cases: list[Case] = []
    for path in given.rows:
        cases += show(console, path, row_case, brief=given.brief)
    for path in given.runs:
        cases += show(console, path, run_case, brief=given.brief)
    if len(given.rows) + len(given.runs) > 1:
        console.print(f"All {len(cases)} rows: mean absolute error {mean_absolute(cases):.1%}", highlight=False)


if __name__ == "__main__":
    main()
