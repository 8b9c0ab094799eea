"""The GGUF format itself: its encodings against two implementations, and headers that cannot be trusted."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.integrations.gguf import dequant

from interop.readers import CheckpointError, base
from interop.readers import gguf as gguf_reader
from interop.readers.gguf import GGUFTensor
from interop.readers.gguf_file import PLAIN, QUANTISED, SkippedTexts, StoredTensor, read_gguf
from interop.readers.gguf_names import Placement

# Where a block has its half-precision scales; everything else in a block may be any bits.
SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(encoding: str, rows: int, columns: int) -> np.ndarray:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows, columns // block, block_bytes), dtype=np.uint8)
    for place in SCALES[encoding]:
        scales = random.normal(size=(rows, columns // block, 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def stored(path: Path, encoding: str, data: np.ndarray, shape: tuple[int, ...], **placement: Any) -> GGUFTensor:
    path.write_bytes(data.tobytes())
    row = StoredTensor("w", shape, encoding, 0, data.nbytes)
    return GGUFTensor("w", base.MappedFile(path), row, Placement("w", **placement))


@pytest.mark.parametrize("encoding", QUANTISED)
def test_an_encoding_means_what_two_implementations_say(tmp_path: Path, encoding: str) -> None:
    data = random_blocks(encoding, 7, 512)
    tensor = stored(tmp_path / "w", encoding, data, (7, 512))
    kind = GGMLQuantizationType[encoding]
    whole = tensor.read()
    assert whole.dtype == tensor.dtype == np.float32
    np.testing.assert_array_equal(whole, gguf.dequantize(data, kind))
    transformers = dequant.dequantize(torch.from_numpy(data.reshape(-1)), int(kind)).reshape(7, 512).numpy()
    # The order of a product of scales differs, and with it the last bit.
    np.testing.assert_allclose(whole, transformers, rtol=1e-6, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("encoding", QUANTISED)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_is_that_part_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, data: st.DataObject
) -> None:
    monkeypatch.setattr(gguf_reader, "CHUNK", data.draw(st.sampled_from([1, 512, 1024, 2**18])))
    order = np.random.default_rng(1).permutation(9) if data.draw(st.booleans()) else None
    tensor = stored(tmp_path / "w", encoding, random_blocks(encoding, 9, 768), (9, 768), order=order)
    rows = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted))
    columns = data.draw(st.tuples(st.integers(0, 768), st.integers(0, 768)).map(sorted))
    part = (slice(*rows), slice(*columns))
    np.testing.assert_array_equal(tensor.read(part), tensor.read()[part])


@pytest.mark.parametrize("encoding", QUANTISED)
def test_a_part_dequantises_only_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    tensor = stored(tmp_path / "w", encoding, random_blocks(encoding, 64, 512), (64, 512))
    sizes = []
    original = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(data.size) or original(data, kind))
    monkeypatch.setattr(gguf_reader, "CHUNK", 1024)
    tensor.read((slice(10, 20), slice(256, 512)))
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    assert sum(sizes) == 10 * 256 // block * block_bytes
    assert max(sizes) <= 1024 // block * block_bytes


def test_experts_are_slices_of_the_stack(tmp_path: Path) -> None:
    stack = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for expert in range(2):
        tensor = stored(tmp_path / str(expert), "F32", stack, (2, 3, 4), expert=expert)
        np.testing.assert_array_equal(tensor.read((slice(1, 3),)), stack[expert, 1:])
        assert tensor.nbytes == stack[expert].nbytes
    data = random_blocks("Q4_K", 8, 256)
    tensor = stored(tmp_path / "q", "Q4_K", data, (2, 4, 256), expert=1)
    np.testing.assert_array_equal(tensor.read(), gguf.dequantize(data[4:], GGMLQuantizationType.Q4_K))


def test_plain_numbers_are_views_of_the_file(tmp_path: Path) -> None:
    for encoding, dtype in PLAIN.items():
        array = np.arange(12).astype(dtype).reshape(3, 4)
        tensor = stored(tmp_path / encoding, encoding, array, (3, 4))
        part = tensor.read((slice(1, 3), slice(1, 2)))
        np.testing.assert_array_equal(part, array[1:3, 1:2])
        assert part.dtype == tensor.dtype == dtype
        assert not part.flags.owndata
        assert not part.flags.writeable


def sample(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.byte", 7)
    writer.add_float64("a.double", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.words", ["one", "zwei", ""])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    sample(tmp_path / "x.gguf")
    file = read_gguf(tmp_path / "x.gguf")
    assert file.architecture == "llama"
    assert {key: file.metadata[key] for key in ("a.byte", "a.double", "a.flag", "a.numbers")} == {
        "a.byte": 7,
        "a.double": 0.5,
        "a.flag": True,
        "a.numbers": [1, 2, 3],
    }
    assert file.metadata["a.words"] == SkippedTexts(3)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.offset, ours.nbytes, ours.kind) == (theirs.data_offset, theirs.n_bytes, theirs.tensor_type.name)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))


def header(
    *tensors: tuple[str, list[int], int, int], version: int = 3, metadata: bytes = b"", entries: int = 0
) -> bytes:
    """A GGUF header with tensors given as name, dimensions, encoding, offset."""
    text = b"GGUF" + struct.pack("<IQQ", version, len(tensors), entries) + metadata
    for name, shape, encoding, offset in tensors:
        text += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        text += b"".join(struct.pack("<Q", size) for size in shape) + struct.pack("<IQ", encoding, offset)
    return text + bytes(-len(text) % 32)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


F32, Q8_0, Q2_K = 0, 8, 10
BYTES = bytes(256)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "empty"),
        (b"GG", "truncated"),
        (b"GGML" + BYTES, "not a GGUF file"),
        (header(version=1), "version 1 is not supported"),
        (header(version=3 << 24), "big-endian"),
        (header(entries=1, metadata=pair(b"k", 99, b"")), "metadata 'k' has the unknown type 99"),
        (header(entries=1, metadata=pair(b"k", 9, struct.pack("<IQ", 9, 1))), "array of the unknown type 9"),
        (header(entries=1, metadata=pair(b"k", 9, struct.pack("<IQ", 8, 2**63))), "list of strings"),
        (header(entries=1, metadata=pair(b"k", 9, struct.pack("<IQQQ", 8, 2, 2**63, 1))), "list of strings"),
        (header(entries=1, metadata=pair(b"k", 9, struct.pack("<IQ", 4, 2**62))), "truncated"),
        (header(entries=1, metadata=pair(b"k", 8, struct.pack("<Q", 2**64 - 1))), "truncated"),
        (header(entries=1, metadata=pair(b"\xff", 4, bytes(4))), "not UTF-8"),
        (header(entries=2, metadata=pair(b"k", 4, bytes(4)) * 2), "'k' twice"),
        (header(entries=1, metadata=pair(b"general.alignment", 4, struct.pack("<I", 3))), "general.alignment is 3"),
        (header(entries=1, metadata=pair(b"split.count", 2, struct.pack("<H", 4))), "one of 4 parts.*merge"),
        (header(("w", [4], F32, 0)), "tensor 'w' should have 16 bytes"),
        (header(("w", [4], F32, 64)) + bytes(64), "tensor 'w' should have 16 bytes"),
        (header(("w", [4], F32, 8)) + BYTES, "tensor 'w' has offset 8, not a multiple of 32"),
        (header(("w", [4], F32, 0), ("w", [4], F32, 32)) + BYTES, "tensor 'w' is there twice"),
        (header(("v", [16], F32, 0), ("w", [4], F32, 32)) + BYTES, "tensor 'w' starts inside"),
        (header(("w", [4], 12345, 0)) + BYTES, "tensor 'w' has the unknown encoding number 12345"),
        (header(("w", [256], Q2_K, 0)) + BYTES, "tensor 'w' is encoded as Q2_K, which tbjax does not read"),
        (header(("w", [33], Q8_0, 0)) + BYTES, "tensor 'w' has shape.*not whole blocks of Q8_0"),
        (header(("w", [], Q8_0, 0)) + BYTES, "tensor 'w' has shape.*not whole blocks of Q8_0"),
        (header(("w", [0, 2**63], F32, 0)) + BYTES, "tensor 'w' has shape"),
        (header(("w", [1] * 40, F32, 0)) + BYTES, "tensor 'w' has 40 dimensions"),
    ],
)
def test_a_corrupt_header_is_an_error_that_names_file_and_tensor(tmp_path: Path, contents: bytes, message: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_gguf(file)
    assert str(file) in str(raised.value)


def test_a_vector_of_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only matrices are read quantised"):
        stored(tmp_path / "w", "Q8_0", random_blocks("Q8_0", 1, 64), (64,))


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    whole = sample(file)
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(file).tensors.values())
    for length in range(0, end, 3):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            read_gguf(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_is_refused_or_read_inside_its_bounds(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "fuzz.gguf"
    contents = bytearray(WHOLE or WHOLE.extend(sample(tmp_path / "sample.gguf")) or WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(contents) - 1))
        contents[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    file.write_bytes(contents or b"GGUF")
    try:
        read = read_gguf(file)
    except CheckpointError:
        return
    for tensor in read.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(contents)


WHOLE = bytearray()
