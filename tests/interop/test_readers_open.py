"""Finding the checkpoint in a folder, and holding its index against its files."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from interop.readers import Checkpoint, CheckpointError, MemoryCheckpoint, open_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard(folder: Path, files: Mapping[str, Mapping[str, np.ndarray]], weight_map: object) -> Path:
    for name, arrays in files.items():
        safetensors.numpy.save_file(dict(arrays), folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


A, B = np.arange(6.0).reshape(2, 3), np.arange(4)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    shard(tmp_path, {FIRST: {"a": A}, SECOND: {"b": B}}, {"a": FIRST, "b": SECOND})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert sorted(checkpoint) == ["a", "b"]
            np.testing.assert_array_equal(checkpoint["a"].read(), A)
            np.testing.assert_array_equal(checkpoint["b"].read(), B)
            assert checkpoint["b"].file == tmp_path / SECOND


@pytest.mark.parametrize(
    ("files", "weight_map", "message"),
    [
        ({FIRST: {"a": A}}, {"a": FIRST, "b": SECOND}, rf"file {SECOND} is missing \(tensor 'b'"),
        ({FIRST: {"a": A}, SECOND: {"b": B}}, {"a": FIRST, "b": SECOND, "c": FIRST}, f"'c' should be in {FIRST}"),
        ({FIRST: {"a": A}, SECOND: {"b": B}}, {"a": SECOND, "b": SECOND}, "tensor 'a' should be in"),
        ({FIRST: {"a": A}, SECOND: {"b": B}}, {"a": FIRST, "b": FIRST}, f"tensor 'b' should be in {FIRST}"),
        (
            {FIRST: {"a": A}, SECOND: {"a": A, "b": B}},
            {"a": FIRST, "b": SECOND},
            f"{SECOND}: tensor 'a' is also in {FIRST}",
        ),
        ({FIRST: {"a": A}}, {"a": "../" + FIRST}, "tensor 'a' is said to be in"),
        ({FIRST: {"a": A}}, {"a": 3}, "tensor 'a' is said to be in 3"),
        ({FIRST: {"a": A}}, {"a": ".."}, "tensor 'a' is said to be in"),
        ({FIRST: {"a": A}}, {"a": "a\0b"}, "tensor 'a' is said to be in"),
        ({FIRST: {"a": A}}, {"a": ""}, "tensor 'a' is said to be in"),
        ({FIRST: {"a": A}}, {}, "weight_map"),
        ({FIRST: {"a": A}}, ["a"], "weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_an_error(
    tmp_path: Path, files: Mapping[str, Mapping[str, np.ndarray]], weight_map: object, message: str
) -> None:
    shard(tmp_path, files, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": null}', "[" * 100_000, "\udcff"])
def test_an_index_that_is_no_index_is_an_error(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": A}, tmp_path / "model.safetensors")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path, trust_pickle=True)) == ["a"]


def test_a_single_file_under_another_name_is_found_but_two_are_ambiguous(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": A}, tmp_path / "weights.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a"]
    safetensors.numpy.save_file({"a": A}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors, weights\.safetensors"):
        open_checkpoint(tmp_path)


def test_several_gguf_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.onnx: not a checkpoint"):
        open_checkpoint(tmp_path / "model.onnx")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened"):
        open_checkpoint(tmp_path)


def test_arrays_in_memory_are_a_checkpoint_too() -> None:
    array = np.arange(12.0).reshape(3, 4)
    checkpoint = MemoryCheckpoint({"w": array})
    assert checkpoint.format == "memory"
    part = checkpoint["w"].read((slice(1, 3), slice(0, 2)))
    np.testing.assert_array_equal(part, array[1:3, :2])
    assert np.shares_memory(part, array)
    assert not part.flags.writeable
    assert array.flags.writeable
    checkpoint["w"].prefetch()


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    arrays = {str(number): np.full((64, 32), number, np.float32) for number in range(8)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        checkpoint = open_checkpoint(path, trust_pickle=True)

        def total(job: int, checkpoint: Checkpoint = checkpoint) -> float:
            tensor = checkpoint[str(job % 8)]
            rows = (slice(job % 60, job % 60 + 4), slice(0, 16))
            tensor.prefetch(rows)
            return float(tensor.read(rows).sum())

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(total, range(400))) == [job % 8 * 64 for job in range(400)]
