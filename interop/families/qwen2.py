"""Qwen 2 and 2.5: Llama with biases on query, key and value, and a sliding window on some layers."""

from interop.families import common
from interop.families.table import Family, Fields
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    fields.require("use_mrope", False)
    return common.decoder(fields, "qwen2", layer_kinds=common.typed_layers(fields), qkv_bias=True)


QWEN2 = Family("qwen2", config, common.weights)
