"""Mixtral: Mistral with a mixture of experts in every layer."""

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    layers = common.layers(fields, common.window(fields))
    return common.decoder(
        fields,
        "mixtral",
        layer_kinds=tuple(kind._replace(sparse=True) for kind in layers),
        moe=common.experts(fields, count="num_local_experts", mlp="intermediate_size", normalize_weights=True),
    )


def weights(config: ModelConfig) -> list[Weight]:
    return [
        *common.ends(config),
        *common.norm_weights(),
        *common.attention_weights(config),
        *common.expert_weights("block_sparse_moe", gate="w1", up="w3", down="w2"),
    ]


MIXTRAL = Family("mixtral", config, weights)
