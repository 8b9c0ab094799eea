"""Falcon: three decoders under one name.

| | attention and MLP | norms before them | query_key_value |
|---|---|---|---|
| 7B (`multi_query`, `parallel_attn`) | side by side | one for both | all query heads, then one key and one value head |
| 40B, 180B (`new_decoder_architecture`) | side by side | one each (`num_ln_in_parallel_attn`: 1 or 2) | groups |
| RW (`alibi`, `bias`) | one after the other | one each | query, key and value of each head |

The rows of the fused `query_key_value` follow one formula in all three: K groups of G query heads, one key head and one
value head, each of N rows.
"""

from interop.families import common
from interop.families.table import Family, Fields, Weight
from tbjax.config import ModelConfig


def config(fields: Fields) -> ModelConfig:
    heads, embed = fields.size("num_attention_heads"), fields.size("hidden_size")
    if embed % heads:
        fields.refuse("hidden_size", f"num_attention_heads={heads} must divide it")
    bias, alibi = fields.flag("bias", False), fields.flag("alibi", False)
    return common.decoder(
        fields,
        "falcon",
        mlp=fields.size("ffn_hidden_size"),
        kv_heads=_kv_heads(fields, heads),
        head_dim=embed // heads,
        block=_block(fields),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_epsilon", least=0),
        activation=fields.choice("activation", common.ACTIVATIONS),
        gated_mlp=False,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        alibi=alibi,
        rope=None if alibi else common.rope(fields, fields.section("rope_parameters")),
    )


def _kv_heads(fields: Fields, heads: int) -> int:
    kv_heads, multi_query = fields.size("num_kv_heads", heads), fields.flag("multi_query", True)
    if fields.flag("new_decoder_architecture", False):
        return kv_heads
    if multi_query:
        return 1
    if kv_heads != heads:
        fields.refuse("num_kv_heads", f"without multi_query and new_decoder_architecture it must be {heads}, one each")
    return heads


def _block(fields: Fields) -> str:
    """How attention and MLP stand to each other; the combinations refused here fail in transformers too."""
    parallel = fields.flag("parallel_attn", True)
    norms = fields.get("num_ln_in_parallel_attn")
    if fields.flag("new_decoder_architecture", False):
        if not parallel:
            fields.refuse("parallel_attn", "new_decoder_architecture has attention and MLP in parallel")
        return fields.choice("num_ln_in_parallel_attn", {1: "shared", 2: "parallel"}, 2)
    if norms not in (None, 1):
        fields.refuse("num_ln_in_parallel_attn", "without new_decoder_architecture attention and MLP have one norm")
    return "shared" if parallel else "sequential"


def weights(config: ModelConfig) -> list[Weight]:
    layer = "transformer.h.{layer}."
    names = {"transformer.word_embeddings": "embedding", "transformer.ln_f": "final_norm"}
    if config.block == "parallel":
        names |= {f"{layer}ln_attn": "block.attention_norm", f"{layer}ln_mlp": "block.mlp_norm"}
    else:
        names |= {f"{layer}input_layernorm": "block.attention_norm"}
    if config.block == "sequential":
        names |= {f"{layer}post_attention_layernorm": "block.mlp_norm"}
    table = [row for theirs, ours in names.items() for row in common.linear(theirs, ours, bias=ours != "embedding")]
    if not config.tie_embeddings:
        table.append(Weight("lm_head.weight", "head.weight"))

    for ours, rows in _query_key_value_rows(config).items():
        source = f"{layer}self_attention.query_key_value"
        table += common.linear(source, f"block.attention.{ours}", bias=config.qkv_bias, rows=rows)
    output, up, down = (f"{layer}{name}" for name in ("self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    table += common.linear(output, "block.attention.output", bias=config.attention_out_bias)
    table += common.linear(up, "block.mlp.up", bias=config.mlp_bias)
    table += common.linear(down, "block.mlp.down", bias=config.mlp_bias)
    return table


def _query_key_value_rows(config: ModelConfig) -> dict[str, tuple[tuple[int, int], ...]]:
    """The rows of the fused projection, viewed as [K, G + 2, N], that are query, key and value."""
    queries = config.heads // config.kv_heads  # G

    def runs(first: int, stop: int) -> tuple[tuple[int, int], ...]:
        starts = (group * (queries + 2) for group in range(config.kv_heads))
        return tuple(((start + first) * config.head_dim, (start + stop) * config.head_dim) for start in starts)

    return {"query": runs(0, queries), "key": runs(queries, queries + 1), "value": runs(queries + 1, queries + 2)}


FALCON = Family(
    "falcon",
    config,
    weights,
    copies=(("lm_head.weight", "transformer.word_embeddings.weight"),),
)
