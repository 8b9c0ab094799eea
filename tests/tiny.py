"""Tiny random models by transformers: every family, and the corners where a translation goes wrong.

All sizes that a mesh may cut are multiples of eight (experts: of four), save for what a case is there to make awkward,
so the same cases run on every mesh of eight devices.

The weights are chosen for what they reveal. Scores of attention are of order one and positions matter, so that a wrong
rope or softmax scale moves every logit. The epsilon of the norms is 1e-2 against activations of about one. Norm scales
and biases are random, so that none can be missed or exchanged unseen.
"""

import dataclasses
import functools
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from interop.families import FAMILIES, Family, Fields, family
from tbjax.config import ModelConfig

# Longer than any case's window and than the length before any rope is stretched.
SEQUENCE = 24
VOCABULARY = 96
EPSILON = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model: what its config says beyond the sizes that all share."""

    name: str
    model_type: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    attention: str = "padded_eager"

    @property
    def family(self) -> Family:
        return family(self.model_type)

    def __str__(self) -> str:
        return self.name


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # so more than hidden_size over heads; eight frequencies, enough for each part of a stretched rope
    "max_position_embeddings": 64,
    "rms_norm_eps": EPSILON,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,  # an embedding with a padding id has no gradient there
    "tie_word_embeddings": False,
}
MOE = {"num_experts_per_tok": 2, "output_router_logits": True}
QWEN3_MOE = {**MOE, "moe_intermediate_size": 16, "num_experts": 4, "norm_topk_prob": True}
# Falcon's attention is code of its own that knows "eager" and "sdpa" only.
FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": EPSILON,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_hidden_size": 96,
}
# Heads that fill the hidden size, as most do.
NARROW = {"hidden_size": 64, "head_dim": None}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 1, "rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0, **parameters}}


def _longrope(length: int) -> dict[str, list[float]]:
    return {
        "short_factor": [1.0 + 0.1 * i for i in range(length)],
        "long_factor": [1.5 + 0.5 * i for i in range(length)],
    }


CASES = (
    # One plain case a family, the first of its name.
    Case("llama", "llama"),
    Case("mistral", "mistral", {**NARROW, "sliding_window": 7}),
    Case("mixtral", "mixtral", {**MOE, "num_local_experts": 4}),
    Case("falcon", "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "eager"),  # as the 40B
    Case("qwen2", "qwen2", NARROW),
    Case("qwen3", "qwen3"),
    Case("qwen3_moe", "qwen3_moe", QWEN3_MOE),
    Case(
        "gemma2",  # two layers repeated, and one more
        "gemma2",
        {"sliding_window": 7, "query_pre_attn_scalar": 5, "tie_word_embeddings": True, "num_hidden_layers": 5},
    ),
    Case(
        "gemma3",  # six layers repeated, and one more
        "gemma3_text",
        {"sliding_window": 7, "query_pre_attn_scalar": 5, "tie_word_embeddings": True, "num_hidden_layers": 13}
        | {"rope_parameters": {"full_attention": {"rope_theta": 1e3}, "sliding_attention": {"rope_theta": 30.0}}},
    ),
    Case("phi3", "phi3", NARROW),
    Case("olmo2", "olmo2", NARROW),
    # Ends.
    Case("llama-tied", "llama", {"tie_word_embeddings": True}),
    Case("llama-odd-vocabulary", "llama", {"vocab_size": 257}),
    Case("llama-odd-vocabulary-tied", "llama", {"vocab_size": 257, "tie_word_embeddings": True}),
    Case("gemma2-untied-uncapped", "gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    # Heads and biases.
    Case("llama-narrow-heads", "llama", NARROW),
    Case("llama-one-kv-head", "llama", {"num_key_value_heads": 1}),
    Case("llama-all-kv-heads", "llama", {"num_key_value_heads": None}),
    Case("llama-three-kv-heads", "llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}),
    Case("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-gelu", "llama", {"hidden_act": "gelu"}),
    Case("qwen3-biases", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    Case("gemma3-biases", "gemma3_text", {"attention_bias": True, "num_hidden_layers": 2, "sliding_window": 7}),
    Case("olmo2-biases", "olmo2", {**NARROW, "attention_bias": True, "num_key_value_heads": None}),
    # Layers that differ.
    Case("mistral-full", "mistral", {"sliding_window": None}),
    Case(
        "qwen2-window-layers",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    Case("qwen3_moe-dense-between", "qwen3_moe", {**QWEN3_MOE, "mlp_only_layers": [1], "num_hidden_layers": 3}),
    Case(
        "qwen3_moe-every-other",
        "qwen3_moe",
        {**QWEN3_MOE, "decoder_sparse_step": 2, "norm_topk_prob": False, "use_sliding_window": True}
        | {"sliding_window": 7, "num_experts": 8, "num_experts_per_tok": 3, "attention_bias": True},
    ),
    Case("mixtral-window", "mixtral", {**MOE, "num_local_experts": 8, "sliding_window": 7, "num_hidden_layers": 1}),
    # Falcon's other layouts. With alibi, transformers' eager attention adds the bias twice: sdpa is the reference.
    Case("falcon-7b", "falcon", {**FALCON, "multi_query": True}, "eager"),
    Case(
        "falcon-rw",
        "falcon",
        {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}
        | {"tie_word_embeddings": False},
        "sdpa",
    ),
    Case(
        "falcon-alibi-odd-heads",
        "falcon",
        {**FALCON, "hidden_size": 48, "num_attention_heads": 6, "alibi": True, "num_hidden_layers": 1},
        "sdpa",
    ),
    Case(
        "falcon-11b",
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1, "bias": True},
        "eager",
    ),
    # Ropes, beyond the length they were trained for.
    Case("llama-linear", "llama", _rope("linear", factor=4.0)),
    Case("llama-dynamic", "llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    Case("llama-dynamic-within", "llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 32}),
    Case("llama-yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0)),
    Case(
        "llama-yarn-untruncated",
        "llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, truncate=False)
        | {"attention_bias": True},
    ),
    Case(
        "qwen3-yarn-mscale",
        "qwen3",
        _rope("yarn", factor=None, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.3),
    ),
    Case(
        "llama-llama3",
        "llama",
        _rope("llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    Case("llama-longrope", "llama", _rope("longrope", factor=4.0, original_max_position_embeddings=16, **_longrope(8))),
    Case(
        "phi3-longrope",
        "phi3",
        {"num_attention_heads": 8, "hidden_size": 128, "head_dim": None, "original_max_position_embeddings": 16}
        | {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **_longrope(8)}},
    ),
    Case(
        "phi3-longrope-within",
        "phi3",
        {"num_attention_heads": 8, "hidden_size": 128, "head_dim": None, "original_max_position_embeddings": 32}
        | {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **_longrope(8)}},
    ),
    Case(
        "phi3-partial-window",
        "phi3",
        {"num_attention_heads": 8, "hidden_size": 128, "head_dim": None, "num_hidden_layers": 1, "sliding_window": 7}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}},
    ),
    Case(
        "gemma3-linear",
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
        | {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        }},
    ),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

# One case a family: the first.
PLAIN = tuple(next(case for case in CASES if case.model_type == name) for name in FAMILIES)


def hf_config(case: Case) -> transformers.PretrainedConfig:
    """The case's config by transformers."""
    sizes = {} if case.model_type == "falcon" else SIZES
    fields = {name: value for name, value in {**sizes, **case.fields}.items() if (name, value) != ("head_dim", None)}
    return transformers.AutoConfig.for_model(case.model_type, **_copy(fields))


