"""Llama 1, 2, 3, 3.1, 3.2, and the many that are Llama by another name (SmolLM, TinyLlama, Yi, ...)."""

from interop.families import common
from interop.families.table import Family, Fields
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return common.decoder(
        fields,
        "llama",
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


LLAMA = Family("llama", config, common.weights)
