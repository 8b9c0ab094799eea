"""Qwen 3 with mixtures of experts, in all layers or in some."""

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import LayerKind, ModelConfig


def config(fields: Fields) -> ModelConfig:
    fields.require("use_qk_norm", True)
    bias = fields.flag("attention_bias")
    layers = _layers(fields)
    sparse = any(kind.sparse for kind in layers)
    experts = common.experts(
        fields,
        count="num_local_experts",  # `num_experts` in the file
        mlp="moe_intermediate_size",
        normalize_weights=fields.flag("norm_topk_prob"),
    )
    return common.decoder(
        fields,
        "qwen3_moe",
        layer_kinds=layers,
        moe=experts if sparse else None,
        qk_norm="head",
        qkv_bias=bias,
        attention_out_bias=bias,
    )


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """Every `decoder_sparse_step`-th layer is sparse, save those in `mlp_only_layers`."""
    step = fields.size("decoder_sparse_step")
    dense = fields.sequence("mlp_only_layers")
    window = common.window(fields)
    layers = common.layers(fields, window if fields.flag("use_sliding_window") else None)
    return tuple(
        kind._replace(sparse=layer not in dense and (layer + 1) % step == 0) for layer, kind in enumerate(layers)
    )


def weights(config: ModelConfig) -> list[Weight]:
    sparse = {kind.sparse for kind in config.layer_kinds}
    return [
        *common.ends(config),
        *common.norm_weights(),
        *common.attention_weights(config),
        *(common.mlp_weights(config) if False in sparse else ()),
        *(common.expert_weights("mlp", gate="gate_proj", up="up_proj", down="down_proj") if True in sparse else ()),
    ]


QWEN3_MOE = Family("qwen3_moe", config, weights)
