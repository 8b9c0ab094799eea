"""Qwen 3, dense: Llama with queries and keys normalised head by head, and a sliding window on some layers."""

from interop.families import common
from interop.families.table import Family, Fields
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    fields.require("use_qk_norm", True)
    bias = fields.flag("attention_bias")
    return common.decoder(
        fields,
        "qwen3",
        layer_kinds=common.typed_layers(fields),
        qk_norm="head",
        qkv_bias=bias,
        attention_out_bias=bias,
    )


QWEN3 = Family("qwen3", config, common.weights)
