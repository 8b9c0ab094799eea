"""What a checkpoint looks like before any of it is read.

Every format comes down to the same thing: names, and for each name a shape, a dtype and a way to get at a rectangle
of it. `Checkpoint` is the mapping of names, `SourceTensor` the rest. Opening a checkpoint reads headers only and checks
them against the files, so that whatever is wrong with a file is said before the first byte of a weight is touched.

Files are mapped, not read: `SourceTensor.read` answers with a numpy view onto the mapping wherever the format stores
plain numbers. The view costs no memory of its own; touching it is what reads the disk, and the pages are the kernel's
to drop again. Reading from several threads at once is fine.
"""

import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

Format = Literal["safetensors", "torch", "gguf", "memory"]
Index = tuple[slice, ...]

# numpy refuses arrays of more dimensions than this (32 before numpy 2.0), and no checkpoint has them.
MOST_DIMENSIONS = 32


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it stands. The message names the file, and the tensor where there is one."""


class UntrustedPickle(CheckpointError):
    """A pickle that nobody has allowed to be opened; `file` says which."""

    def __init__(self, file: str) -> None:
        super().__init__(
            f"{file}: this is a pickle, which can carry a program. If you trust where it comes from, allow it with "
            "trust_pickle=True (on the command line --trust-pickle). A safetensors file of the same weights avoids the "
            "question."
        )
        self.file = file


class SourceTensor(ABC):
    """One tensor of a checkpoint, not yet read."""

    def __init__(self, name: str, shape: Sequence[int], dtype: np.dtype, file: Path, nbytes: int) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype  # of what `read` returns; bfloat16 and float8 are ml_dtypes'
        self.file = file
        self.nbytes = nbytes  # in the file: less than `shape` and `dtype` say where it is quantised

    @abstractmethod
    def read(self, index: Index = ()) -> np.ndarray:
        """The rectangle at `index` (one slice a dimension, missing ones take all), a view of the file where possible.

        The result is not to be written to. Slices lie inside the tensor and have step one.
        """

    def prefetch(self, index: Index = ()) -> None:  # noqa: B027 - doing nothing is right where there is no file to read ahead
        """Ask the system to start reading what `read(index)` will touch. Returns at once; a hint, nothing more."""

    def _bounds(self, index: Index) -> tuple[tuple[int, int], ...]:
        """`index` as (start, stop) for each dimension; raises where it leaves the tensor."""
        if len(index) > len(self.shape):
            raise IndexError(f"{self}: an index of {len(index)} dimensions.")
        bounds = []
        for dimension, size in enumerate(self.shape):
            part = index[dimension] if dimension < len(index) else slice(None)
            start = 0 if part.start is None else part.start
            stop = size if part.stop is None else part.stop
            if not 0 <= start <= stop <= size or part.step not in (None, 1):
                raise IndexError(f"{self}: {part} in dimension {dimension} is not a range inside it.")
            bounds.append((start, stop))
        return tuple(bounds)

    def __repr__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype} in {self.file.name}"


def cut(array: np.ndarray, bounds: Sequence[tuple[int | None, int | None]]) -> np.ndarray:
    """The rectangle of `array` within `bounds`, as a view."""
    # The ellipsis keeps an array of no dimensions an array, where numpy would make it a scalar.
    return array[(*(slice(start, stop) for start, stop in bounds), ...)]


class Checkpoint(Mapping[str, SourceTensor]):
    """All tensors of one checkpoint, over all its files. Closing it lets the files go once no view of them is left."""

    def __init__(self, tensors: Mapping[str, SourceTensor], form: Format, files: "Sequence[MappedFile]" = ()) -> None:
        self._tensors = dict(tensors)
        self._files = tuple(files)
        self.format: Format = form

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        self._tensors = {}
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.format} checkpoint of {len(self)} tensors>"


class MappedFile:
    """A file as a read-only array of bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise CheckpointError(f"{path}: the file is empty.")
                self._mapping: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}.") from error

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """The bytes from `start` up to `stop`, which the caller has checked, as a view."""
        if self._mapping is None:
            raise ValueError(f"{self.path}: the checkpoint has been closed.")
        return np.frombuffer(self._mapping, dtype=np.uint8, count=stop - start, offset=start)

    def prefetch(self, start: int, stop: int) -> None:
        """Tell the kernel that these bytes will be wanted."""
        if self._mapping is None or not hasattr(mmap, "MADV_WILLNEED") or start >= stop:
            return
        start -= start % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_WILLNEED, start, min(stop, self.size) - start)

    def close(self) -> None:
        # Views hold the mapping for as long as they live, so there is nothing to unmap by force.
        self._mapping = None


class MappedTensor(SourceTensor):
    """A tensor stored as plain numbers, row after row, at `offset` in a mapped file."""

    def __init__(self, name: str, shape: Sequence[int], dtype: np.dtype, file: MappedFile, offset: int) -> None:
        super().__init__(name, shape, dtype, file.path, math.prod(shape) * dtype.itemsize)
        self.offset = offset
        self._mapped = file

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = self._bounds(index)
        whole = self._mapped.bytes(self.offset, self.offset + self.nbytes).view(self.dtype).reshape(self.shape)
        return cut(whole, bounds)

    def prefetch(self, index: Index = ()) -> None:
        rows = self._bounds(index)[:1] or ((0, 1),)
        row_bytes = self.nbytes // max(self.shape[0], 1) if self.shape else self.nbytes
        self._mapped.prefetch(self.offset + rows[0][0] * row_bytes, self.offset + rows[0][1] * row_bytes)
