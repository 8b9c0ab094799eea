"""Arrays that are already in memory, behind the same face as a checkpoint on disk: live PyTorch models, tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from interop.readers.base import Checkpoint, Index, SourceTensor, cut

# What stands for a file name in error messages.
MEMORY = Path("<memory>")


class MemoryCheckpoint(Checkpoint):
    """A checkpoint of the arrays given; nothing is copied."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__({name: ArrayTensor(name, array) for name, array in arrays.items()}, "memory")


class ArrayTensor(SourceTensor):
    """A tensor that is an array already; `file` is where it came from."""

    def __init__(self, name: str, array: np.ndarray, file: Path = MEMORY) -> None:
        super().__init__(name, array.shape, array.dtype, file, array.nbytes)
        self._array = array.view()
        self._array.flags.writeable = False

    def read(self, index: Index = ()) -> np.ndarray:
        return cut(self._array, self._bounds(index))
