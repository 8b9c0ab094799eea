"""The safetensors reader: exact on good files, precise about bad ones, and never anything else."""

import json
import mmap
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interop.readers import CheckpointError, open_checkpoint
from interop.readers.safetensors import DTYPES, LONGEST_HEADER

# One file is rewritten per example; hypothesis need not fear that the folder is shared between examples.
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_every_tensor_equals_what_the_library_reads(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        name: random.integers(0, 2 if kind == np.bool_ else 100, shape).astype(kind)
        for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)
        for shape in ((), (0,), (3,), (4, 5), (2, 0, 3), (2, 3, 4))
        for name in [f"{np.dtype(kind).name}.{shape}"]
    }
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, file, metadata={"format": "np"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.keys() == arrays.keys()
        for name, expected in safetensors.numpy.load_file(file).items():
            tensor = checkpoint[name]
            assert (tensor.shape, tensor.dtype, tensor.nbytes, tensor.file) == (
                expected.shape,
                expected.dtype,
                expected.nbytes,
                file,
            )
            np.testing.assert_array_equal(tensor.read(), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_floats_are_read_bit_for_bit(tmp_path: Path, kind: torch.dtype) -> None:
    tensor = torch.randn(6, 4).to(kind)
    safetensors.torch.save_file({"w": tensor}, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path)["w"].read()
    assert read.dtype.name == str(kind).removeprefix("torch.")
    bits = tensor.view(torch.uint16 if kind is torch.bfloat16 else torch.uint8).numpy()
    np.testing.assert_array_equal(read.view(bits.dtype), bits)


def test_a_part_is_a_view_of_the_file_and_nothing_is_copied(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    safetensors.numpy.save_file({"w": array}, tmp_path / "model.safetensors")
    tensor = open_checkpoint(tmp_path)["w"]
    part = tensor.read((slice(1, 3), slice(None), slice(2, 4)))
    np.testing.assert_array_equal(part, array[1:3, :, 2:4])
    assert not part.flags.owndata
    assert not part.flags.writeable
    base = part
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap | memoryview)
    np.testing.assert_array_equal(tensor.read((slice(2, 2),)), array[2:2])


@pytest.mark.parametrize(
    "index", [(slice(0, 4),), (slice(-1, 2),), (slice(2, 1),), (slice(0, 3, 2),), (slice(None),) * 3]
)
def test_an_index_outside_the_tensor_raises_and_names_it(tmp_path: Path, index: tuple[slice, ...]) -> None:
    safetensors.numpy.save_file({"some.weight": np.zeros((3, 3))}, tmp_path / "model.safetensors")
    tensor = open_checkpoint(tmp_path)["some.weight"]
    with pytest.raises(IndexError, match=r"some\.weight"):
        tensor.read(index)


def test_prefetch_takes_any_part(tmp_path: Path) -> None:
    arrays = {"w": np.zeros((100, 100)), "scalar": np.array(1.0), "empty": np.zeros((0, 3))}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for tensor in checkpoint.values():
        tensor.prefetch()
    checkpoint["w"].prefetch((slice(7, 100), slice(3, 4)))
    checkpoint["w"].prefetch((slice(7, 7),))


def test_views_outlive_the_checkpoint_but_reading_ends_with_it(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(5)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint["w"]
        view = tensor.read()
    np.testing.assert_array_equal(view, np.ones(5))
    assert len(checkpoint) == 0
    with pytest.raises(ValueError, match="closed"):
        tensor.read()


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[1,5]}}'
    )
    write(tmp_path / "model.safetensors", header + b" " * (len(header) % 2), b"\x07" + np.float32([1, 2]).tobytes()[:4])
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint["a"].read().tolist() == [7]
    assert checkpoint["b"].read().astype(np.float32).tolist() == [0, np.float32(1).astype(ml_dtypes.bfloat16)]


