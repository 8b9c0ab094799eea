"""What most families share: the config fields of a Llama-shaped decoder, its rope, and its weight table.

A family takes from here what it has in common with Llama and says only where it differs. The fields are those that
`transformers` (version 5) leaves after it has filled in defaults and brought old spellings up to date: `rope_theta` and
`rope_scaling` always arrive as `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from interop.families.table import Fields, Weight
from tbjax.config import LayerKind, ModelConfig, MoE, Rope

ACTIVATIONS: Mapping[Any, str] = {
    "silu": "silu",
    "swish": "silu",  # the same function by its other name
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula, written out
}

DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "float64")}

# Deeper than any decoder: past it the file is damaged, and the list of its layers would fill the memory first.
MOST_LAYERS = 10_000

# A pair that turns a millionth of a circle within the trained length does not turn; the length is divided by that
# number, and a much smaller one overflows.
FEWEST_TURNS = 1e-6

# Fields by which other architectures, or forks of these, say that they compute something else. `transformers` passes
# over a field that the class of the `model_type` does not know, so such a checkpoint would load and be wrong. Other
# fields that the class does not know are passed over here too, as a `sliding_window` is in a config of Llama's: what
# they say there is not part of the architecture.
FOREIGN: Mapping[str, str] = {
    "quantization_config": "its weights are packed; load the checkpoint it was made from, and quantise that",
    "per_layer_config": "all layers must have the same sizes",
    "is_encoder_decoder": "only decoders are done",
    "add_cross_attention": "only decoders are done",
    "kv_lora_rank": "multi-head latent attention (MLA) is not done",
    "q_lora_rank": "multi-head latent attention (MLA) is not done",
    "use_mla": "multi-head latent attention (MLA) is not done",
    "attention_sinks": "attention sinks are not done",
    "use_attention_sinks": "attention sinks are not done",
    "use_qk_norm": "this family does not normalise queries and keys",
    "qk_layernorm": "this family does not normalise queries and keys",
    "clip_qkv": "clipped queries, keys and values are not done",
    "no_rope_layers": "layers without positions are not done",
    "no_rope_layer_interval": "layers without positions are not done",
    "rope_interleaved": "only the half-split layout of rope is done",
    "attention_chunk_size": "chunked attention is not done",
    "n_shared_experts": "shared experts are not done",
    "num_shared_experts": "shared experts are not done",
    "shared_expert_intermediate_size": "shared experts are not done",
    "n_group": "routing by groups of experts is not done",
    "lm_head_bias": "the head has no bias",
    "logit_scale": "scaled logits are not done",
    "logits_scaling": "scaled logits are not done",
    "residual_multiplier": "scaled residuals are not done",
    "embedding_multiplier": "scaled embeddings are not done",
    "attention_multiplier": "a scaled softmax is not done",
    "apply_residual_connection_post_layernorm": "residuals taken after the norm are not done",
    "use_bidirectional_attention": "attention is causal",
}


def decoder(fields: Fields, family: str, **differences: Any) -> ModelConfig:
    """The config of a Llama-shaped decoder; `differences` replace what the family reads in its own way.

    Call it last: fields that nobody has read by then are checked against those that would change the computation.
    """
    heads = fields.size("num_attention_heads")
    embed = fields.size("hidden_size")
    if embed < heads:
        fields.refuse("hidden_size", f"num_attention_heads={heads} heads do not fit")
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": fields.size("vocab_size"),
        "embed": embed,
        "heads": heads,
        "max_positions": fields.size("max_position_embeddings"),
        "dtype": fields.choice("dtype", DTYPES, "float32"),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }
    usual = {
        "mlp": lambda: fields.size("intermediate_size"),
        "kv_heads": lambda: fields.size("num_key_value_heads", heads),
        "head_dim": lambda: head_dim(fields),
        "layer_kinds": lambda: layers(fields),
        "norm_epsilon": lambda: fields.number("rms_norm_eps", least=0),
        "activation": lambda: fields.choice("hidden_act", ACTIVATIONS),
        "rope": lambda: rope(fields, fields.section("rope_parameters")),
    }
    values |= {name: read() for name, read in usual.items() if name not in differences} | differences
    if heads % values["kv_heads"]:
        name = "num_key_value_heads" if "num_key_value_heads" in fields.read else "num_kv_heads"
        fields.refuse(name, f"num_attention_heads={heads} must be a multiple of it")
    fields.require("mlp_bias", values.get("mlp_bias", False))
    fields.require("attention_bias", values.get("qkv_bias", False))
    for name, why in FOREIGN.items():
        if name not in fields.read and fields.get(name):
            fields.refuse(name, why)
    return ModelConfig(**values)


def head_dim(fields: Fields) -> int:
    """Of the field of that name, else what hidden_size leaves for each head."""
    return fields.size("head_dim", fields.size("hidden_size") // fields.size("num_attention_heads"))


def layers(fields: Fields, window: int | None = None) -> tuple[LayerKind, ...]:
    """All layers alike, with `window` or without."""
    count = fields.size("num_hidden_layers")
    if count > MOST_LAYERS:
        fields.refuse("num_hidden_layers", f"no more than {MOST_LAYERS} layers are done")
    expected = "full_attention" if window is None else "sliding_attention"
    if fields.get("layer_types") is not None and any(kind != expected for kind in fields.sequence("layer_types")):
        fields.refuse("layer_types", f"every layer of this family has {expected}")
    return (LayerKind(window=window),) * count


def window(fields: Fields) -> int | None:
    """The sliding window: so many positions, the token itself included."""
    return None if fields.get("sliding_window") is None else fields.size("sliding_window")


def typed_layers(fields: Fields) -> tuple[LayerKind, ...]:
    """Layers with and without a window, as `layer_types` has them."""
    count = fields.size("num_hidden_layers")
    types = fields.sequence("layer_types")
    if len(types) != count:
        fields.refuse("layer_types", f"num_hidden_layers={count} names are needed, not {len(types)}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"tbjax does 'full_attention' and 'sliding_attention', not {kind!r}")
    width = window(fields)
    if width is None and "sliding_attention" in types:
        fields.refuse("sliding_window", "layer_types has sliding_attention, so a number of positions is needed")
    return tuple(LayerKind(window=width if kind == "sliding_attention" else None) for kind in types)


def experts(fields: Fields, count: str, mlp: str, *, normalize_weights: bool) -> MoE:
    """The mixture of experts: `count` and `mlp` are the names of the fields with their number and width."""
    number, chosen = fields.size(count), fields.size("num_experts_per_tok")
    if chosen > number:
        fields.refuse("num_experts_per_tok", f"{count}={number} is all there are")
    return MoE(
        experts=number,
        experts_per_token=chosen,
        mlp=fields.size(mlp),
        normalize_weights=normalize_weights,
        # transformers adds this loss only under `output_router_logits`; here that is for the training step to say.
        auxiliary_loss_weight=fields.number("router_aux_loss_coef", 0.0, least=0),
    )


# --- Rope -------------------------------------------------------------------------------------------------------------

_ROPE_KINDS = {name: name for name in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")}

# Every field that is read for some kind of rope. Those of another kind than the config's are passed over, as in
# transformers, and so are two that say nothing: the old spelling of `rope_type`, and a note by the authors of yarn.
_ROPE_FIELDS = frozenset(
    """
    rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast
    beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor short_factor long_factor type finetuned
    """.split()
)


def rope(fields: Fields, parameters: Fields, *, partial: bool = False) -> Rope:
    """The rotary positions that `parameters` (a section of `fields`) describe.

    `partial`: the family can rotate a part of each head. In `transformers` the others read that field for some kinds of
    rope only, and fail on it there.
    """
    unknown = sorted(parameters.names() - _ROPE_FIELDS)
    if unknown:
        parameters.refuse(unknown[0], "tbjax does not know this field of rope")
    kind = parameters.choice("rope_type", _ROPE_KINDS)
    theta = parameters.number("rope_theta", above=1)  # its logarithm is divided by
    fraction = parameters.number("partial_rotary_factor", 1.0, above=0)
    if fraction > 1 or (fraction != 1 and not partial):
        parameters.refuse("partial_rotary_factor", f"tbjax does {'at most ' if partial else ''}1.0 for this family")
    rotated = int(head_dim(fields) * fraction)
    if rotated % 2 or not rotated:
        name, where = ("head_dim", fields) if fraction == 1 else ("partial_rotary_factor", parameters)
        where.refuse(name, f"rope turns pairs, and {rotated} dimensions of {head_dim(fields)} are not whole pairs")
    scale = _ROPE_SCALES.get(kind, lambda *_: {})
    return Rope(kind=kind, theta=theta, fraction=fraction, **scale(fields, parameters, rotated))


def _linear(fields: Fields, parameters: Fields, rotated: int) -> dict[str, Any]:
    return {"factor": parameters.number("factor", least=1)}


def _dynamic(fields: Fields, parameters: Fields, rotated: int) -> dict[str, Any]:
    if rotated == 2:
        fields.refuse("head_dim", "dynamic rope divides by the rotated dimensions less two")
    return {
        "factor": parameters.number("factor", least=1),
        "original_positions": fields.size("max_position_embeddings"),
    }


def _llama3(fields: Fields, parameters: Fields, rotated: int) -> dict[str, Any]:
    low = parameters.number("low_freq_factor", above=0)
    return {
        "factor": parameters.number("factor", least=1),
        "original_positions": _original_positions(fields, parameters),
        "low_frequency_factor": low,
        "high_frequency_factor": parameters.number("high_freq_factor", above=low),
    }


def _yarn(fields: Fields, parameters: Fields, rotated: int) -> dict[str, Any]:
    original = _original_positions(fields, parameters)
    factor = parameters.number("factor", fields.size("max_position_embeddings") / original, above=0)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale = parameters.number("mscale", 0.0, least=0)
    mscale_all = parameters.number("mscale_all_dim", 0.0, least=0)
    usual = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return {
        "factor": factor,
        "original_positions": original,
        "attention_factor": parameters.number("attention_factor", usual, least=0),
        "beta_fast": _turns(parameters, "beta_fast", 32.0),
        "beta_slow": _turns(parameters, "beta_slow", 1.0),
        "truncate": parameters.flag("truncate", True),
    }


def _turns(parameters: Fields, name: str, usual: float) -> float:
    """How often a pair turns within the original length. Zero asks for the default, as in transformers."""
    turns = parameters.number(name, usual, least=0) or usual
    if turns < FEWEST_TURNS:
        parameters.refuse(name, f"a number of turns no less than {FEWEST_TURNS} is needed, or 0 for {usual}")
    return turns


def _longrope(fields: Fields, parameters: Fields, rotated: int) -> dict[str, Any]:
    original = _original_positions(fields, parameters)
    if original == 1:
        parameters.refuse("original_max_position_embeddings", "its logarithm is divided by, so it must be above 1")
    factor = parameters.number("factor", fields.size("max_position_embeddings") / original, above=0)
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "original_positions": original,
        "attention_factor": parameters.number("attention_factor", usual, least=0),
        "short_factors": parameters.numbers("short_factor", rotated // 2),
        "long_factors": parameters.numbers("long_factor", rotated // 2),
    }


_ROPE_SCALES = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}


def _original_positions(fields: Fields, parameters: Fields) -> int:
    return parameters.size("original_max_position_embeddings", fields.size("max_position_embeddings"))


# --- Weights ----------------------------------------------------------------------------------------------------------

LAYER = "model.layers.{layer}."

# The norms of a block that normalises the input of attention and of the MLP.
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def weights(config: ModelConfig, norms: Mapping[str, str] = NORMS) -> list[Weight]:
    """The table of a Llama-shaped decoder with a dense MLP; `norms`: the names of a block's norms, theirs and ours."""
    return [*ends(config), *norm_weights(norms), *attention_weights(config), *mlp_weights(config)]


