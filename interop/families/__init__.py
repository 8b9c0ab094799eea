"""The families of checkpoints, a file each: how a Hugging Face config becomes a `ModelConfig`, and which of our
parameters each tensor is.

    config = family("llama").config(Fields(transformers_config.to_dict()))    # a ModelConfig
    family("llama").weights(config)                                           # a list of Weight(source, target)
"""

from collections.abc import Mapping

from interop.families.falcon import FALCON
from interop.families.gemma2 import GEMMA2
from interop.families.gemma3 import GEMMA3_TEXT
from interop.families.llama import LLAMA
from interop.families.mistral import MISTRAL
from interop.families.mixtral import MIXTRAL
from interop.families.olmo2 import OLMO2
from interop.families.phi3 import PHI3
from interop.families.qwen2 import QWEN2
from interop.families.qwen3 import QWEN3
from interop.families.qwen3_moe import QWEN3_MOE
from interop.families.table import Family, Fields, Weight

__all__ = ["FAMILIES", "Family", "Fields", "Weight", "family"]

FAMILIES: Mapping[str, Family] = {
    entry.name: entry
    for entry in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        FALCON,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3_TEXT,
        PHI3,
        OLMO2,
    )
}


def family(model_type: str) -> Family:
    """The family of a config's `model_type`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported: tbjax does {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]
