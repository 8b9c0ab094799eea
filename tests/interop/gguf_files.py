"""GGUF files for the tests: random Hugging Face models converted as llama.cpp's converter does it.

Written from the converter's rules and not from the reader's, in the converter's direction, so that the two are held
against each other: rows are interleaved, groups sorted, experts stacked, norms raised by one, and the config spelled
in llama.cpp's keys.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
FALCON = {name: value for name, value in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")}
QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

# Name -> GGUF architecture, Hugging Face model type, config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-tied-wide": ("llama", "llama", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 1}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama-linear": ("llama", "llama", {"rope_parameters": LINEAR}),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3moe": ("qwen3moe", "qwen3_moe", QWEN3_MOE),
    "gemma2": ("gemma2", "gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "rope_parameters": GEMMA3_ROPES},
    ),
    "phi3": (
        "phi3",
        "phi3",
        {"sliding_window": 47, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5},
    ),
    "olmo2": ("olmo2", "olmo2", {}),
    "falcon-7b": ("falcon", "falcon", {"multi_query": True}),
    "falcon-40b": ("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def make(name: str, folder: Path, encoding: str = "F32") -> tuple[Path, Path]:
    """A random model as a Hugging Face folder and as a GGUF file."""
    architecture, model_type, differences = MODELS[name]
    config = transformers.CONFIG_MAPPING[model_type](**(FALCON if model_type == "falcon" else SIZES) | differences)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too, which would otherwise be ones and zeros
    theirs = folder / "hugging_face"
    model.save_pretrained(theirs)
    file = folder / "model.gguf"
    convert(theirs, file, architecture, encoding)
    return theirs, file


def convert(source: Path, target: Path, architecture: str, encoding: str = "F32") -> None:
    config = json.loads((source / "config.json").read_text())
    config = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    writer = gguf.GGUFWriter(target, architecture)
    write_metadata(writer, architecture, config)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, config["num_hidden_layers"])
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    for name, tensor in stack_experts(tensors).items():
        changed = change(architecture, config, name, tensor).numpy()
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        if changed.ndim == 1 or theirs.startswith("blk.0.ffn_gate_inp"):
            writer.add_tensor(theirs, changed)
        else:
            kind = gguf.GGMLQuantizationType[encoding]
            writer.add_tensor(theirs, gguf.quantize(changed, kind), raw_dtype=kind)
    if (rope := config.get("rope_parameters") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config["head_dim"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def change(architecture: str, config: dict[str, Any], name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What the converter does to the values."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config.get("num_kv_heads"))
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        count = heads if ".q_proj." in name else kv_heads
        halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "falcon" and "query_key_value" in name:
        kv_heads = kv_heads if config["new_decoder_architecture"] else 1
        head_dim, width = config["hidden_size"] // heads, config["hidden_size"]
        groups = tensor.view(kv_heads, heads // kv_heads + 2, head_dim, width)
        parts = [groups[:, :-2], groups[:, -2:-1], groups[:, -1:]]
        return torch.cat([part.reshape(-1, width) for part in parts])
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`experts.{number}.{projection}` of all numbers as one tensor `experts.{projection}`."""
    merged: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            before, after = name.split(".experts.")
            number, projection = after.split(".", 1)
            experts.setdefault(f"{before}.experts.{projection}", {})[int(number)] = tensor
        else:
            merged[name] = tensor
    return merged | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The converter's loop over frequencies."""
    factors = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * math.pi / (1.0 / rope["rope_theta"] ** (exponent / head_dim))
        original = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_metadata(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_token_list([f"token {number}" for number in range(config["vocab_size"])])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if architecture == "falcon":
        writer.add_feed_forward_length(config["ffn_hidden_size"])
        writer.add_head_count_kv(config["num_kv_heads"] if config["new_decoder_architecture"] else 1)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        writer.add_tensor_data_layout("jploski")
        return
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_sliding_window(config["sliding_window"] or 0)
    if config.get("head_dim") and architecture not in ("qwen2", "phi3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if experts := config.get("num_local_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
