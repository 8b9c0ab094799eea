"""How likely a given answer is: the log-probability of each of its tokens after the prompt and those before.

One forward pass reads prompts and completions together, in the sizes that generation reads prompts in. Scores over the
vocabulary are made for a stretch of the sequence at a time, since of a long one they are larger than the model.

B batch, S tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.generate.engine import check_tokens
from tbjax.model import Decoder
from tbjax.pipeline import inference
from tbjax.room import bucket

# Positions whose scores over the vocabulary stand in memory at once, of each row.
STRETCH = 32


class Likelihood(NamedTuple):
    """Of one completion."""

    log_probability: float  # the sum over its tokens
    log_probabilities: list[float]  # of each token
    is_greedy: bool  # whether each token is the likeliest in its place


def loglikelihood(
    model: Decoder, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Of each completion after its prompt, all of them token ids."""
    if len(prompts) != len(completions):
        raise ValueError(f"there are {len(prompts)} prompts and {len(completions)} completions: give one to each.")
    if not prompts:
        raise ValueError("there is nothing to score: give at least one prompt and its completion.")
    config = model.config
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give at least one token (a beginning-of-text token, say).")
        if len(prompt) + len(completion) > config.max_positions:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and its completion {len(completion)}, "
                f"together more than the {config.max_positions} positions of the model."
            )
        for tokens in (prompt, completion):
            check_tokens(np.asarray(tokens, None if len(tokens) else np.int32), config.vocab_size)
    whole = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    ways = model.sharding.size("dp", "fsdp", "ep", "pp")
    size, length = ways * bucket(-(-len(whole) // ways), 1), bucket(max(map(len, whole)))
    # On the right: no position of a token moves, whatever is behind it.
    tokens, mask = (np.zeros((size, length), np.int32) for _ in range(2))
    mask[:, 0] = 1
    for row, ids in enumerate(whole):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    found = [np.asarray(a) for a in _of_next(model, tokens, mask)]
    answers = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        own = slice(len(prompt) - 1, len(prompt) - 1 + len(completion))
        of_each, best = (a[row, own] for a in found)
        answers.append(Likelihood(float(of_each.sum(dtype=np.float64)), of_each.tolist(), bool(best.all())))
    return answers


@jax.jit
def _of_next(model: Decoder, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S]: at each place the log-probability of the token that follows, and whether it is the likeliest."""
    # What padding counts as does not matter to a causal model, but for ropes that turn by the length of their row.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if inference.runs_in_stages(model):
        states = inference.states(model, tokens, mask, positions)
    else:
        states = model.hidden(tokens, mask, positions).states
    following = jnp.roll(tokens, -1, axis=1)
    stretch = min(STRETCH, tokens.shape[1])

    def score(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part, of_part = (
            jax.lax.dynamic_slice_in_dim(a, number * stretch, stretch, axis=1) for a in (states, following)
        )
        scores = model.logits(part).astype(jnp.float32)
        own = jnp.take_along_axis(scores, of_part[..., None], axis=-1)[..., 0]
        new = own - jax.nn.logsumexp(scores, axis=-1), jnp.argmax(scores, axis=-1) == of_part
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=number * stretch, axis=1)
        return put(found[0], new[0]), put(found[1], new[1])

    empty = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, bool)
    found = jax.lax.fori_loop(0, tokens.shape[1] // stretch, score, empty)
    return model.sharding.constrain(found[0], None, None), model.sharding.constrain(found[1], None, None)
