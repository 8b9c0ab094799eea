"""From rows of token ids to answers, a dispatch of the device after the other.

Rows are read and written together. A row that outgrows the trained length of a `longrope` model is read anew there,
since from then on every key turns otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tbjax.config import ModelConfig
from tbjax.generate.layers import Singles, singles
from tbjax.generate.programs import chunk_of, decode, prefill
from tbjax.generate.sampling import Rows, keys
from tbjax.generate.settings import Settings
from tbjax.generate.stopping import Answer
from tbjax.model import Decoder
from tbjax.room import bucket

# Tokens of a dispatch: so many as read smoothly where they are shown as they come; more where they are only looked
# through for stop strings, behind which at most so many are written in vain.
STREAM_BLOCK = 8
STOP_BLOCK = 32


def write(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    seeds: Sequence[int] | None = None,
    read_as: Callable[[list[int]], str] | None = None,
    stream: bool = False,
) -> Iterator[list[Answer]]:
    """The answers to all prompts, after each dispatch as far as they have come: always the same list.

    To each prompt there are `settings.num_return_sequences`, one after the other. `seeds` are those of the prompts, and
    `read_as` gives the text of tokens, where it is wanted. What cannot be done raises before anything is written.
    """
    budgets = _check(model.config, prompts, settings)
    return _written(model, prompts, settings, budgets, seeds, read_as, stream)


def _written(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    budgets: Sequence[int],
    seeds: Sequence[int] | None,
    read_as: Callable[[list[int]], str] | None,
    stream: bool,
) -> Iterator[list[Answer]]:
    samples = range(settings.num_return_sequences)
    rows = [(prompt, budget, sample) for prompt, budget in enumerate(budgets) for sample in samples]
    answers = [Answer(budget, settings.eos_token_id, read_as, settings.stop_strings) for _, budget, _ in rows]
    drawn = None
    if settings.do_sample:
        drawn = keys([((seeds or range(len(prompts)))[prompt], sample) for prompt, _, sample in rows])
    layers = singles(model) if any(budgets) else None
    block = STREAM_BLOCK if stream else STOP_BLOCK if settings.stop_strings else max(budgets)
    if not any(budgets):
        yield answers
    while unfinished := [row for row, answer in enumerate(answers) if answer.missing]:
        # Usually one group, whose steps are the whole budget.
        groups: dict[int, list[int]] = {}
        for row in unfinished:
            length = len(prompts[rows[row][0]]) + len(answers[row].tokens)
            groups.setdefault(_steps(model.config, length, answers[row].missing), []).append(row)
        for steps, of_group in groups.items():
            batch = _Batch(
                model,
                [[*prompts[rows[row][0]], *answers[row].tokens] for row in of_group],
                [answers[row] for row in of_group],
                [settings.least(len(prompts[rows[row][0]])) for row in of_group],
                settings,
                None if drawn is None else drawn[of_group],
                layers,
            )
            for _ in batch.run(steps, block):
                yield answers


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_tokens: Sequence[int] = ()
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to and without the first of `eos_tokens`."""
    settings = Settings(max_new_tokens=max_new_tokens, eos_token_id=tuple(eos_tokens))
    *_, answers = write(model, prompts, settings)
    return [answer.tokens for answer in answers]


def _steps(config: ModelConfig, length: int, budget: int) -> int:
    """How many tokens a row of `length` may write before all its keys turn otherwise; of a longer budget, about that.

    Budgets that differ are written together, up to the longest of a bucket.
    """
    trained = [r.original_positions for r in (config.rope, config.window_rope) if r and r.kind == "longrope"]
    within = [limit - length + 1 for limit in trained if length <= limit]
    return min([bucket(budget), *within])


