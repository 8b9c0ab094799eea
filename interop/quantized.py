"""A checkpoint's tensors as they are once quantised: readers of integers, scales and offsets for a reader of floats.

Loading copies rectangles, and a quantised weight is several parameters to copy to, so as many readers of the one tensor
are all that it takes (`interop.load`). Whatever part of a row is asked for, the row is read whole, some rows at a time
that fit a core's cache, and the scale of a channel is that of the whole row, that of a group of the whole group: on
every mesh the numbers are the same, bit for bit.

The price is that rows are read by each of the readers, the second time from the pages that the first has brought in,
and that where a mesh cuts the inputs between processes, each of these reads all of its rows.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from interop.bindings import Binding
from interop.copying import BLOCK_BYTES
from interop.readers.base import CheckpointError, Index, SourceTensor
from tbjax.quantize import numbers
from tbjax.quantize.rules import Encoding
from tbjax.quantize.weight import Parts

STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


def readers(
    binding: Binding, source: SourceTensor, encoding: Encoding
) -> Iterator[tuple[str, Binding, "QuantizedTensor"]]:
    """The parts of the weight that is bound to `source`: the name of each, how it is bound, and what reads it."""
    inputs = 0 if binding.transpose else 1  # a source is [out, in]
    shape = list(binding.shape)
    shape[inputs] = encoding.groups(shape[inputs], binding.path)
    for part in Parts._fields:
        if part == "values":
            yield part, binding, QuantizedTensor(source, encoding, part)
        elif part != "offset" or encoding.group is not None:
            yield part, binding._replace(shape=tuple(shape)), QuantizedTensor(source, encoding, part)


class QuantizedTensor(SourceTensor):
    """A tensor [out, in] of which one part is computed, row by row."""

    def __init__(self, source: SourceTensor, encoding: Encoding, part: str) -> None:
        self._source, self._encoding, self._part = source, encoding, part
        rows, columns = source.shape
        dtype, nbytes = STORED[encoding.kind], source.nbytes
        if part != "values":
            dtype, columns = np.dtype(ml_dtypes.finfo(encoding.frame_dtype).dtype), encoding.groups(columns)
            nbytes = rows * columns * dtype.itemsize  # read once more, but not counted as if it were of the file
        super().__init__(source.name, (rows, columns), dtype, source.file, nbytes)

    def prefetch(self, index: Index = ()) -> None:
        self._source.prefetch(index[:1])

    def read(self, index: Index = ()) -> np.ndarray:
        (first, last), columns = self._bounds(index)
        found = np.empty((last - first, columns[1] - columns[0]), self.dtype)
        step = max(1, BLOCK_BYTES // (4 * self._source.shape[1]))
        for start in range(first, last, step):
            stop = min(start + step, last)
            part = self._computed(start, stop)[:, slice(*columns)]
            found[start - first : stop - first] = part.astype(self.dtype)
        return found

    def _computed(self, start: int, stop: int) -> np.ndarray:
        rows = self._source.read((slice(start, stop),)).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is looked at
            scale, offset = numbers.frames(np, rows, self._encoding)
        if not np.isfinite(scale).all():
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has values that are no finite numbers in rows {start} to {stop}, "
                "which cannot be quantised: load it without quantization."
            )
        if self._part == "values":
            return numbers.integers(np, rows, scale, offset, self._encoding)
        return scale if self._part == "scale" else offset
