"""PyTorch's `.bin` files: only when trusted, never run, and mapped rather than read."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from interop.readers import CheckpointError, open_checkpoint
from interop.readers.pickled import as_numpy

FILE = "pytorch_model.bin"


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(6, 4, generator=generator)
    tensors = {str(kind): (plain * 10).to(kind) for kind in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}
    tensors |= {str(kind): plain.to(kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bool)}
    return tensors | {"transposed": plain.to(torch.bfloat16).T, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2)}


def test_tensors_are_read_bit_for_bit_and_stay_mapped(tmp_path: Path) -> None:
    tensors = state()
    torch.save(tensors, tmp_path / FILE)
    with open_checkpoint(tmp_path, trust_pickle=True) as checkpoint:
        assert checkpoint.format == "torch"
        assert checkpoint.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = checkpoint[name].read()
            assert read.dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert read.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(read.astype(np.float64), tensor.to(torch.float64).numpy())
            assert not read.flags.writeable
            assert not read.flags.owndata
    part = open_checkpoint(tmp_path / FILE, trust_pickle=True)["torch.bfloat16"].read((slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part.view(np.uint16), tensors["torch.bfloat16"][1:3, 2:4].view(torch.uint16).numpy())


def test_a_live_tensor_becomes_an_array_of_the_same_memory() -> None:
    for tensor in state().values():
        parameter = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        assert as_numpy(parameter).__array_interface__["data"][0] == tensor.data_ptr() or not tensor.numel()


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"a": torch.ones(2, 3)}, tmp_path / names[0])
    torch.save({"b": torch.zeros(4)}, tmp_path / names[1])
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert sorted(open_checkpoint(tmp_path, trust_pickle=True)) == ["a", "b"]
    with pytest.raises(CheckpointError, match="trust_pickle=True"):
        open_checkpoint(tmp_path)


def test_a_pickle_is_refused_unless_trusted_with_word_on_how(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"trust_pickle=True.*--trust-pickle.*safetensors") as raised:
        open_checkpoint(tmp_path)
    assert str(tmp_path / FILE) in str(raised.value)


class Attack:
    """Unpickling one of these makes a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.evidence}",)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "bare"])
def test_a_pickle_that_tries_to_run_code_does_not(tmp_path: Path, protocol: str) -> None:
    evidence = tmp_path / "evidence"
    contents = {"w": torch.ones(2), "attack": Attack(evidence)}
    if protocol == "bare":
        (tmp_path / FILE).write_bytes(pickle.dumps(Attack(evidence)))
    else:
        torch.save(contents, tmp_path / FILE, _use_new_zipfile_serialization=protocol == "zip")
    for trust_pickle in (False, True):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path, trust_pickle=trust_pickle)
        assert not evidence.exists()
    # The attack is a real one: an ordinary load of the same file falls for it.
    if protocol == "bare":
        pickle.loads((tmp_path / FILE).read_bytes())  # noqa: S301
    else:
        torch.load(tmp_path / FILE, weights_only=False)
    assert evidence.exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # by PyTorch, since 2.15
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([torch.ones(2)], "list, not a dictionary"),
        ({"epoch": 3, "w": torch.ones(2)}, "'epoch' is a int, not a tensor"),
        ({"model": {"w": torch.ones(2)}}, "'model' is a dict, not a tensor"),
        ({"w": torch.eye(2).to_sparse()}, "tensor 'w' is torch.sparse_coo"),
        ({"w": torch.ones(2).to(torch.float8_e4m3fnuz)}, "tensor 'w' has the unknown dtype torch.float8_e4m3fnuz"),
    ],
)
def test_anything_but_dense_tensors_is_named(tmp_path: Path, contents: object, message: str) -> None:
    torch.save(contents, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path, trust_pickle=True)
    assert str(tmp_path / FILE) in str(raised.value)


def test_the_old_format_cannot_be_mapped_and_says_so(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / FILE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="Write it again"):
        open_checkpoint(tmp_path, trust_pickle=True)


def test_a_truncated_or_garbled_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / FILE
    torch.save({"w": torch.ones(100)}, file)
    whole = file.read_bytes()
    for contents in (b"", b"junk", whole[:40], whole[: len(whole) // 2], whole[:-10]):
        file.write_bytes(contents)
        with pytest.raises(CheckpointError, match=FILE):
            open_checkpoint(tmp_path, trust_pickle=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("something/else", b"")
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(tmp_path, trust_pickle=True)


def test_the_readers_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, interop.readers, interop.readers.pickled; "
        "sys.exit(str([name for name in ('torch', 'transformers', 'gguf', 'jax') if name in sys.modules]) "
        "if {'torch', 'transformers', 'gguf', 'jax'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