class _Batch:
    """Rows that are read and written together, filled up to a batch size that is compiled for."""

    def __init__(
        self,
        model: Decoder,
        tokens: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        least: Sequence[int],
        settings: Settings,
        drawn: np.ndarray | None,
        layers: Singles | None,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.answers = answers
        self.least = least
        self.settings = settings
        self.drawn = drawn
        self.layers = layers
        ways = model.sharding.size("dp", "fsdp", "ep")
        self.size = ways * bucket(-(-len(tokens) // ways), 1)

    def run(self, steps: int, block: int) -> Iterator[None]:
        """Up to `steps` tokens of each row, at most `block` between one yield and the next."""
        longest = max(map(len, self.tokens))
        chunk = chunk_of(self.model, self.size, length := bucket(longest))
        length = -(-length // chunk) * chunk
        tokens, mask = (np.zeros((self.size, length), np.int32) for _ in range(2))
        for row, prompt in enumerate(self.tokens):
            tokens[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        tokens[len(self.tokens) :], mask[len(self.tokens) :] = tokens[len(self.tokens) - 1], mask[len(self.tokens) - 1]
        eos = np.asarray(sorted(self.settings.eos_token_id) or [-1], np.int32)
        rules = {name: jnp.float32(value) for name, value in self.settings.rules.items()}
        wanted = {"log_probabilities": self.settings.return_dict_in_generate}
        chosen, state = prefill(
            self.model, tokens, mask, rules, self._rows(tokens, mask, rules), eos, self._done(), self.layers,
            capacity=length + bucket(steps), **wanted,
        )  # fmt: skip
        self._take(chosen.token[:, None], None if chosen.log_probability is None else chosen.log_probability[:, None])
        yield
        written, room = 1, bucket(min(block, steps))
        while written < steps and (left := max(answer.missing for answer in self.answers)):
            # Rows that have come to an end of which the device does not know: their budget, or a stop string.
            state = state._replace(done=state.done | self._done())
            count = min(block, steps - written, left)
            chosen, state = decode(self.model, state, rules, eos, np.int32(count), self.layers, room=room, **wanted)
            self._take(chosen.token, chosen.log_probability, count)
            written += count
            yield

    def _rows(self, tokens: np.ndarray, mask: np.ndarray, rules: Any) -> Rows:
        seen: Any = None
        if "repetition_penalty" in rules:
            seen = np.zeros((self.size, self.model.config.vocab_size), bool)
            for row in range(self.size):
                seen[row, tokens[row][mask[row].astype(bool)]] = True
        return Rows(
            self._filled([len(answer.tokens) for answer in self.answers]),
            self._filled(self.least),
            None if self.drawn is None else self._filled(self.drawn),
            seen,
        )

    def _done(self) -> np.ndarray:
        """The rows that need no more tokens, those among them that only fill the batch up."""
        return self._filled([not answer.missing for answer in self.answers], fill=True)

    def _filled(self, values: Any, fill: Any = None) -> Any:
        a = np.asarray(values)
        a = a.astype(np.int32) if a.dtype == np.int64 else a
        more = np.repeat(a[-1:] if fill is None else np.full_like(a[:1], fill), self.size - len(a), axis=0)
        return np.concatenate((a, more))

    def _take(self, tokens: Any, log_probabilities: Any, count: int = 1) -> None:
        tokens = np.asarray(tokens)
        of_all = None if log_probabilities is None else np.asarray(log_probabilities)
        for row, answer in enumerate(self.answers):
            answer.take(tokens[row, :count].tolist(), None if of_all is None else of_all[row, :count].tolist())


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], settings: Settings) -> list[int]:
    """The budget of each prompt."""
    if not prompts:
        raise ValueError("there is no prompt to continue: give at least one.")
    check_tokens(np.asarray(settings.eos_token_id, np.int64), np.iinfo(np.int32).max, "eos_token_id")
    budgets = []
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give at least one token (a beginning-of-text token, say).")
        check_tokens(np.asarray(prompt), config.vocab_size)
        if len(prompt) > config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, more than the {config.max_positions} positions of the model."
            )
        budget = settings.budget(len(prompt), config.max_positions)
        if len(prompt) + budget > config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens={budget}, "
                f"together more than the {config.max_positions} positions of the model."
            )
        budgets.append(budget)
    return budgets


def check_tokens(tokens: np.ndarray, vocab_size: int, name: str = "token id") -> None:
    """Refuse token ids that are not in the vocabulary (on the device they would be clipped without a word)."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, not {tokens.dtype}.")
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(f"{name} {bad.flat[0]} is outside the vocabulary of {vocab_size}.")
