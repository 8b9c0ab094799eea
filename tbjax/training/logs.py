"""Where a run's figures go: a progress line in the terminal, a file of JSON lines, TensorBoard.

Only the first process writes. A line of the JSON file is one moment: `{"step": 10, "loss": 3.1, ...}` of training, or
`{"step": 10, "evaluation_loss": 3.2, "perplexity": 24.5, ...}`. A resumed run appends to the same file.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tbjax.placement import readable


class Log:
    """Something that is told what is known after a step."""

    def advance(self, step: int) -> None:
        """Step `step` is done, and nothing more is known of it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """After step `step` these are the figures."""

    def close(self) -> None:
        """There will be no more."""


class JsonLines(Log):
    """A file of JSON objects, one a line, each on disk as soon as it is written."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity: null, as browsers and jq can read it.
        plain = {name: value if abs(value) < float("inf") else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard(Log):
    """Event files that TensorBoard shows, by tensorboardX, which needs no TensorFlow."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"tensorboard={str(folder)!r} needs the package tensorboardX: pip install 'tbjax[tensorboard]'."
            ) from error
        self._writer: Any = SummaryWriter(str(Path(folder).expanduser()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class ProgressLine(Log):
    """A line that says how far the run is; nothing where no terminal shows it."""

    def __init__(self, steps: int, done: int, *, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # Estimated over many steps: one that compiles or saves says little of the next.
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, figures="compiling")
        self._bar.start()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, figures=figures(values))

    def close(self) -> None:
        self._bar.stop()


class Logs(Log):
    """All of a run's logs as one, closed together at the end of a `with` block."""

    def __init__(self, logs: Iterable[Log]) -> None:
        self._logs = list(logs)

    def advance(self, step: int) -> None:
        for log in self._logs:
            log.advance(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as closing:  # all of them, whatever one of them raises
            for log in self._logs:
                closing.callback(log.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def writes() -> bool:
    """Whether this process is the one that writes logs."""
    return jax.process_index() == 0


def figures(values: Mapping[str, float]) -> str:
    """What a record says, in one short line."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "evaluation_loss" in values:
        parts.append(f"evaluation loss {values['evaluation_loss']:.4f}, perplexity {values['perplexity']:.4g}")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%} (causal)")
    if "memory" in values:
        parts.append(readable(int(values["memory"])))
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0f} skipped")
    return " · ".join(parts)
