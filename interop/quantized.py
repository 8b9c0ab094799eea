"""A checkpoint's tensors as they are once quantised: readers of integers and of scales, where a reader of floats is.

Loading copies rectangles, and a quantised weight is two parameters to copy to, so two readers of the one tensor are all
that it takes (`interop.load`). Whatever part of a row is asked for, the row is read whole, as much of it as fits a
core's cache at a time, and its scale is that of the whole row: on every mesh the numbers are the same, bit for bit.

The price is that rows are read by both, the second time from the pages that the first has brought in, and that where a
mesh cuts the inputs between processes, each of these reads all of its rows.
"""

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from interop.bindings import Binding
from interop.copying import BLOCK_BYTES
from interop.readers.base import CheckpointError, Index, SourceTensor
from tbjax.quantize import numbers
from tbjax.quantize.rules import Encoding

STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


class _Quantized(SourceTensor):
    """A tensor [out, in] of which something is computed, row by row."""

    def __init__(self, source: SourceTensor, encoding: Encoding, columns: int, dtype: np.dtype, nbytes: int) -> None:
        super().__init__(source.name, (source.shape[0], columns), dtype, source.file, nbytes)
        self._source = source
        self._encoding = encoding

    def prefetch(self, index: Index = ()) -> None:
        self._source.prefetch(index[:1])

    def _computed(self, index: Index, compute: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        (first, last), columns = self._bounds(index)
        found = np.empty((last - first, columns[1] - columns[0]), self.dtype)
        for start, stop in _steps(first, last, 4 * self._source.shape[1]):
            rows = self._source.read((slice(start, stop),)).astype(np.float32)
            scale = numbers.scales(np, rows, self._encoding)
            if not np.isfinite(scale).all():
                raise CheckpointError(
                    f"{self.file}: tensor {self.name!r} has values that are no finite numbers in rows {start} to "
                    f"{stop}: they cannot be quantised. Load it without quantization, or mend the checkpoint."
                )
            found[start - first : stop - first] = compute(rows, scale)[:, slice(*columns)].astype(self.dtype)
        return found


class Values(_Quantized):
    """The integers of a tensor."""

    def __init__(self, source: SourceTensor, encoding: Encoding) -> None:
        super().__init__(source, encoding, source.shape[1], STORED[encoding.kind], source.nbytes)

    def read(self, index: Index = ()) -> np.ndarray:
        return self._computed(index, lambda rows, scale: numbers.integers(np, rows, scale, self._encoding))


class Scale(_Quantized):
    """The scales of a tensor."""

    def __init__(self, source: SourceTensor, encoding: Encoding) -> None:
        dtype, columns = np.dtype(ml_dtypes.finfo(encoding.scale_dtype).dtype), encoding.groups(source.shape[1])
        super().__init__(source, encoding, columns, dtype, source.shape[0] * columns * dtype.itemsize)

    def read(self, index: Index = ()) -> np.ndarray:
        return self._computed(index, lambda rows, scale: scale)


def scale_binding(binding: Binding, encoding: Encoding) -> Binding:
    """How a weight's scales are bound, where the weight is bound like this."""
    inputs = 0 if binding.transpose else 1
    shape = list(binding.shape)
    shape[inputs] = encoding.groups(shape[inputs], binding.path)
    return binding._replace(shape=tuple(shape))


def _steps(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // max(width, 1))
    for start in range(first, last, step):
        yield start, min(start + step, last)
