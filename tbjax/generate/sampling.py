"""How the next token is chosen: by the best score, or by chance among the likely.

Scores go through the same rules in the same order as in transformers: the penalty of repetition, then temperature,
top-k, top-p and min-p, each of what those before it have left. A program holds only the rules that are asked for, and
takes their numbers as arguments, so that another temperature compiles nothing.

Chance is a row's own. Each row has a seed, and the noise of its n-th token is drawn from that and n alone: whatever
stands beside it in a batch, on whatever mesh, it draws the same. The token is the best of the scores with Gumbel noise
added, which is a draw from their softmax.

Neither top-k nor top-p sorts. Both ask for the largest score that so much (of the count, of the probability) is at or
above, and a search over the bits of a float finds it in 32 sums over the vocabulary, which devices that have a part of
it each take together. Tokens of equal probability stay or go together.

B batch, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.sharding import Sharding

# By name, see `tbjax.generate.settings`. With "temperature" chance decides, and without it the best score.
Rules = Mapping[str, jax.Array]


class Rows(NamedTuple):
    """What choosing has to know of each row, apart from its scores. What no rule asks for is None."""

    written: jax.Array  # [B] how many tokens of its answer a row has
    least: jax.Array  # [B] how many it is to have before an end token
    keys: jax.Array | None = None  # [B, 2] from which its noise is drawn
    seen: jax.Array | None = None  # [B, V] bool: the tokens that it has, its prompt's among them


class Chosen(NamedTuple):
    """A token of each row [B], and its log-probability under the model, whatever the rules."""

    token: jax.Array
    log_probability: jax.Array | None


def keys(seeds: Sequence[tuple[int, int]]) -> np.ndarray:
    """[B, 2]: a key for each row, of its seed and of which of the seed's samples it is."""
    numbers = np.asarray(seeds, np.uint32)
    return np.asarray(_keys(numbers[:, 0], numbers[:, 1]))


@jax.jit
@jax.vmap
def _keys(seed: jax.Array, sample: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(jax.random.key(seed), sample))


def choose(
    rules: Rules, scores: jax.Array, rows: Rows, eos: jax.Array, sharding: Sharding, *, log_probabilities: bool = False
) -> tuple[Chosen, Rows]:
    """A token of each row by its scores [B, V], and the rows that have it."""
    raw = scores = sharding.constrain(scores.astype(jnp.float32), "batch", "vocab")
    if "repetition_penalty" in rules and rows.seen is not None:
        penalty = rules["repetition_penalty"]
        scores = jnp.where(rows.seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    ends = jnp.zeros(scores.shape[-1], bool).at[eos].set(True, mode="drop", wrap_negative_indices=False)
    scores = jnp.where((rows.written < rows.least)[:, None] & ends, -jnp.inf, scores)
    if "temperature" in rules and rows.keys is not None:
        scores = likely(rules, scores) + sharding.constrain(
            _noise(rows.keys, rows.written, scores.shape[-1]), "batch", "vocab"
        )
    token = sharding.constrain(jnp.argmax(scores, axis=-1).astype(jnp.int32), None)
    log_probability = None
    if log_probabilities:
        own = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0]
        log_probability = sharding.constrain(own - jax.nn.logsumexp(raw, axis=-1), None)
    seen = rows.seen
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[-1]) == token[:, None])
    return Chosen(token, log_probability), rows._replace(written=rows.written + 1, seen=seen)


def likely(rules: Rules, scores: jax.Array) -> jax.Array:
    """Scores [B, V] by temperature, -inf where a token may not be drawn."""
    scores = scores / rules["temperature"]
    if "top_k" in rules:
        threshold = _largest_below(scores, jnp.ones_like(scores), jnp.minimum(rules["top_k"], scores.shape[-1]))
        scores = jnp.where(scores < threshold, -jnp.inf, scores)
    if "top_p" in rules:
        probabilities = jax.nn.softmax(scores, axis=-1)
        # The sum over all may fall short of top_p by rounding: then no threshold is reached, and all stay.
        threshold = _largest_below(probabilities, probabilities, rules["top_p"])
        scores = jnp.where(probabilities < threshold, -jnp.inf, scores)
    if "min_p" in rules:
        least = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(rules["min_p"])
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def _noise(keys: jax.Array, written: jax.Array, vocab_size: int) -> jax.Array:
    def of_row(key: jax.Array, written: jax.Array) -> jax.Array:
        drawn = jax.random.fold_in(jax.random.wrap_key_data(key), written)
        return jax.random.gumbel(drawn, (vocab_size,), jnp.float32)

    return jax.vmap(of_row)(keys, written)


def _largest_below(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """[B, 1]: of the values [B, V] the largest such that the weights of those at or above it reach the target."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    # Unsigned integers in the order of the floats: negative ones turned round, all others above them.
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits & sign, ~bits, bits | sign)

    def settle(place: jax.Array, found: jax.Array) -> jax.Array:
        """One more bit of the threshold, from the highest down: set if enough lies at or above."""
        tried = found | (sign >> place.astype(jnp.uint32))
        above = jnp.sum(jnp.where(ordered >= tried, weights, 0), axis=-1, keepdims=True)
        return jnp.where(above >= target, tried, found)

    found = jax.lax.fori_loop(0, 32, settle, jnp.zeros((values.shape[0], 1), jnp.uint32))
    threshold = jax.lax.bitcast_convert_type(jnp.where(found & sign, found ^ sign, ~found), jnp.float32)
    # Found is 0 where nothing reaches the target, which reads as not a number: then all are kept.
    return jnp.where(found == 0, -jnp.inf, jnp.minimum(threshold, jnp.max(values, axis=-1, keepdims=True)))
