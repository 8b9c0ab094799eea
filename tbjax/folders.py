"""A checkpoint's folder: which one may be written, how it gets into its place, and how all processes learn of failures.

A checkpoint is written beside its place and put there when it is whole, so that a run that is killed, or a disk that
fills up, leaves under the name what was there before.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

# Room for the message in which a process tells the others what went wrong.
MESSAGE_BYTES = 2048


def check_free(folder: Path, overwrite: bool, objection: Callable[[Path], str]) -> None:
    """Raise unless `folder` may be written: it is not there, or empty, or (with `overwrite`) a checkpoint.

    `objection` says what makes a folder look like something else; nothing if it is a checkpoint.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists already and is not empty: name another folder, or say overwrite=True (on the command "
            "line --overwrite) to replace it."
        )
    if why := objection(folder):
        raise FileExistsError(
            f"{folder} does not look like a checkpoint of the kind to be written ({why}), so it is not replaced even "
            "with overwrite=True: remove it yourself, or name another folder."
        )


def put(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, which is replaced if it is there."""
    if folder.exists():
        # Whoever looks between the two renames finds nothing under the name, rather than a mixture.
        old = folder.with_name(f"{_replaced(folder)}{os.getpid()}")
        folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    else:
        new.rename(folder)
    for old in set_aside(folder):
        shutil.rmtree(old)


def set_aside(folder: Path) -> list[Path]:
    """What was to be replaced under the name of `folder` and is still there, as its process was killed."""
    if not folder.parent.is_dir():
        return []
    return [entry for entry in folder.parent.iterdir() if entry.name.startswith(_replaced(folder))]


def _replaced(folder: Path) -> str:
    return f".{folder.name}.replaced-"


def in_first_process(action: Callable[[], None]) -> None:
    """Do `action` in the first process while the others wait; what goes wrong is raised in all of them."""
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as failure:  # noqa: BLE001 - raised by `agree`: whatever it is, the others wait to be told
            error = failure
    agree(error)


def agree(error: Exception | None) -> None:
    """Raise in every process what went wrong in the first. Every process calls this, the others with None."""
    if jax.process_count() > 1:
        received = _text(multihost_utils.broadcast_one_to_all(_bytes(error)))
        if received and error is None:
            raise OSError(f"the first process could not write the checkpoint. {received}")
    if error is not None:
        raise error


def agree_all(error: Exception | None) -> None:
    """Raise in every process what went wrong in any: its own, or else that of the first that has something to say."""
    if jax.process_count() > 1:
        messages = map(_text, np.asarray(multihost_utils.process_allgather(_bytes(error))))
        told = next(((process, message) for process, message in enumerate(messages) if message), None)
        if told is not None and error is None:
            raise OSError(f"process {told[0]} found: {told[1]}")
    if error is not None:
        raise error


def _bytes(error: Exception | None) -> np.ndarray:
    """A message of the same length whatever it says, as collectives need it."""
    message = "" if error is None else f"{type(error).__name__}: {error}"
    sent = np.zeros(MESSAGE_BYTES, np.uint8)
    text = np.frombuffer(message.encode()[:MESSAGE_BYTES], np.uint8)
    sent[: len(text)] = text
    return sent


def _text(received: object) -> str:
    return bytes(np.asarray(received)).rstrip(b"\0").decode(errors="replace")
