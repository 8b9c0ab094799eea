"""Phi 3, 3.5 and 4: Llama with fused projections and, in some, a partly turned head and longrope."""

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    return common.decoder(
        fields,
        "phi3",
        layer_kinds=common.layers(fields, common.window(fields)),
        rope=common.rope(fields, fields.section("rope_parameters"), partial=True),
    )


def weights(config: ModelConfig) -> list[Weight]:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    query_key_value, gate_up = (f"{common.LAYER}{name}.weight" for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    return [
        *common.ends(config),
        *common.norm_weights(),
        Weight(query_key_value, "block.attention.query.weight", ((0, queries),)),
        Weight(query_key_value, "block.attention.key.weight", ((queries, queries + keys),)),
        Weight(query_key_value, "block.attention.value.weight", ((queries + keys, queries + 2 * keys),)),
        Weight(f"{common.LAYER}self_attn.o_proj.weight", "block.attention.output.weight"),
        Weight(gate_up, "block.mlp.gate.weight", ((0, config.mlp),)),
        Weight(gate_up, "block.mlp.up.weight", ((config.mlp, 2 * config.mlp),)),
        Weight(f"{common.LAYER}mlp.down_proj.weight", "block.mlp.down.weight"),
    ]


PHI3 = Family("phi3", config, weights)
