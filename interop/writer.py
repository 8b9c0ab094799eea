"""A checkpoint's folder, written so that it is there whole or not at all.

    with CheckpointWriter(folder, overwrite=False) as writer:
        writer.begin()                          # may the folder be written?
        writer.open("model.safetensors", {"embedding": (array.dtype, array.shape)})
        writer.write(array)                     # each tensor, in that order
        writer.close()
        writer.finish({"config.json": config})  # the other files, then the rename

Methods do not raise what goes wrong: they note it in `error`, and later ones do nothing. The caller may have others to
tell before it raises (see `interop.export`), and notes what goes wrong in its own part by `noting`.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, Self

import numpy as np

from interop.readers.open import INDEX, SAFETENSORS
from interop.readers.safetensors import DTYPES, LENGTH_BYTES, METADATA
from tbjax.folders import check_free, put

# The header is padded to a multiple of this, so that every tensor is aligned in a mapped file.
HEADER_ALIGNMENT = 8

CODES = {dtype: code for code, dtype in DTYPES.items()}

# A folder is taken for a checkpoint, and may be replaced, if it holds a config, weights, and nothing unlike these.
CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
CHAT_TEMPLATES = "additional_chat_templates"  # where a tokenizer that has several keeps all but the first
BESIDE = re.compile(r".*\.(json|jinja|model|tiktoken|txt|md)|LICENSE.*|NOTICE.*|\.gitattributes")

Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
P = ParamSpec("P")


def code(dtype: np.dtype) -> str | None:
    """What safetensors calls `dtype`, if it has it."""
    return CODES.get(dtype)


def header(layout: Layout) -> bytes:
    """The beginning of a safetensors file: its length, and the place of every tensor, in this order after it."""
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}  # transformers refuses a file that does not say so
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % HEADER_ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _noted(
    method: Callable[Concatenate["CheckpointWriter", P], None],
) -> Callable[Concatenate["CheckpointWriter", P], None]:
    """`method`, done only while nothing has gone wrong, and noting what does."""

    @functools.wraps(method)
    def careful(self: "CheckpointWriter", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.active and self.error is None:
            with self.noting():
                method(self, *args, **kwargs)

    return careful


class CheckpointWriter:
    """One checkpoint on its way to the disk. With `active=False` it does nothing."""

    def __init__(self, folder: Path, overwrite: bool, *, active: bool = True) -> None:
        # A link is followed first: renaming must replace the folder, not the link.
        self._folder = folder.expanduser().resolve()
        self._partial = self._folder.parent / f".{self._folder.name}.partial-{os.getpid()}"
        self._overwrite = overwrite
        self._file: IO[bytes] | None = None
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self.active = active
        self.error: Exception | None = None

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note in `error` what goes wrong, unless something has before."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised by the caller: whatever it is, other processes wait for this one
            self.error = self.error or error

    @_noted
    def begin(self) -> None:
        """See that the folder may be written, and make the one beside it."""
        check_free(self._folder, self._overwrite, objection)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if self._partial.exists():  # a killed process of the same number left it
            shutil.rmtree(self._partial)
        self._partial.mkdir()

    @_noted
    def open(self, file: str, layout: Layout) -> None:
        """Begin a file that holds these tensors."""
        self._file = (self._partial / file).open("wb")
        self._file.write(header(layout))
        self._weight_map |= dict.fromkeys(layout, file)
        self._bytes += sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())

    @_noted
    def write(self, tensor: np.ndarray | None) -> None:
        """The next tensor of the open file."""
        if self._file is None or tensor is None:
            raise ValueError("a tensor is written to an open file.")
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)

    @_noted
    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @_noted
    def finish(self, texts: Mapping[str, Mapping[str, Any]], tokenizer: Any = None) -> None:
        """Write the JSON files and the tokenizer's, flush everything to the disk, and put the folder in its place."""
        if set(self._weight_map.values()) != {SAFETENSORS}:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
            texts = {**texts, SAFETENSORS + INDEX: index}
        if tokenizer is not None:
            tokenizer.save_pretrained(self._partial)
        for name, contents in texts.items():  # after the tokenizer, which may bring a config.json of its own
            text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
            (self._partial / name).write_text(text, encoding="utf-8")
        _flush([*(path for path in self._partial.rglob("*")), self._partial])
        put(self._partial, self._folder)
        _flush([self._folder.parent])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not finished."""
        if self._file is not None:
            self._file.close()
        if self.active:
            shutil.rmtree(self._partial, ignore_errors=True)


def objection(folder: Path) -> str:
    """Why a folder does not look like a Hugging Face checkpoint; nothing if it does."""
    entries = sorted(folder.iterdir())
    strange = [entry.name for entry in entries if not _belongs(entry)]
    if strange:
        return f"it holds {strange[0]}"
    if not any(entry.suffix in WEIGHTS for entry in entries):
        return "it lacks weights"
    return "" if (folder / CONFIG).exists() else f"it lacks {CONFIG}"


def _belongs(entry: Path) -> bool:
    if entry.name == CHAT_TEMPLATES and entry.is_dir():
        return all(template.is_file() and template.suffix == ".jinja" for template in entry.iterdir())
    return entry.is_file() and (entry.suffix in WEIGHTS or bool(BESIDE.fullmatch(entry.name)))


def _flush(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk, so that no rename gets there before what it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
