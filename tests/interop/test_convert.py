"""The conversion script: what goes in comes out, and what cannot is said in one paragraph."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
import typer
from typer.testing import CliRunner

import tbjax
from interop import export
from interop.convert import app, asking_about_pickles
from interop.export import gather
from interop.readers.base import UntrustedPickle
from tbjax import checkpoint, cli
from tests import tiny
from tests.interop import gguf_files

CASE = tiny.BY_NAME["llama-odd-vocabulary-tied"]


def convert(*arguments, code=0):
    """What the script prints, and says on stderr, when it exits with `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def same_tensors(left, right):
    left, right = tensors(left), tensors(right)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A Hugging Face checkpoint with all that may stand beside the weights."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tiny.save(CASE, folder)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "capital": 1, "France": 2}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture
def pickled(hf, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = {name: torch.from_numpy(array) for name, array in tensors(hf).items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_to_orbax_and_back_loses_nothing(hf, tmp_path):
    output, _ = convert(hf, tmp_path / "orbax", "--to", "orbax", "--mesh", "1,4,2")
    assert output.startswith(f"{hf} -> {tmp_path / 'orbax'} (orbax): ")
    assert checkpoint.is_checkpoint(tmp_path / "orbax")
    output, _ = convert(tmp_path / "orbax", tmp_path / "back", "--to", "hf", "--mesh", "2,2,2", "--json")
    done = json.loads(output)
    assert done["destination"] == str(tmp_path / "back")
    assert done["bytes"] == sum(file.stat().st_size for file in (tmp_path / "back").iterdir())
    assert same_tensors(hf, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((hf / name).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("capital France")["input_ids"] == [1, 2]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_checkpoint_is_exported_without_devices_to_hold_it(hf, tmp_path, monkeypatch):
    """Whatever mesh and pipeline it lay on: no parameter becomes an array of JAX's on the way."""
    model = tbjax.load(hf, mesh={"pp": 2, "tp": 2, "dp": 2})
    tbjax.save(model, tmp_path / "run", format="orbax")
    del model
    before = len(jax.live_arrays())
    most = []
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("an array was put on a device"))
    monkeypatch.setattr(export, "gather", lambda *found: most.append(len(jax.live_arrays())) or gather(*found))
    export.export_checkpoint(tmp_path / "run", tmp_path / "back")
    assert max(most) <= before
    assert same_tensors(hf, tmp_path / "back")
    data = max((tmp_path / "run").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes of the"):
        export.export_checkpoint(tmp_path / "run", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_of_experts_goes_over_orbax_too(tmp_path):
    tiny.save(tiny.BY_NAME["mixtral"], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", "--to", "orbax", "--mesh", "ep=4,tp=2")
    convert(tmp_path / "orbax", tmp_path / "back", "--mesh", "1,8,1")
    assert same_tensors(tmp_path / "hf", tmp_path / "back")


def test_a_dtype_is_converted_to_and_noted(hf, tmp_path):
    convert(hf, tmp_path / "half", "--dtype", "bfloat16", "--mesh", "1,8,1")
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert module.dtype == torch.bfloat16
    assert torch.equal(module.lm_head.weight, tiny.make(CASE).lm_head.weight.bfloat16())


def test_a_trusted_pickle_becomes_safetensors(pickled, hf, tmp_path):
    convert(pickled, tmp_path / "out", "--trust-pickle", "--mesh", "1,8,1")
    assert same_tensors(hf, tmp_path / "out")


def test_a_gguf_becomes_safetensors_with_the_names_of_hugging_face(tmp_path):
    theirs, file = gguf_files.make("llama", tmp_path)
    convert(file, tmp_path / "out", "--mesh", "1,8,1")
    reference = transformers.AutoModelForCausalLM.from_pretrained(theirs).state_dict()
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert reference.keys() == written.keys()
    assert all(torch.equal(reference[name], written[name]) for name in reference)


def test_a_pickle_is_not_opened_without_a_word(pickled, tmp_path):
    _, errors = convert(pickled, tmp_path / "out", "--mesh", "1,8,1", code=1)
    assert "pytorch_model.bin" in errors
    assert "--trust-pickle" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("n", False)])
def test_on_a_terminal_it_asks_before_opening_a_pickle(pickled, tmp_path, answer, written):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "interop.convert", pickled, tmp_path / "out", "--quiet"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, f"{answer}\n".encode())
    output, errors = process.communicate(timeout=300)
    os.close(ours)
    os.close(theirs)
    assert "Read it?" in output
    assert (tmp_path / "out" / "model.safetensors").exists() == written
    assert process.returncode == (0 if written else 1)
    assert written or "error: " in errors


class Terminal:
    """Somebody who answers."""

    def __init__(self, answer, monkeypatch):
        self.answer, self.asked = answer, []
        monkeypatch.setattr("sys.stdin", self)
        monkeypatch.setattr(typer, "confirm", self.confirm)

    def isatty(self):
        return True

    def confirm(self, question):
        self.asked.append(question)
        return self.answer


@pytest.mark.parametrize("answer", [True, False])
def test_it_asks_only_where_there_is_a_pickle_and_reads_it_only_if_allowed(answer, monkeypatch):
    """Whatever it is that is read: a folder, or a repository of which nothing has been fetched."""
    terminal = Terminal(answer, monkeypatch)
    assert asking_about_pickles(lambda trusted: "safetensors", False) == "safetensors"
    assert asking_about_pickles(lambda trusted: trusted, True) is True
    assert not terminal.asked
    calls = []

    def read(trusted):
        calls.append(trusted)
        if not trusted:
            raise UntrustedPickle("org/model: pytorch_model.bin")
        return "read"

    if answer:
        assert asking_about_pickles(read, False) == "read"
    else:
        with pytest.raises(UntrustedPickle):
            asking_about_pickles(read, False)
    assert calls == [False, True][: 1 + answer]
    assert len(terminal.asked) == 1
    assert terminal.asked[0].startswith("org/model: pytorch_model.bin: this is a pickle")


def test_generate_asks_too(pickled, monkeypatch):
    terminal = Terminal(False, monkeypatch)
    with pytest.raises(typer.Exit):
        cli.generate(str(pickled), "capital", mesh="1,8,1")
    assert len(terminal.asked) == 1
    terminal.answer = True
    cli.generate(str(pickled), "capital", mesh="1,8,1", max_new_tokens=1)


def test_a_dry_run_shows_a_mesh_that_is_not_there_and_writes_nothing(hf, tmp_path):
    output, _ = convert(hf, tmp_path / "out", "--dry-run", "--mesh", "3,16,2")
    assert "embedding.weight" in output
    assert "float32[384,32]" in output
    assert "vocab/tp, embed/fsdp" in output
    output, _ = convert(hf, tmp_path / "out", "--dry-run", "--mesh", "3,16,2", "--json")
    found = {row["path"]: row for row in json.loads(output)["parameters"]}
    assert found["embedding.weight"]["axes"] == [["tp"], ["fsdp"]]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_fills_a_mesh_from_the_devices_that_there_are(hf):
    output, _ = convert(hf, "--dry-run", "--mesh", "1,-1,2")
    assert "on mesh (1, 4, 2)" in output
    assert re.search(r"embedding\.weight .* 49\.2 kB +6\.1 kB", output)
    _, errors = convert(hf, "--dry-run", "--mesh", "1,-1,3", code=1)
    assert "needs a multiple of 3 devices, but there are 8" in errors


def test_a_dry_run_works_on_orbax_and_needs_no_destination(hf, tmp_path):
    convert(hf, tmp_path / "orbax", "--to", "orbax", "--mesh", "1,8,1", "--dtype", "bfloat16")
    output, _ = convert(tmp_path / "orbax", "--dry-run", "--mesh", "1,4,2")
    assert "bfloat16[384,32]" in output


def test_a_dry_run_finds_what_the_conversion_would_stumble_on(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "broken")
    weights = tensors(hf)
    del weights["model.norm.weight"]
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    _, errors = convert(folder, "--dry-run", code=1)
    assert "model.norm.weight" in errors


@pytest.fixture
def repository(hf, tmp_path, monkeypatch):
    """A hub that has the model as `org/model`; its file names, as they are fetched, are in `fetched`."""
    folder = shutil.copytree(hf, tmp_path / "repository")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(name, *, revision, allow_patterns):
        assert name == "org/model"
        for file in folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder, snapshot


def test_a_dry_run_of_a_repository_fetches_no_weights(repository):
    folder, snapshot = repository
    output, errors = convert("org/model", "--dry-run", "--mesh", "1,4,2")
    assert "float32[384,32]" in output
    assert not errors
    assert {file.name for file in snapshot.iterdir()} == {file.name for file in folder.iterdir()} - {
        "model.safetensors"
    }


def test_a_dry_run_of_a_repository_says_what_it_cannot_know(repository):
    folder, _ = repository
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    _, errors = convert("org/model", "--dry-run", "--mesh", "1,4,2")
    assert "org/model: config.json names no dtype" in errors


def test_a_dry_run_of_a_repository_holds_the_index_against_the_model(repository):
    folder, _ = repository
    names = dict.fromkeys(tensors(folder), "model-1-of-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    convert("org/model", "--dry-run", "--mesh", "1,4,2")
    del names["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    _, errors = convert("org/model", "--dry-run", "--mesh", "1,4,2", code=1)
    assert "model.norm.weight" in errors


def test_quiet_is_quiet_and_otherwise_one_line_says_what_was_done(hf, tmp_path):
    assert convert(hf, tmp_path / "one", "--quiet", "--mesh", "1,8,1") == ("", "")
    output, errors = convert(hf, tmp_path / "two", "--mesh", "1,8,1")
    assert len(output.splitlines()) == 1
    assert str(tmp_path / "two") in output
    assert not errors


def test_a_destination_that_stands_is_kept_unless_told(hf, tmp_path):
    convert(hf, tmp_path / "out", "--mesh", "1,8,1")
    _, errors = convert(hf, tmp_path / "out", "--mesh", "1,8,1", code=1)
    assert "exists already" in errors
    assert "--overwrite" in errors
    convert(hf, tmp_path / "out", "--mesh", "1,8,1", "--dtype", "bfloat16", "--overwrite")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("source", [".", "model.safetensors", "link.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("destination", [".", "..", "../link"])
def test_the_source_is_never_overwritten(hf, tmp_path, source, destination):
    folder = shutil.copytree(hf, tmp_path / "models" / "tiny")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "link.safetensors").symlink_to(
        "/elsewhere/model.safetensors" if source == "." else hf / "model.safetensors"
    )
    (tmp_path / "models" / "link").symlink_to("tiny")
    before = sorted(tmp_path.rglob("*"))
    _, errors = convert(folder / source, folder / destination, "--overwrite", code=1)
    assert "is or holds the source" in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_written_into_the_source(hf):
    _, errors = convert(hf, hf / "out", code=1)
    assert "lies in the source" in errors
    assert not (hf / "out").exists()


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_what_stands_there_is_looked_at_before_the_weights_are_read(hf, tmp_path, form, monkeypatch):
    monkeypatch.setattr(tbjax, "load", None)
    (tmp_path / "thesis.tex").touch()
    for options, message in (((), "not empty"), (("--overwrite",), "does not look like a checkpoint")):
        _, errors = convert(hf, tmp_path, "--to", form, *options, code=1)
        assert message in errors


def test_an_empty_folder_is_written_to(hf, tmp_path):
    for form in ("hf", "orbax"):
        (tmp_path / form).mkdir()
        convert(hf, tmp_path / form, "--to", form, "--mesh", "1,8,1")
    assert checkpoint.is_checkpoint(tmp_path / "orbax")
    assert same_tensors(hf, tmp_path / "hf")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("somewhere",),
        ("somewhere", "out", "--to", "zip"),
        ("somewhere", "out", "--mesh", "2x4"),
        ("somewhere", "out", "--dtype", "int3"),
        ("somewhere", "out", "--nonsense"),
    ],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(*arguments, code=2)


@pytest.mark.parametrize("mesh", ["1,3,1", "pipeline=8"])
def test_a_mesh_that_cannot_be_is_refused_before_the_weights_are_read(hf, tmp_path, mesh):
    _, errors = convert(hf, tmp_path / "out", "--mesh", mesh, code=1)
    assert "mesh" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_named(tmp_path):
    _, errors = convert(tmp_path / "nowhere", tmp_path / "out", code=1)
    assert errors.startswith(f"error: {tmp_path / 'nowhere'}")
