"""A checkpoint on its way to the disk, where it appears under its name when it is whole and not before.

    writing = Writing(folder, {"parameters": arrays}, {"about": {"step": 500}})    # a folder such as run/500
    del arrays                                                                    # the program goes on
    writing.wait()                                                                # raises what went wrong

Everything is written to a folder beside the place, `.500.partial`, by a thread of its own. When each process has
written its part and taken the digests of it, the first joins the parts, adds the manifest (`tbjax.manifest`) and
renames the folder. Whatever ends a process before that leaves under the name what was there.

The threads meet at a barrier of the coordination service, not in a collective, which would get between those of the
steps that the devices are doing meanwhile. `wait` is a collective: all processes call it, after the same steps.
"""

import contextlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tbjax import manifest, stored
from tbjax.folders import agree, in_first_process, put

# How long the processes wait for one that is still writing: as long as Orbax does.
PATIENCE_SECONDS = 1200

# What a process reports of its part, beside it.
PART = "part.process_{}"

_numbers = itertools.count()  # of the barriers


class Writing:
    """A checkpoint being written: arrays into a folder for each item, and texts, which are JSON."""

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, Mapping[str, jax.Array]],
        texts: Mapping[str, Any],
        *,
        background: bool = True,
        check: Callable[[], None] = lambda: None,
        afterwards: Callable[[], None] = lambda: None,
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Every process calls this; the first does `check` before and `afterwards` when the checkpoint is in place.

        `on_error` is told at once, from the thread, what went wrong in this process.
        """
        self.folder = folder
        self.error: Exception | None = None  # what went wrong in this process
        self._partial = partial_of(folder)
        self._arrays = tuple(arrays)
        self._texts = {item: json.dumps(value) for item, value in texts.items()}
        self._afterwards, self._on_error = afterwards, on_error
        self._number = next(_numbers)
        in_first_process(lambda: self._make_room(check))
        self._hush = contextlib.ExitStack()
        self._hush.enter_context(stored.hushed())
        self._waits: list[Callable[[], None]] = []
        try:
            for item, values in arrays.items():
                self._waits.append(stored.start(self._partial / item, values, background=background))
        except Exception as error:  # noqa: BLE001 - the first process must be told, whatever it is
            self.error = error
        self._thread = threading.Thread(target=self._finish, name=f"checkpoint {folder.name}")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this process has nothing left to do for it."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Until this process has nothing left to do for it; what went wrong is in `error`."""
        self._thread.join()

    def wait(self) -> None:
        """Until the checkpoint is in its place. Raises in every process what went wrong in the first."""
        self._thread.join()
        agree(self.error if jax.process_index() == 0 else None)

    def _make_room(self, check: Callable[[], None]) -> None:
        check()
        if self._partial.exists():  # of a process that was killed
            shutil.rmtree(self._partial)
        for item in self._arrays:
            (self._partial / item).mkdir(parents=True)

    def _finish(self) -> None:
        """In the thread: see this process's part written and, in the first, all of it in place."""
        first = jax.process_index() == 0
        try:
            self._write_part()
        except Exception as error:  # noqa: BLE001 - raised by `wait`
            self.error = error
        try:
            self._meet()
            if first and self.error is None:
                self._commit()
        except Exception as error:  # noqa: BLE001 - raised by `wait`
            self.error = self.error or error
        if self.error is not None:
            if first:
                shutil.rmtree(self._partial, ignore_errors=True)  # a full disk has use for the room
            self._on_error(self.error)
        self._hush.close()

    def _write_part(self) -> None:
        for wait in self._waits:
            try:
                wait()
            except Exception as error:  # noqa: BLE001 - raised when nothing more is being written
                self.error = self.error or error
        if self.error is not None:
            raise self.error
        process = jax.process_index()
        if process != 0:
            part = manifest.take(self._partial, process)
            (self._partial / PART.format(process)).write_text(json.dumps(part), encoding="utf-8")

    def _meet(self) -> None:
        if jax.process_count() > 1:
            meet = ocp.multihost.get_barrier_sync_fn()
            meet(key=f"tbjax-checkpoint-{self._number}", timeout_ms=PATIENCE_SECONDS * 1000)

    def _commit(self) -> None:
        parts = {}
        for process in range(1, jax.process_count()):
            report = self._partial / PART.format(process)
            if not report.exists():
                raise OSError(
                    f"process {process} could not write its part of {self.folder}: its log says why. If it says "
                    "nothing, the folder is not one that all processes share."
                )
            parts |= json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
        for item in self._arrays:
            stored.finish(self._partial / item)
        for item, text in self._texts.items():
            (self._partial / item).mkdir()
            (self._partial / item / "metadata").write_text(text, encoding="utf-8")
        manifest.seal(self._partial, parts | manifest.take(self._partial, 0))
        put(self._partial, self.folder)
        manifest.sync_folder(self.folder.parent)
        self._afterwards()


def partial_of(folder: Path) -> Path:
    """Where what is to become `folder` is written: a name on which all processes agree."""
    return folder.with_name(f".{folder.name}.partial")