def our_config(case: Case) -> ModelConfig:
    """The case's config, translated."""
    return case.family.config(Fields(hf_config(case).to_dict()))


@functools.cache
def make(case: Case, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The case's model, with the same weights (up to rounding) whatever the dtype. Not to be changed: it is shared."""
    config = hf_config(case)
    config._experts_implementation = "eager"  # the only one that runs in float64
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=case.attention)
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_draw(rng, name, tuple(parameter.shape), case)))
    return model.eval()


def save(case: Case, folder: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Writes the case's checkpoint as transformers does."""
    make(case, dtype).save_pretrained(folder, **options)


def hub_tensors(model: transformers.PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of the model's parameters in memory (weights, or gradients), by their names on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def tensors(case: Case) -> dict[str, np.ndarray]:
    """The case's checkpoint: float32 tensors by their names on disk."""
    model = make(case)
    return {name: value.numpy() for name, value in hub_tensors(model, _parameters(model)).items()}


def _parameters(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, SEQUENCE] and their mask: one row is full, two are padded on the left."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()) + 1)
    tokens = rng.integers(3, hf_config(case).vocab_size, (3, SEQUENCE))
    mask = np.arange(SEQUENCE)[None] >= np.array([0, 3, 11])[:, None]
    return np.where(mask, tokens, 2), mask.astype(np.int64)


def _padded_eager(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """The model's own eager attention, under a mask that float32 can hold.

    As it is, a query that may attend to nothing (left padding) gives NaN in float64: the mask is the least float64, and
    the softmax float32.
    """
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, None if mask is None else mask.clamp(min=-1e30), **options)


transformers.AttentionInterface.register("padded_eager", _padded_eager)
transformers.AttentionMaskInterface.register("padded_eager", transformers.masking_utils.eager_mask)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], case: Case) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if len(shape) == 1:
        scale = name.endswith("weight") and not case.model_type.startswith("gemma")
        values = scale + 0.3 * noise
    elif "embed" in name:
        # Gemma multiplies its embeddings by the root of their width, and its tied head then sees large states.
        values = noise * (0.3 if case.model_type.startswith("gemma") else 0.5)
    else:
        values = noise * shape[-1] ** -0.5
        # Attention that is far from uniform, and experts that are far from equal.
        values *= (
            1.6 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query_key_value", "gate.weight")) else 1
        )
    return values.astype(np.float32)


def _copy(value: Any) -> Any:
    """transformers fills in what it is given; the cases are shared."""
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    return list(map(_copy, value)) if isinstance(value, list) else value
