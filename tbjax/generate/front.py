"""What a user asks a model, and gets: texts, chats or token ids in, the like out, at once or piece by piece."""

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tbjax.generate.engine import write
from tbjax.generate.scores import Likelihood, loglikelihood
from tbjax.generate.settings import Settings
from tbjax.generate.stopping import Answer, End
from tbjax.model import Decoder
from tbjax.prompts import Asked, Prompt, asked, reader

# Seeds are 32 bits: the widest that is the same with and without JAX's 64-bit mode.
SEED_BITS = 32

MakeTokenizer = Callable[[], Any]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


class Generation(NamedTuple):
    """An answer and what there is to know of it."""

    text: str | None  # None where token ids were asked
    tokens: list[int]
    log_probabilities: list[float]  # of each token under the model, whatever the settings of sampling
    end: End  # why there are no more: "eos", "stop" (a stop string) or "length"


def generate(
    model: Decoder,
    prompt: Prompt,
    *said: Any,
    tokenizer: MakeTokenizer,
    within: Around,
    seed: int | Sequence[int] | None,
    stream: bool,
) -> Any:
    """What follows a prompt, in its form; with `stream` an iterator over pieces of it. `said` are settings, of which
    the later come before the earlier."""
    settings = Settings.of(*said)
    question = asked(prompt, tokenizer, model.config.vocab_size)
    if stream and settings.return_dict_in_generate:
        raise ValueError("stream=True gives pieces of text, return_dict_in_generate=True whole answers: give one.")
    read_as = question.read_as or (reader(tokenizer()) if settings.stop_strings else None)
    seeds = _seeds(seed, len(question.rows)) if settings.do_sample else None
    progress = write(model, question.rows, settings, seeds=seeds, read_as=read_as, stream=stream)
    if stream:
        return _pieces(progress, question, within)
    with within():
        *_, answers = progress
    return question.form([_finished(answer, question, settings) for answer in answers])


def score(
    model: Decoder,
    prompts: Prompt,
    completions: str | Sequence[Any],
    *,
    tokenizer: MakeTokenizer,
    within: Around,
) -> Likelihood | list[Likelihood]:
    """How likely each completion is after its prompt."""
    question = asked(prompts, tokenizer, model.config.vocab_size)
    if question.read_as is None:
        rows = asked(completions, tokenizer, model.config.vocab_size).rows
    else:
        texts = [completions] if isinstance(completions, str) else list(completions)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("the completions of texts are texts: give a string, or a list of them.")
        rows = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    with within():
        return question.form(loglikelihood(model, question.rows, rows))


def _pieces(progress: Iterator[list[Answer]], question: Asked, within: Around) -> Iterator[Any]:
    """What is new of all answers, whenever there is something."""
    while True:
        with within():  # entered anew for each piece: what a user does between two is not within
            answers = next(progress, None)
        if answers is None:
            return
        pieces = [answer.new_tokens() if question.read_as is None else answer.piece() for answer in answers]
        if any(pieces):
            yield question.form(pieces)


def _finished(answer: Answer, question: Asked, settings: Settings) -> Any:
    text = None if question.read_as is None else answer.text
    if settings.return_dict_in_generate:
        return Generation(text, answer.tokens, answer.log_probabilities, answer.end or "length")
    return answer.tokens if text is None else text


def _seeds(seed: int | Sequence[int] | None, prompts: int) -> list[int]:
    """One for each prompt. A single number is the first's; the others follow it."""
    if seed is None:
        seed = secrets.randbits(SEED_BITS)
        if jax.process_count() > 1:  # all have to draw the same
            from jax.experimental import multihost_utils

            seed = int(multihost_utils.broadcast_one_to_all(np.uint32(seed)))
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return [(int(seed) + row) % (1 << SEED_BITS) for row in range(prompts)]
    if not isinstance(seed, Sequence | np.ndarray) or not all(
        isinstance(one, int | np.integer) and not isinstance(one, bool) for one in seed
    ):
        raise ValueError(f"seed={seed!r} must be an integer, or one for each prompt.")
    if len(seed) != prompts:
        raise ValueError(f"there are {len(seed)} seeds and {prompts} prompts: give one to each, or a single one.")
    return [int(one) % (1 << SEED_BITS) for one in seed]