GOOD = entry([2], 0, 8)
EIGHT = bytes(8)
CORRUPT = {
    "shorter than a header": (b"", b"", "truncated|empty"),
    "a list": ([], b"", "not an object"),
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "not JSON"),
    "nested without end": (b"[" * 100_000, b"", "not JSON"),
    "metadata that is no object": ({"__metadata__": 3}, b"", "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"a": 3}}, b"", "__metadata__"),
    "a key twice": (b'{"w": 1, "w": 2}', b"", "'w' twice"),
    "a field twice": (b'{"w": {"dtype": "F32", "dtype": "F16"}}', b"", "'dtype' twice"),
    "a tensor that is no object": ({"w": 3}, b"", "tensor 'w'"),
    "a field missing": ({"w": {"dtype": "F32", "shape": [2]}}, EIGHT, "tensor 'w'"),
    "a field too many": ({"w": GOOD | {"more": 1}}, EIGHT, "tensor 'w'"),
    "an unknown dtype": ({"w": entry([2], 0, 8, "F13")}, EIGHT, "tensor 'w' has the unknown dtype 'F13'"),
    "a dtype that is no text": ({"w": GOOD | {"dtype": [1]}}, EIGHT, "tensor 'w' has the unknown dtype"),
    "a negative size": ({"w": entry([-2], 0, 8)}, EIGHT, "tensor 'w' has shape"),
    "a size that is true": ({"w": GOOD | {"shape": [True, 2]}}, EIGHT, "tensor 'w' has shape"),
    "a size with a fraction": ({"w": GOOD | {"shape": [2.0]}}, EIGHT, "tensor 'w' has shape"),
    "a shape that is no list": ({"w": GOOD | {"shape": 2}}, EIGHT, "tensor 'w' has shape"),
    "more dimensions than arrays have": ({"w": entry([1] * 100 + [2], 0, 8)}, EIGHT, "tensor 'w' has shape"),
    "a size beyond all memory": ({"w": entry([0, 2**70], 0, 0)}, b"", "tensor 'w' has shape"),
    "one offset": ({"w": GOOD | {"data_offsets": [0]}}, EIGHT, "tensor 'w' has data_offsets"),
    "a negative offset": ({"w": entry([2], -8, 0)}, EIGHT, "tensor 'w' has data_offsets"),
    "offsets in reverse": ({"w": entry([2], 8, 0)}, EIGHT, "tensor 'w' has data_offsets"),
    "too few bytes for the shape": ({"w": entry([3], 0, 8)}, EIGHT, "tensor 'w'.*takes 12"),
    "offsets beyond the end": ({"w": entry([4], 0, 16)}, EIGHT, "tensor 'w'.*truncated"),
    "tensors that overlap": ({"v": GOOD, "w": entry([2], 4, 12)}, bytes(12), "tensor 'w' starts at byte 4, inside"),
    "the same bytes twice": ({"v": GOOD, "w": GOOD}, EIGHT, "starts at byte 0, inside"),
    "a hole at the beginning": ({"w": entry([2], 4, 12)}, bytes(12), "bytes 0 to 4, before tensor 'w'"),
    "a hole between tensors": ({"v": GOOD, "w": entry([2], 12, 20)}, bytes(20), "bytes 8 to 12, before tensor 'w'"),
    "bytes after the last tensor": ({"w": GOOD}, bytes(11), "3 bytes after the last"),
    "a name of half a character": (b'{"\\ud800": {}}', b"", "name"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header_is_an_error_that_names_file_and_tensor(tmp_path: Path, case: str) -> None:
    header, data, message = CORRUPT[case]
    file = write(tmp_path / "model.safetensors", header, data)
    if case == "shorter than a header":
        file.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert str(file) in str(raised.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(3.0), "b": np.arange(4)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [LONGEST_HEADER + 1, 2**63, 2**64 - 1])
def test_a_length_beyond_reason_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match=str(length)):
        open_checkpoint(tmp_path)


def read_all_or_refuse(file: Path) -> dict[str, np.ndarray] | None:
    """What the reader makes of a file: its tensors, every byte of them touched, or a refusal. Anything else escapes."""
    try:
        checkpoint = open_checkpoint(file)
    except CheckpointError:
        return None
    return {name: tensor.read().copy() for name, tensor in checkpoint.items()}


@FUZZ
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_or_read_whole(tmp_path: Path, contents: bytes, honest_length: bool) -> None:
    file = tmp_path / "fuzz.safetensors"
    file.write_bytes(len(contents).to_bytes(8, "little") + contents if honest_length else contents)
    read = read_all_or_refuse(file)
    assert not read


SIZES = st.integers(-1, 5) | st.sampled_from([2**31, 2**63, 2**64, 1.0, None, True, "2"])
OFFSETS = st.integers(-1, 40) | st.sampled_from([2**31, 2**63, 2**64, 1.0, None, False, "2"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "", 3]),
        "shape": st.lists(SIZES, max_size=4) | st.none(),
        "data_offsets": st.lists(OFFSETS, min_size=1, max_size=3),
    }
)


@FUZZ
@given(
    st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | st.none(), max_size=3),
    st.binary(max_size=40),
)
def test_headers_that_look_right_are_refused_or_account_for_every_byte(
    tmp_path: Path, header: dict[str, object], data: bytes
) -> None:
    read = read_all_or_refuse(write(tmp_path / "fuzz.safetensors", header, data))
    if read is not None:
        assert sum(array.nbytes for array in read.values()) == len(data)
        assert b"".join(sorted(array.tobytes() for array in read.values())) or not data


SAMPLE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(5, dtype=np.int16),
    "c": np.ones((), np.uint8),
}
VALID = safetensors.numpy.save(SAMPLE)


@FUZZ
@given(st.data())
def test_a_mutated_file_is_refused_or_read_as_the_library_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    contents = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of the meaning is at the beginning, so half of the mutations go there.
        place = data.draw(st.integers(0, len(contents) - 1) | st.integers(0, 20))
        match data.draw(st.sampled_from(["change", "delete", "insert", "digit"])):
            case "change":
                contents[place] = data.draw(st.integers(0, 255))
            case "digit":
                contents[place] = data.draw(st.sampled_from(b'0123456789,[]{}:"'))
            case "delete":
                del contents[place]
            case "insert":
                contents.insert(place, data.draw(st.integers(0, 255)))
    file = tmp_path / "fuzz.safetensors"
    file.write_bytes(contents)
    read = read_all_or_refuse(file)
    if read is None:
        return
    expected = safetensors.numpy.load(bytes(contents))
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        assert read[name].tobytes() == array.tobytes()
        assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype)


@FUZZ
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        st.tuples(st.sampled_from([np.float64, np.float16, np.int8]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=4,
    )
)
def test_whatever_the_library_writes_is_read_back(tmp_path: Path, layout: dict[str, tuple[type, list[int]]]) -> None:
    arrays = {name: np.full(shape, number, kind) for number, (name, (kind, shape)) in enumerate(layout.items())}
    file = tmp_path / "fuzz.safetensors"
    safetensors.numpy.save_file(arrays, file)
    read = read_all_or_refuse(file)
    assert read is not None
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
