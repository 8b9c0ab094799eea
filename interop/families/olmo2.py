"""OLMo 2: norms after attention and MLP instead of before, and over all heads of queries and keys at once."""

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import ModelConfig

NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def config(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return common.decoder(
        fields,
        "olmo2",
        norm_placement="post",
        qk_norm="full",
        qkv_bias=bias,
        attention_out_bias=bias,
    )


def weights(config: ModelConfig) -> list[Weight]:
    return common.weights(config, NORMS)


OLMO2 = Family("olmo2", config, weights)
