"""The safetensors format: eight bytes of length, that many bytes of JSON, then the numbers of every tensor.

The header is read by a strict parser of our own: every byte after the header belongs to one tensor and none to two, as
the format's library also demands, and what is wrong is said together with the tensor it is wrong about.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from interop.readers.base import MOST_DIMENSIONS, CheckpointError, MappedFile, MappedTensor

DTYPES: dict[str, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}

# The format's own limit. A length beyond it is a corrupt file or an attack on the JSON parser's memory.
LONGEST_HEADER = 100_000_000
LENGTH_BYTES = 8
METADATA = "__metadata__"


def read_safetensors(path: Path) -> tuple[MappedFile, list[MappedTensor]]:
    """The file and its tensors, in the order of their bytes. Raises unless every byte is accounted for."""
    file = MappedFile(path)
    header, start = _header(file)
    tensors: list[tuple[int, int, MappedTensor]] = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        dtype, shape, first, last = _entry(path, name, entry)
        if start + last > file.size:
            _corrupt(
                path,
                f"tensor {name!r} has data_offsets up to {last}, but only {file.size - start} bytes follow the header: "
                "the file is truncated or the header is wrong",
            )
        tensors.append((first, last, MappedTensor(name, shape, dtype, file, start + first)))
    tensors.sort(key=lambda placed: placed[:2])
    end = 0
    for first, last, tensor in tensors:
        if first < end:
            _corrupt(
                path, f"tensor {tensor.name!r} starts at byte {first}, inside the tensor before it, which ends at {end}"
            )
        if first > end:
            _corrupt(path, f"bytes {end} to {first}, before tensor {tensor.name!r}, belong to no tensor")
        end = last
    if start + end != file.size:
        _corrupt(path, f"{file.size - start - end} bytes after the last tensor belong to no tensor")
    return file, [tensor for _, _, tensor in tensors]


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The JSON object at the file's beginning, and where the numbers start."""
    path = file.path
    if file.size < LENGTH_BYTES:
        _corrupt(path, f"{file.size} bytes are too few for a header: the file is truncated")
    length = int.from_bytes(file.bytes(0, LENGTH_BYTES).tobytes(), "little")
    if length > LONGEST_HEADER:
        _corrupt(path, f"the header's length is given as {length} bytes, above the limit of {LONGEST_HEADER}")
    start = LENGTH_BYTES + length
    if start > file.size:
        _corrupt(path, f"the header should have {length} bytes, the file has {file.size} in all: the file is truncated")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                _corrupt(path, f"the header has {key!r} twice")
            seen[key] = value
        return seen

    text = file.bytes(LENGTH_BYTES, start).tobytes()
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt header: not JSON: {error}.") from error
    if not isinstance(header, dict):
        _corrupt(path, f"the header is a JSON {type(header).__name__}, not an object")
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, f"{METADATA} must map strings to strings")
    return header, start


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """One tensor's dtype, shape and byte range, which agree with each other."""
    if not name.isprintable():
        # Also keeps half surrogate pairs, which JSON can spell and nothing can print, out of later messages.
        _corrupt(path, f"a tensor's name is {name!a}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _corrupt(path, f"tensor {name!r} must have exactly dtype, shape and data_offsets, not {_brief(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {_brief(code)}; tbjax reads {', '.join(DTYPES)}."
        )
    dtype = DTYPES[code]
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        _corrupt(path, f"tensor {name!r} has shape {_brief(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _corrupt(path, f"tensor {name!r} has data_offsets {_brief(offsets)}, not [start, stop]")
    if len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        _corrupt(path, f"tensor {name!r} has shape {_brief(shape)}, more than an array can have")
    first, last = offsets
    needed = math.prod(shape) * dtype.itemsize
    if last - first != needed:
        _corrupt(
            path,
            f"tensor {name!r} has data_offsets {offsets}, {last - first} bytes, but {code} {shape} takes {needed}",
        )
    return dtype, shape, first, last


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _brief(value: Any) -> str:
    """A value from a corrupt file, short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _corrupt(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: corrupt header: {what}.")
