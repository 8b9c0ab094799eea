"""The GGUF format, as llama.cpp writes it: a header of typed metadata, a table of tensors, and their bytes.

The header is parsed here and not by the `gguf` library, which spends seconds on the hundred thousand strings of a
vocabulary (a few hundredths here, where they are stepped over) and trusts every length in the file. What the numbers
mean is the library's to say: block sizes, dequantisation and tensor names come from there.

Dimensions are stored fastest first, so that they arrive here reversed, in PyTorch's order.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from interop.readers.base import MOST_DIMENSIONS, CheckpointError, MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts and was in use for two months of 2023
DEFAULT_ALIGNMENT = 32

# Stored as plain numbers.
PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Stored in blocks, dequantised on reading. Each is tested against two implementations; others raise.
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

# The value types of the metadata: number -> struct format. 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class SkippedTexts:
    """What stands in the metadata for an array of strings: vocabularies and merges are the tokenizer's business."""

    count: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One row of the tensor table: where the bytes are and how they are encoded."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a key of PLAIN or one of QUANTISED
    offset: int  # from the beginning of the file
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header has been read and checked."""

    mapped: MappedFile
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def path(self) -> Path:
        return self.mapped.path

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            _corrupt(self.path, f"general.architecture is {name!r}, not a name")
        return name


def read_gguf(path: Path) -> GGUFFile:
    """Read the header and check it against the file."""
    mapped = MappedFile(path)
    cursor = _Cursor(mapped)
    if cursor.raw(len(MAGIC)) != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with {MAGIC.decode()}.")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        big_endian = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(f"{path}: GGUF version {version}{big_endian} is not supported, only {VERSIONS}.")
    tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text("a metadata key")
        if key in metadata:
            _corrupt(path, f"the metadata has {key!r} twice")
        metadata[key] = cursor.value(key)
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{path}: one of {parts} parts of a split file. Join them first: llama-gguf-split --merge FIRST_PART OUT."
        )
    table = [cursor.tensor() for _ in range(tensor_count)]
    return GGUFFile(mapped, metadata, _place(mapped, metadata, table, cursor.position))


class _Cursor:
    """Reads the header from front to back and never beyond the file."""

    def __init__(self, mapped: MappedFile) -> None:
        self.path = mapped.path
        self.position = 0
        self._view = mapped.bytes(0, mapped.size).data

    def raw(self, length: int) -> bytes:
        if length > len(self._view) - self.position:
            _corrupt(self.path, f"{length} bytes wanted at {self.position}: the file is truncated or the header wrong")
        self.position += length
        return bytes(self._view[self.position - length : self.position])

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.raw(struct.calcsize(f"<{code}")))[0]

    def text(self, what: str) -> str:
        raw = self.raw(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: corrupt header: {what} is not UTF-8: {error}.") from error

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self.text(f"metadata {key!r}")
        if kind != _ARRAY:
            _corrupt(self.path, f"metadata {key!r} has the unknown type {kind}")
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[element]}")
            return list(struct.unpack(f"<{count}{_SCALARS[element]}", self.raw(count * width)))
        if element != _TEXT:
            _corrupt(self.path, f"metadata {key!r} is an array of the unknown type {element}")
        return self._skip_texts(count)

    def tensor(self) -> tuple[str, list[int], int, int]:
        """Name, shape, encoding and offset from the beginning of the data."""
        name = self.text("a tensor's name")
        rank = self.scalar("I")
        if rank > MOST_DIMENSIONS:
            _corrupt(self.path, f"tensor {name!r} has {rank} dimensions")
        shape = [self.scalar("Q") for _ in range(rank)][::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def _skip_texts(self, count: int) -> SkippedTexts:
        length = struct.Struct("<Q")
        position = self.position
        try:
            for _ in range(count):
                position += length.size + length.unpack_from(self._view, position)[0]
        except (struct.error, OverflowError):  # beyond the file, or beyond any file
            position = len(self._view) + 1
        if position > len(self._view):
            _corrupt(self.path, "a list of strings goes on beyond the end: the file is truncated or the header wrong")
        self.position = position
        return SkippedTexts(count)


def _place(
    mapped: MappedFile, metadata: dict[str, Any], table: list[tuple[str, list[int], int, int]], header_end: int
) -> dict[str, StoredTensor]:
    """The tensors by name, each checked to lie inside the file and on nobody else's bytes."""
    path = mapped.path
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        _corrupt(path, f"general.alignment is {alignment!r}, not a power of two")
    start = -(-header_end // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, code, offset in table:
        if name in tensors:
            _corrupt(path, f"tensor {name!r} is there twice")
        kind, nbytes = _encoding(path, name, shape, code)
        if offset % alignment or start + offset + nbytes > mapped.size:
            _corrupt(
                path,
                f"tensor {name!r} should have {nbytes} bytes at {start + offset}, and the file ends at {mapped.size}"
                if not offset % alignment
                else f"tensor {name!r} has offset {offset}, not a multiple of {alignment}",
            )
        tensors[name] = StoredTensor(name, tuple(shape), kind, start + offset, nbytes)
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            _corrupt(path, f"tensor {tensor.name!r} starts inside the tensor before it")
        end = tensor.offset + tensor.nbytes
    return tensors


def _encoding(path: Path, name: str, shape: list[int], code: int) -> tuple[str, int]:
    """The name of a tensor's encoding, and how many bytes it takes in it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        encoding = GGMLQuantizationType(code)
    except ValueError:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown encoding number {code}.") from None
    if encoding.name not in PLAIN and encoding.name not in QUANTISED:
        raise CheckpointError(
            f"{path}: tensor {name!r} is encoded as {encoding.name}, which tbjax does not read; "
            f"it reads {', '.join([*PLAIN, *QUANTISED])}."
        )
    if math.prod(max(size, 1) for size in shape) >= 2**60:  # so that neither bytes nor numpy overflow
        _corrupt(path, f"tensor {name!r} has shape {shape}, more than an array can have")
    block, block_bytes = GGML_QUANT_SIZES[encoding]
    if block > 1 and (not shape or shape[-1] % block):
        _corrupt(
            path, f"tensor {name!r} has shape {shape}, whose rows are not whole blocks of {encoding.name} ({block})"
        )
    return encoding.name, math.prod(shape) // block * block_bytes


def _corrupt(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: corrupt header: {what}.")
