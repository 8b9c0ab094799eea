"""Mistral: Llama with a sliding window over all layers."""

from interop.families import common
from interop.families.table import Family, Fields
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    return common.decoder(fields, "mistral", layer_kinds=common.layers(fields, common.window(fields)))


MISTRAL = Family("mistral", config, common.weights)
