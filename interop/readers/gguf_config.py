"""The Hugging Face config that a GGUF file was converted from, from its metadata and tensors.

Some of a config is not in the file because llama.cpp has it in its code; those constants stand here, with where they
hold. A field of the metadata that nobody here has read might change what the network computes, so it raises.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from interop.readers.base import CheckpointError
from interop.readers.gguf_file import PLAIN, GGUFFile
from interop.readers.gguf_names import FALCON_SECOND_NORM, ROPE_FREQUENCIES, architecture_of

# The defaults of llama.cpp where the converted config had none.
DEFAULT_THETA = 10_000.0
# The number of layers by which llama.cpp knows the two models whose queries are scaled by hidden_size / heads.
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
# What `rope_freqs` was computed with, in every Llama from 3.1 on; checked against the frequencies themselves.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SOFTMAX_GATING = 1  # of ExpertGatingFuncType

SPECIAL_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The fields of `config.json`, as far as they follow from the file."""
    architecture_of(file)
    fields = _Fields(file)
    config = {
        "hidden_size": fields.integer("embedding_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": fields.integer("attention.head_count"),
        "max_position_embeddings": fields.integer("context_length"),
        "vocab_size": _vocabulary(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        **special_tokens(file),
        **_READERS[file.architecture](fields),
    }
    fields.inert("vocab_size")  # of the tokenizer; the embedding may have more rows
    fields.finish()
    return config


def special_tokens(file: GGUFFile) -> dict[str, int]:
    """The ids of the tokens that begin, end and pad a text."""
    keys = {f"tokenizer.ggml.{theirs}": ours for theirs, ours in SPECIAL_TOKENS.items()}
    return {ours: file.metadata[theirs] for theirs, ours in keys.items() if isinstance(file.metadata.get(theirs), int)}


class _Fields:
    """The metadata of the file's architecture: each read is recorded, and in the end none may be left over."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._prefix = f"{file.architecture}."
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return self.file.metadata.get(self._prefix + name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(name, "one integer is needed")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Stored as float32; the shortest decimal that rounds to it is what the config had: 1e-05, not 9.99...e-06."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(name, "a number is needed")
        return float(str(np.float32(value)))

    def has(self, name: str) -> bool:
        return self._prefix + name in self.file.metadata

    def inert(self, *names: str) -> None:
        """Fields that change nothing."""
        self._read.update(names)

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse unless the field is missing or one of `allowed`."""
        if self.get(name, allowed[0]) not in allowed:
            self.refuse(name, f"only {' or '.join(map(repr, allowed))} is read")

    def refuse(self, name: str, why: str) -> NoReturn:
        value = self.file.metadata.get(self._prefix + name)
        raise CheckpointError(f"{self.file.path}: metadata {self._prefix}{name}={value!r} is not supported: {why}.")

    def finish(self) -> None:
        for key in self.file.metadata:
            if key.startswith(self._prefix) and key.removeprefix(self._prefix) not in self._read:
                self.refuse(key.removeprefix(self._prefix), "tbjax does not know this field of the architecture")


def _vocabulary(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight', the embedding, is missing or is no matrix.")
    return embedding.shape[0]


def _dtype(file: GGUFFile) -> str:
    """The type of the matrices where it is one; float32, which it is dequantised to, for anything else."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return PLAIN[kinds.pop()].name if len(kinds) == 1 and kinds <= PLAIN.keys() else "float32"


def _usual(fields: _Fields) -> dict[str, Any]:
    """What all families but Falcon have."""
    heads = fields.integer("attention.head_count")
    return {
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
    }


def _head_dim(fields: _Fields) -> int:
    """Given, or what is left for each head; all of it turns with the position."""
    head_dim = _any_head_dim(fields)
    fields.require("rope.dimension_count", head_dim)
    return head_dim


def _any_head_dim(fields: _Fields) -> int:
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if heads < 1:
        fields.refuse("attention.head_count", "at least one head is needed")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    fields.require("attention.value_length", head_dim)
    return head_dim


def _rope(fields: _Fields) -> dict[str, Any]:
    """`rope_parameters`, unstretched or stretched linearly; anything else raises."""
    theta = fields.number("rope.freq_base", DEFAULT_THETA)
    kind = fields.get("rope.scaling.type", "none")
    if kind == "linear":
        factor = fields.number("rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        fields.refuse("rope.scaling.type", "only 'none' and 'linear' are read from GGUF; take the safetensors")
    return {"rope_type": "default", "rope_theta": theta}


def _llama(fields: _Fields) -> dict[str, Any]:
    """Llama and Mistral are one to llama.cpp, which keeps no sliding window for them; with experts it is Mixtral."""
    names = fields.file.tensors
    head_dim = _head_dim(fields)
    common = _usual(fields) | {"head_dim": head_dim, "rope_parameters": _llama_rope(fields, head_dim)}
    if fields.integer("expert_count", 0):
        return common | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "sliding_window": None,
        }
    fields.require("expert_used_count", 0)
    return common | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_down.bias" in names,
    }


def _llama_rope(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's stretched rope comes as the factor of each frequency; the config is what gives the same factors."""
    rope = _rope(fields)
    stored = fields.file.tensors.get(ROPE_FREQUENCIES)
    if stored is None:
        return rope
    if stored.kind != "F32" or stored.shape != (head_dim // 2,) or rope["rope_type"] != "default":
        raise CheckpointError(
            f"{fields.file.path}: tensor {ROPE_FREQUENCIES!r} is {stored.kind} of shape {list(stored.shape)}; "
            f"F32 of [{head_dim // 2}] and no other stretch of the rope are expected."
        )
    factors = fields.file.mapped.bytes(stored.offset, stored.offset + stored.nbytes).view(np.float32)
    rope |= {"rope_type": "llama3", "factor": float(str(factors.max())), **LLAMA3_ROPE}
    if not np.allclose(factors, _llama3_factors(rope, head_dim), rtol=1e-5, atol=0):
        raise CheckpointError(
            f"{fields.file.path}: tensor {ROPE_FREQUENCIES!r} does not follow from {rope}, which all Llama 3 models "
            "have, so its config cannot be known. Take the safetensors."
        )
    return rope


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """By how much each frequency is divided: not at all when fast, by the factor when slow, smoothly between."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def _qwen2(fields: _Fields) -> dict[str, Any]:
    _head_dim(fields)
    return _usual(fields) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": _rope(fields),
        "use_sliding_window": False,
    }


def _qwen3(fields: _Fields) -> dict[str, Any]:
    return _usual(fields) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": _head_dim(fields),
        "rope_parameters": _rope(fields),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3moe(fields: _Fields) -> dict[str, Any]:
    """Every layer has experts, and their weights are normalised: the only way llama.cpp computes them."""
    fields.require("expert_gating_func", SOFTMAX_GATING)
    fields.require("expert_weights_norm", True)
    return _qwen3(fields) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(fields: _Fields, model_type: str, layers_of_27b: int) -> dict[str, Any]:
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = _head_dim(fields)
    largest = fields.integer("block_count") == layers_of_27b
    return _usual(fields) | {
        "model_type": model_type,
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden // heads if largest else head_dim,
        "sliding_window": fields.integer("attention.sliding_window"),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping")
        if fields.has("attn_logit_softcapping")
        else None,
        "final_logit_softcapping": (
            fields.number("final_logit_softcapping") if fields.has("final_logit_softcapping") else None
        ),
    }


def _gemma2(fields: _Fields) -> dict[str, Any]:
    return _gemma(fields, "gemma2", GEMMA2_27B_LAYERS) | {
        "architectures": ["Gemma2ForCausalLM"],
        "rope_parameters": _rope(fields),
    }


def _gemma3(fields: _Fields) -> dict[str, Any]:
    ropes = {
        "full_attention": _rope(fields),
        "sliding_attention": {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", DEFAULT_THETA)},
    }
    return _gemma(fields, "gemma3_text", GEMMA3_27B_LAYERS) | {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_parameters": ropes,
    }


def _phi3(fields: _Fields) -> dict[str, Any]:
    """A window of zero says that there is none; a longrope shows in tensors that raise for having no counterpart."""
    head_dim, context = _any_head_dim(fields), fields.integer("context_length")
    fields.require("rope.scaling.original_context_length", context)
    turned = fields.integer("rope.dimension_count", head_dim)
    return _usual(fields) | {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "rope_parameters": _rope(fields) | {"partial_rotary_factor": turned / head_dim},
        "original_max_position_embeddings": context,
        "sliding_window": fields.integer("attention.sliding_window", 0) or None,
    }


def _olmo2(fields: _Fields) -> dict[str, Any]:
    _head_dim(fields)
    return _usual(fields) | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "rope_parameters": _rope(fields),
        "attention_bias": False,
    }


def _falcon(fields: _Fields) -> dict[str, Any]:
    """7B or 40B and 180B. Falcon 2 (11B) has one norm and several KV heads, and conversion lost its rope's base."""
    _head_dim(fields)
    kv_heads = fields.integer("attention.head_count_kv")
    two_norms = FALCON_SECOND_NORM in fields.file.tensors
    if kv_heads != 1 and not two_norms:
        fields.refuse(
            "attention.head_count_kv", "with one norm a layer (Falcon 2) the base of the rope is not in the file"
        )
    fields.require("tensor_data_layout", "jploski")
    return {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "ffn_hidden_size": fields.integer("feed_forward_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "num_kv_heads": kv_heads,
        "multi_query": not two_norms,
        "new_decoder_architecture": two_norms,
        "num_ln_in_parallel_attn": 2 if two_norms else None,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "rope_parameters": _rope(fields),
    }


_READERS: Mapping[str, Callable[[_Fields], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "falcon": _falcon,
}
