"""Gemma 3, text: Gemma 2 with normalised queries and keys, no capped softmax, and another rope under windows."""

from interop.families import common, gemma2
from interop.families.table import Family, Fields
from tbjax.config import ModelConfig, Rope


def config(fields: Fields) -> ModelConfig:
    # The field is there and transformers does not apply it.
    fields.require("attn_logit_softcapping")
    ropes = fields.section("rope_parameters")
    full, windowed = _rope(fields, ropes, "full_attention"), _rope(fields, ropes, "sliding_attention")
    unknown = sorted(ropes.names() - {"full_attention", "sliding_attention"})
    if unknown:
        ropes.refuse(unknown[0], "each kind of layer has its own rope, and nothing stands beside the two")
    return common.decoder(
        fields,
        "gemma3_text",
        rope=full,
        window_rope=None if windowed == full else windowed,
        qk_norm="head",
        **gemma2.differences(fields),
    )


def _rope(fields: Fields, ropes: Fields, kind: str) -> Rope:
    parameters = ropes.section(kind)
    # transformers looks for this one beside the two ropes and not in them, so here it has no effect.
    parameters.require("truncate", True)
    return common.rope(fields, parameters)


GEMMA3_TEXT = Family("gemma3_text", config, gemma2.weights)
