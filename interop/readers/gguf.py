"""llama.cpp's checkpoints under the names, shapes and values that Hugging Face's have.

Conversion to GGUF renames every tensor and changes some; `gguf_names` knows what was done and here it is undone, row by
row, as a part is read. Quantised tensors are dequantised to float32, only the rows and blocks that were asked for.
"""

import dataclasses
from pathlib import Path

import numpy as np

from interop.readers.base import Checkpoint, CheckpointError, Index, MappedFile, SourceTensor, cut
from interop.readers.gguf_file import PLAIN, GGUFFile, StoredTensor, read_gguf
from interop.readers.gguf_names import Placement, placements

# Numbers dequantised at a time: the intermediate arrays then stay in the cache. Measured: twice as fast as 2**14, and
# four times as fast as the library's own sixteen rows.
CHUNK = 2**18


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file."""
    file = parse(path)
    tensors = {
        name: GGUFTensor(name, file.mapped, file.tensors[placement.stored], placement)
        for name, placement in placements(file).items()
    }
    return Checkpoint(tensors, "gguf", [file.mapped])


def parse(path: Path) -> GGUFFile:
    """The file's header; says what to install where the library is missing."""
    try:
        import gguf  # noqa: F401 - asked for here, so that the error comes before any other
    except ImportError as error:
        raise ImportError(f"{path}: reading GGUF needs the gguf library: pip install 'tbjax[gguf]'.") from error
    return read_gguf(path)


class GGUFTensor(SourceTensor):
    """A tensor, or one expert of a fused tensor, with what llama.cpp changed undone."""

    def __init__(self, name: str, mapped: MappedFile, stored: StoredTensor, placement: Placement) -> None:
        if placement.expert is not None:
            nbytes = stored.nbytes // stored.shape[0]
            offset = stored.offset + placement.expert * nbytes
            stored = dataclasses.replace(stored, shape=stored.shape[1:], nbytes=nbytes, offset=offset)
        if stored.kind not in PLAIN and len(stored.shape) != 2:
            raise CheckpointError(
                f"{mapped.path}: tensor {stored.name!r} is {stored.kind} of shape {list(stored.shape)}; "
                "only matrices are read quantised."
            )
        dtype = PLAIN["F32"] if placement.subtract_one else PLAIN.get(stored.kind, PLAIN["F32"])
        super().__init__(name, stored.shape, dtype, mapped.path, stored.nbytes)
        self._mapped = mapped
        self._stored = stored
        self._order = placement.order
        self._subtract_one = placement.subtract_one

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = self._bounds(index)
        raw = self._mapped.bytes(self._stored.offset, self._stored.offset + self.nbytes)
        if self._stored.kind in PLAIN:
            array = raw.view(PLAIN[self._stored.kind]).reshape(self.shape)
            part = cut(array[self._rows(*bounds[0])], ((None, None), *bounds[1:])) if bounds else array
        else:
            part = self._dequantised(raw, *bounds)
        return part.astype(np.float32) - np.float32(1) if self._subtract_one else part

    def prefetch(self, index: Index = ()) -> None:
        start, stop = (self._bounds(index) or ((0, 1),))[0]
        if self._order is not None and stop > start:  # scattered within their heads: near enough
            rows = self._order[start:stop]
            start, stop = int(rows.min()), int(rows.max()) + 1
        row_bytes = self.nbytes // max(self.shape[0], 1) if self.shape else self.nbytes
        self._mapped.prefetch(self._stored.offset + start * row_bytes, self._stored.offset + stop * row_bytes)

    def _rows(self, start: int, stop: int) -> slice | np.ndarray:
        """Where in the file our rows from `start` up to `stop` are."""
        return slice(start, stop) if self._order is None else self._order[start:stop]

    def _dequantised(self, raw: np.ndarray, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Float32 of the blocks that cover the columns, seen through them."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        encoding = GGMLQuantizationType[self._stored.kind]
        block, block_bytes = GGML_QUANT_SIZES[encoding]
        first, last = columns[0] // block, -(-columns[1] // block)
        blocks = raw.reshape(self.shape[0], -1, block_bytes)[:, first:last]
        width = (last - first) * block
        values = np.empty((rows[1] - rows[0], width), dtype=np.float32)
        step = max(1, CHUNK // max(width, 1))
        for start in range(rows[0], rows[1] if width else rows[0], step):
            stop = min(start + step, rows[1])
            chunk = np.ascontiguousarray(blocks[self._rows(start, stop)]).reshape(1, -1)
            with np.errstate(all="ignore"):  # a scale may be infinite or not a number: that is then what the file says
                values[start - rows[0] : stop - rows[0]] = dequantize(chunk, encoding).reshape(-1, width)
        return values[:, columns[0] - first * block : columns[1] - first * block]
