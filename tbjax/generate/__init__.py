"""Generation: what follows a prompt.

    settings   what is asked for, in the words of transformers' GenerationConfig
    programs   the two programs of the device: one reads prompts, one writes tokens
    layers     the weights as the CPU's programs like them
    sampling   how a token is chosen of its scores
    stopping   where an answer ends, and what of its text is settled
    engine     rows of token ids in, answers out
    scores     how likely a given answer is

`CausalLM.generate` (`tbjax.api`) puts texts and chats around it (`tbjax.prompts`).
"""

from collections.abc import Sequence

from tbjax.generate.engine import check_tokens, write
from tbjax.generate.programs import decode, prefill
from tbjax.generate.sampling import Rows
from tbjax.generate.settings import DEFAULT_NEW_TOKENS, Options, Settings
from tbjax.generate.stopping import Answer
from tbjax.model import Decoder

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Answer",
    "Options",
    "Rows",
    "Settings",
    "check_tokens",
    "decode",
    "generate",
    "prefill",
    "write",
]


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_tokens: Sequence[int] = ()
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to and without the first of `eos_tokens`."""
    settings = Settings(max_new_tokens=max_new_tokens, eos_token_id=tuple(eos_tokens))
    *_, answers = write(model, prompts, settings)
    return [answer.tokens for answer in answers]
