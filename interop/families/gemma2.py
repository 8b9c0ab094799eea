"""Gemma 2: norms on both sides of attention and MLP, alternating windows, and logits capped by a tanh."""

from typing import Any

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import ModelConfig

NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def differences(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, and not with Llama."""
    bias = fields.flag("attention_bias")
    return {
        "layer_kinds": common.typed_layers(fields),
        "norm_offset": 1.0,
        "norm_placement": "both",
        "activation": fields.choice("hidden_activation", common.ACTIVATIONS),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "query_scale": fields.number("query_pre_attn_scalar", above=0) ** -0.5,
        "embed_scale": fields.size("hidden_size") ** 0.5,
        "logits_softcap": softcap(fields, "final_logit_softcapping"),
    }


def softcap(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name, above=0)


def config(fields: Fields) -> ModelConfig:
    return common.decoder(
        fields,
        "gemma2",
        attention_softcap=softcap(fields, "attn_logit_softcapping"),
        **differences(fields),
    )


def weights(config: ModelConfig) -> list[Weight]:
    return common.weights(config, NORMS)


GEMMA2 = Family("gemma2", config, weights)
