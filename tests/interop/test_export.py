"""Writing back: the checkpoint that was read, bit for bit, whole or not there at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
import transformers

from interop.export import MAX_SHARD_BYTES, export, plan_shards, with_dtype
from interop.load import load_parameters
from interop.readers import open_checkpoint
from interop.readers.memory import MemoryCheckpoint
from tbjax.api import abstract
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
LLAMA = tiny.BY_NAME["llama"]


def load(case, mesh=(2, 2, 2), dtype=None):
    config = tiny.our_config(case)
    checkpoint = MemoryCheckpoint(tiny.tensors(case))
    return load_parameters(abstract(config, mesh, dtype=dtype), config, case.family, checkpoint)


def save(case, folder, model=None, **options):
    """Exports the case's model (loaded on (2,2,2) unless given)."""
    model = load(case) if model is None else model
    options = {"config_json": tiny.hf_config(case).to_dict(), **options}
    export(model, tiny.our_config(case), case.family, folder, **options)


def read(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(tensor.read()) for name, tensor in checkpoint.items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        np.testing.assert_array_equal(ours[name].view(np.uint8), value.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_load_then_save_gives_the_same_tensors_bit_for_bit(case, tmp_path):
    save(case, tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), tiny.tensors(case))


@pytest.mark.parametrize("mesh", [(1, 4, 2), (1, 1, 8), (8, 1, 1), {"pp": 2, "fsdp": 2, "tp": 2}], ids=str)
def test_what_is_written_does_not_depend_on_the_mesh(mesh, tmp_path):
    save(LLAMA, tmp_path / "out", load(LLAMA, mesh))
    assert_same_bits(read(tmp_path / "out"), tiny.tensors(LLAMA))


@pytest.mark.parametrize("case", tiny.PLAIN, ids=str)
def test_transformers_loads_it_and_gives_the_same_logits(case, tmp_path):
    save(case, tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=case.attention, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs.config._experts_implementation = "eager"  # as the reference was made: others round differently
    tokens = torch.from_numpy(tiny.batch(case)[0])
    with torch.no_grad():
        ours = tiny.make(case)(tokens).logits
        np.testing.assert_array_equal(theirs.eval()(tokens).logits, ours)


@pytest.mark.parametrize("case", [LLAMA, tiny.BY_NAME["mixtral"], tiny.BY_NAME["falcon"]], ids=str)
def test_arrays_that_numpy_cannot_see_are_gathered_by_a_collective(case, tmp_path, monkeypatch):
    # As with accelerators or several processes: nothing is taken for host memory.
    model = load(case)
    monkeypatch.setattr(type(jax.tree.leaves(model)[0]), "is_fully_addressable", property(lambda _: False))
    save(case, tmp_path / "out", model)
    assert_same_bits(read(tmp_path / "out"), tiny.tensors(case))


def test_a_number_that_the_dtype_cannot_hold_is_an_error_that_names_the_tensor(tmp_path):
    model = jax.tree.map(lambda array: 1e6 * array, load(LLAMA))
    with pytest.raises(ValueError, match=r"tensor 'model\.embed_tokens\.weight' cannot .* float16.* beyond ±65504"):
        save(LLAMA, tmp_path / "out", model, dtype="float16")
    assert not any(tmp_path.iterdir())


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_large_model_is_sharded_with_an_index(tmp_path):
    limit = 20_000
    save(LLAMA, tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert all(file.stat().st_size - 4096 <= limit for file in files)  # the header comes on top
    tensors = tiny.tensors(LLAMA)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert_same_bits(read(tmp_path / "out"), tensors)  # the reader holds the index against the files
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_small_model_is_one_file_that_says_its_format_and_is_aligned(tmp_path):
    save(LLAMA, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_shards_are_as_full_as_their_order_allows():
    layout = {name: (np.dtype(np.float32), (size,)) for name, size in zip("abcde", (10, 10, 50, 5, 5), strict=True)}
    names = plan_shards(layout, max_shard_bytes=80)
    assert list(names.values()) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(layout, MAX_SHARD_BYTES) == {"model.safetensors": list("abcde")}


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_shard_size_that_cannot_work_is_refused(limit, tmp_path):
    with pytest.raises(ValueError, match=f"max_shard_bytes={limit}"):
        save(LLAMA, tmp_path / "out", max_shard_bytes=limit)
    assert not any(tmp_path.iterdir())


def test_a_model_can_be_written_in_another_dtype(tmp_path):
    save(LLAMA, tmp_path / "out", dtype="bfloat16")
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny.tensors(LLAMA).items()}
    assert_same_bits(read(tmp_path / "out"), rounded)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "foo", bool], ids=str)
def test_a_dtype_that_cannot_hold_weights_is_refused(dtype, tmp_path):
    with pytest.raises(ValueError, match=r"dtype=.* is not supported: dtype can be float32, bfloat16, float16"):
        save(LLAMA, tmp_path / "out", dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_a_parameter_that_safetensors_cannot_hold_is_named(tmp_path):
    model = jax.tree.map(lambda array: array.astype("int4"), load(LLAMA))
    with pytest.raises(ValueError, match=r"weight: int4 cannot be stored in safetensors"):
        save(LLAMA, tmp_path / "out", model)


def test_the_config_says_the_dtype_under_the_name_that_it_has():
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert with_dtype({}, bfloat16) == {"dtype": "bfloat16"}
    assert with_dtype({"torch_dtype": "float32"}, bfloat16) == {"torch_dtype": "bfloat16"}
    assert with_dtype({"dtype": "float32", "x": 1}, bfloat16) == {"dtype": "bfloat16", "x": 1}


class Tokenizer:
    """Writes one file, as a tokenizer does."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_what_belongs_to_the_model_is_written_beside_it(tmp_path):
    save(LLAMA, tmp_path / "out", generation_config={"eos_token_id": [2, 7]}, tokenizer=Tokenizer())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_missing_parents_are_made_and_an_empty_folder_is_used(tmp_path):
    save(LLAMA, tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    save(LLAMA, tmp_path / "empty")
    assert_same_bits(read(tmp_path / "a" / "b"), read(tmp_path / "empty"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_folder_that_holds_something_is_refused(tmp_path):
    save(LLAMA, tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out exists already and is not empty: .* overwrite=True"):
        save(LLAMA, tmp_path / "out")


def test_a_checkpoint_is_replaced_when_asked_and_nothing_of_it_stays(tmp_path):
    save(LLAMA, tmp_path / "out", max_shard_bytes=20_000, tokenizer=Tokenizer())
    save(tiny.BY_NAME["qwen2"], tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_bits(read(tmp_path / "out"), tiny.tensors(tiny.BY_NAME["qwen2"]))


def test_a_tokenizer_of_several_chat_templates_does_not_stand_in_the_way(tmp_path):
    """They lie in a folder of their own."""
    (tmp_path / "out" / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "additional_chat_templates/tool_use.jinja"):
        (tmp_path / "out" / name).write_text("{}")
    save(LLAMA, tmp_path / "out", overwrite=True)
    assert_same_bits(read(tmp_path / "out"), tiny.tensors(LLAMA))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["thesis.tex", "config.json", "model.safetensors"], "it holds thesis.tex"),
        (["config.json", "model.safetensors", "photos/"], "it holds photos"),
        (
            ["config.json", "model.safetensors", "additional_chat_templates/", "additional_chat_templates/x"],
            "additional",
        ),
        (["config.json", "notes.txt"], "it lacks weights"),
        (["model.safetensors"], "it lacks config.json"),
    ],
)
def test_what_does_not_look_like_a_checkpoint_is_never_replaced(names, why, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("")
    with pytest.raises(FileExistsError, match=why):
        save(LLAMA, out, overwrite=True)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == sorted(name.rstrip("/") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file"):
        save(LLAMA, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_stays_a_link(tmp_path):
    save(LLAMA, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(LLAMA, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert_same_bits(read(tmp_path / "real"), tiny.tensors(LLAMA))


class FullDisk:
    """A tokenizer for which there is no room."""

    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def test_an_export_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        save(LLAMA, tmp_path / "out", tokenizer=FullDisk())
    assert not any(tmp_path.iterdir())


KILLED = """
import sys
from pathlib import Path
from interop import writer
from interop.writer import CheckpointWriter
from tests import tiny
from tests.interop.test_export import LLAMA, save

stop_at = int(sys.argv[2])
write = CheckpointWriter.write
written = 0

def wait():
    print("here", flush=True)
    sys.stdin.read()

def counting(self, tensor):
    global written
    write(self, tensor)
    written += 1
    if written == stop_at:
        self._file.flush()
        wait()

CheckpointWriter.write = counting
if not stop_at:
    writer.put = lambda *_: wait()
save(LLAMA, Path(sys.argv[1]), overwrite=True)
"""


@pytest.mark.parametrize("stop_at", [5, 21, 0], ids=["in the middle", "after the last tensor", "before the rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_export_leaves_what_was_there(stop_at, existing, tmp_path):
    out = tmp_path / "out"
    if existing:
        save(tiny.BY_NAME["qwen2"], out)
    command = [sys.executable, "-c", KILLED, str(out), str(stop_at)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    if existing:
        assert_same_bits(read(out), tiny.tensors(tiny.BY_NAME["qwen2"]))
    else:
        assert not out.exists()
    left = [path.name for path in tmp_path.iterdir() if path != out]
    assert left == [f".out.partial-{process.pid}"]
    save(LLAMA, out, overwrite=True)  # and does not stand in the way
    assert_same_bits(read(out), tiny.tensors(LLAMA))
