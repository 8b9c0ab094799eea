"""From a source tensor into host arrays, at the speed of memory.

A row of a matrix is usually split between devices, so its bytes go to several places. The rows are taken in blocks that
fit a core's cache: a block comes in from the mapped file once, and each device's columns are copied from it while it is
there. Plain numpy assignments do that as fast as anything else tried (reading into a buffer with `preadv` and
scattering from there, `preadv` with a destination for each row, asking for the pages beforehand): next to the first
touch of the fresh pages that are written to, all the ways of reading a warm file are cheap. numpy lets go of the
interpreter lock meanwhile, so threads help.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from interop.readers.base import CheckpointError, Index, SourceTensor
from tbjax.dtypes import narrows

# Bytes of a source that are copied to all their destinations before the next: what a core's second-level cache holds.
BLOCK_BYTES = 1 << 20

# Edge of the squares in which a matrix is transposed: source and destination of one stay in the first-level cache.
SQUARE = 64

# Copies between equal dtypes go by unsigned integers: numpy moves those in bulk, while dtypes that it does not know of
# itself (bfloat16, float8) may go one by one.
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Move(NamedTuple):
    """A rectangle of a source tensor, and the view that it is to fill, which is turned as the source is."""

    source: Index
    target: np.ndarray


def fill(source: SourceTensor, moves: Sequence[Move]) -> None:
    """Carry out `moves`, converting to the dtype of each target."""
    for block in blocks(moves, source.dtype.itemsize, BLOCK_BYTES):
        around = _around(block)
        values = source.read(around)
        for index, target in block:
            relative = tuple(slice(i.start - a.start, i.stop - a.start) for i, a in zip(index, around, strict=True))
            try:
                copy(target, values[relative])
            except FloatingPointError as error:
                raise CheckpointError(
                    f"{source.file}: tensor {source.name!r} has values beyond the range of {target.dtype}: {error}. "
                    "Load it with a dtype that can hold them, such as float32."
                ) from error


def blocks(moves: Sequence[Move], itemsize: int, limit: int) -> Iterator[list[Move]]:
    """The moves cut along the source's rows, so that all that touch the same `limit` bytes or so come together."""
    if not moves:
        return
    around = _around(moves)
    width = itemsize
    for span in around[1:]:
        width *= span.stop - span.start
    step = max(1, limit // max(width, 1))
    cuts: dict[int, list[Move]] = {}
    for index, target in moves:
        first, last = index[0].start, index[0].stop
        for block in range(first // step, -(-last // step)):
            start, stop = max(first, block * step), min(last, (block + 1) * step)
            cut = Move((slice(start, stop), *index[1:]), target[start - first : stop - first])
            cuts.setdefault(block, []).append(cut)
    for block in sorted(cuts):
        yield cuts[block]


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`. Raises FloatingPointError where a finite number does not stay one (1e6 as a float16)."""
    if target.dtype == source.dtype:
        unsigned = UNSIGNED[target.dtype.itemsize]
        target, source = target.view(unsigned), source.view(unsigned)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if target.ndim == 2 and _goes_down(target) != _goes_down(source):
            for row in range(0, target.shape[0], SQUARE):
                for column in range(0, target.shape[1], SQUARE):
                    square = slice(row, row + SQUARE), slice(column, column + SQUARE)
                    np.copyto(target[square], source[square], casting="unsafe")
        else:
            np.copyto(target, source, casting="unsafe")
    if narrows(source.dtype, target.dtype):
        _check_finite(target, source)


def aligned(shape: Sequence[int], dtype: np.dtype, *, zeroed: bool = False) -> np.ndarray:
    """A new array whose memory JAX's CPU backend takes over as it is (which needs 64-byte alignment)."""
    alignment = 64
    size = math.prod(shape) * dtype.itemsize
    memory = (np.zeros if zeroed else np.empty)(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def passing(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A new array of zeros whose memory goes back to the system the moment it is let go.

    The allocator would keep it for its next use, in an arena for each thread, so that what many short-lived pieces of
    different sizes hold could grow to several times what is in use.
    """
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).view(dtype).reshape(shape)


def _check_finite(target: np.ndarray, source: np.ndarray) -> None:
    """Raise if a finite number of `source` is none in `target`.

    Not every cast sets the processor's overflow flag (those of ml_dtypes do not), so the result is looked at, as
    integers, which is quick: whatever is beyond the largest number is infinite or not a number.
    """
    largest = np.array(ml_dtypes.finfo(target.dtype).max, target.dtype)
    unsigned = UNSIGNED[target.dtype.itemsize]
    magnitudes = target.view(unsigned) & unsigned(np.iinfo(unsigned).max >> 1)  # without the sign
    if magnitudes.max(initial=0) <= largest.view(unsigned):
        return
    lost = np.isfinite(source) & ~np.isfinite(target)
    if lost.any():
        raise FloatingPointError(f"{source[lost][0]} is beyond ±{largest}")


def _goes_down(array: np.ndarray) -> bool:
    """Whether neighbours in memory are neighbours in a column rather than in a row."""
    return array.strides[0] < array.strides[1]


def _around(moves: Sequence[Move]) -> Index:
    """The smallest rectangle of the source that holds all moves."""
    return tuple(
        slice(min(span.start for span in spans), max(span.stop for span in spans))
        for spans in zip(*(move.source for move in moves), strict=True)
    )