def ends(config: ModelConfig) -> list[Weight]:
    """Embedding, last norm and, where it is not the embedding again, the head."""
    head = [] if config.tie_embeddings else [Weight("lm_head.weight", "head.weight")]
    return [
        Weight("model.embed_tokens.weight", "embedding.weight"),
        Weight("model.norm.weight", "final_norm.weight"),
        *head,
    ]


def norm_weights(norms: Mapping[str, str] = NORMS) -> list[Weight]:
    return [Weight(f"{LAYER}{theirs}.weight", f"block.{ours}.weight") for theirs, ours in norms.items()]


def attention_weights(config: ModelConfig) -> list[Weight]:
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    table = [
        row
        for theirs, ours in projections.items()
        for row in linear(
            f"{LAYER}self_attn.{theirs}",
            f"block.attention.{ours}",
            bias=config.attention_out_bias if ours == "output" else config.qkv_bias,
        )
    ]
    if config.qk_norm:
        table.append(Weight(f"{LAYER}self_attn.q_norm.weight", "block.attention.query_norm.weight"))
        table.append(Weight(f"{LAYER}self_attn.k_norm.weight", "block.attention.key_norm.weight"))
    return table


def mlp_weights(config: ModelConfig) -> list[Weight]:
    return [
        row
        for name in ("gate", "up", "down")
        for row in linear(f"{LAYER}mlp.{name}_proj", f"block.mlp.{name}", bias=config.mlp_bias)
    ]


def expert_weights(block: str, gate: str, up: str, down: str) -> list[Weight]:
    """A router and its experts under `block`: matrices [out, in] on their side, one array [E, in, out] on ours."""
    expert = f"{LAYER}{block}.experts.{{expert}}."
    return [
        Weight(f"{LAYER}{block}.gate.weight", "block.mlp.router.weight"),
        Weight(f"{expert}{gate}.weight", "block.mlp.gate", transpose=True),
        Weight(f"{expert}{up}.weight", "block.mlp.up", transpose=True),
        Weight(f"{expert}{down}.weight", "block.mlp.down", transpose=True),
    ]


def linear(source: str, target: str, *, bias: bool, rows: tuple[tuple[int, int], ...] | None = None) -> list[Weight]:
    """A linear layer: its weight and, if it has one, its bias."""
    return [
        Weight(f"{source}.{part}", f"{target}.{part}", rows) for part in (("weight", "bias") if bias else ("weight",))
    ]
