"""Generation: what follows a prompt.

    front      texts, chats or token ids in, the like out: what `CausalLM.generate` and `loglikelihood` do
    settings   what is asked for, in the words of transformers' GenerationConfig
    engine     rows of token ids in, answers out
    programs   the two programs of the device: one reads prompts, one writes tokens
    layers     the weights as the CPU's programs like them
    sampling   how a token is chosen by its scores
    stopping   where an answer ends, and what of its text is settled
    scores     how likely a given answer is
    command    `tbjax generate`

Names are imported when first asked for, so that `tbjax --help` need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbjax.generate.engine import check_tokens, generate, write
    from tbjax.generate.front import Generation
    from tbjax.generate.programs import decode, prefill
    from tbjax.generate.sampling import Rows
    from tbjax.generate.scores import Likelihood, loglikelihood
    from tbjax.generate.settings import Options, Settings
    from tbjax.generate.stopping import Answer

_HOMES = {
    "Answer": "stopping",
    "Generation": "front",
    "Likelihood": "scores",
    "Options": "settings",
    "Rows": "sampling",
    "Settings": "settings",
    "check_tokens": "engine",
    "decode": "programs",
    "generate": "engine",
    "loglikelihood": "scores",
    "prefill": "programs",
    "write": "engine",
}

__all__ = [
    "Answer",
    "Generation",
    "Likelihood",
    "Options",
    "Rows",
    "Settings",
    "check_tokens",
    "decode",
    "generate",
    "loglikelihood",
    "prefill",
    "write",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"tbjax.generate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tbjax.generate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
