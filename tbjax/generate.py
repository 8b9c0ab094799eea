"""Greedy generation: one program reads the prompt, another writes tokens, both on the device.

Prompts of different lengths are padded on the left, so that every row ends in the same slot; padding is masked, so a
row's tokens do not depend on its neighbours. A row that outgrows the trained length of a `longrope` model is read anew
there, since from then on every key turns otherwise. Lengths are rounded up to buckets, so that a new length seldom
compiles anew. The decode loop runs on the device until every row has ended: one dispatch for all tokens. A model that
lies over pipeline stages has programs of its own for both (`tbjax.pipeline.inference`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.config import ModelConfig
from tbjax.layers.cache import KVCache, make_cache
from tbjax.model import Decoder
from tbjax.pipeline import inference

# Prompt lengths and cache capacities are rounded up to a power of two no smaller than this.
SMALLEST_BUCKET = 32


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without the first of `eos_tokens`."""
    _check(model, prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    budgets = {row: int(max_new_tokens) for row in range(len(prompts)) if max_new_tokens}
    while budgets:
        # Usually one group, whose steps are the whole budget.
        groups: dict[int, list[int]] = {}
        for row, budget in budgets.items():
            steps = _steps(model.config, len(prompts[row]) + len(answers[row]), budget)
            groups.setdefault(steps, []).append(row)
        for steps, rows in groups.items():
            written = _write(model, [[*prompts[row], *answers[row]] for row in rows], steps, set(eos_tokens))
            for row, tokens in zip(rows, written, strict=True):
                answers[row] += tokens
                budgets[row] -= steps
                if len(tokens) < steps or not budgets[row]:
                    del budgets[row]
    return answers


def _steps(config: ModelConfig, length: int, budget: int) -> int:
    """How many tokens a row of `length` may write before all its keys turn otherwise."""
    trained = [r.original_positions for r in (config.rope, config.window_rope) if r and r.kind == "longrope"]
    within = [limit - length + 1 for limit in trained if length <= limit]
    return min([budget, *within])


def _write(model: Decoder, prompts: Sequence[Sequence[int]], count: int, eos_tokens: set[int]) -> list[list[int]]:
    """Up to `count` tokens after each prompt."""
    length = _bucket(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    capacity = length + _bucket(count)
    first, cache = _prefill(model, tokens, mask, capacity)
    eos = np.asarray(sorted(eos_tokens) or [-1], np.int32)
    written, _ = _decode(model, first, cache, eos, jnp.int32(count), capacity - length)
    return [_until(row[:count].tolist(), eos_tokens) for row in np.asarray(written)]


@partial(jax.jit, static_argnames="capacity")
def _prefill(model: Decoder, tokens: jax.Array, mask: jax.Array, capacity: int) -> tuple[jax.Array, KVCache | None]:
    if inference.runs_in_stages(model):
        return inference.prefill(model, tokens, mask, capacity)
    cache = make_cache(model.config, model.sharding, tokens.shape[0], capacity, model.dtype)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden = model.hidden(tokens, mask, positions, cache)
    return _best(model, hidden.states[:, -1:]), hidden.cache


@partial(jax.jit, static_argnames="room", donate_argnames="cache")
def _decode(model: Decoder, first: jax.Array, cache: KVCache, eos: jax.Array, limit: jax.Array, room: int) -> Any:
    """[B, room]: `first`, then what follows, until every row has met one of `eos` or `limit` tokens are written.

    The cache is given back, so that it can be written in place.
    """
    if inference.runs_in_stages(model):
        return inference.decode(model, first, cache, eos, limit, room)

    def unfinished(state: Any) -> jax.Array:
        written, _, _, done = state
        return (written < limit) & ~jnp.all(done)

    def step(state: Any) -> Any:
        written, out, cache, done = state
        token = jax.lax.dynamic_slice_in_dim(out, written - 1, 1, axis=1)
        position = jnp.sum(cache.valid, axis=1, keepdims=True)
        hidden = model.hidden(token, None, position, cache)
        token = _best(model, hidden.states)
        out = jax.lax.dynamic_update_slice_in_dim(out, token, written, axis=1)
        return written + 1, out, hidden.cache, done | jnp.isin(token[:, 0], eos)

    out = jnp.zeros((first.shape[0], room), jnp.int32).at[:, :1].set(first)
    state = (jnp.int32(1), out, cache, jnp.isin(first[:, 0], eos))
    _, out, cache, _ = jax.lax.while_loop(unfinished, step, state)
    return model.sharding.constrain(out, None, None), cache


def _best(model: Decoder, states: jax.Array) -> jax.Array:
    """The likeliest token of each row, known to every device."""
    return model.sharding.constrain(jnp.argmax(model.logits(states), axis=-1).astype(jnp.int32), None, None)


def _bucket(length: int) -> int:
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def _until(tokens: list[int], eos: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, int | np.integer) or isinstance(max_new_tokens, bool):
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer.")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is negative.")
    if not prompts:
        raise ValueError("there is no prompt to continue: give at least one.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give at least one token (a beginning-of-text token, say).")
        if len(prompt) + max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and max_new_tokens={max_new_tokens}, "
                f"together more than the {model.config.max_positions} positions of the model."
            )
        check_tokens(np.asarray(prompt), model.config.vocab_size)


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuse token ids that are not in the vocabulary (on the device they would be clipped without a word)."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, not {tokens.dtype}.")
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad.flat[0]} is outside the vocabulary of {vocab_size}.")
