"""Attention written out: a block of queries at a time, so that scores never stand in memory as a whole.

It has a backward pass of its own, which computes the scores again from queries and keys: taken apart by the compiler's
differentiation, a policy that keeps what it finds would keep them. What the forward pass gave is marked, so that who
keeps it (`tbjax.remat`) does not compute attention twice.

Where queries and keys are the same tokens, the queries are first cut into bands, each of which meets the keys that any
of its queries can see and no later ones: of four bands together those are five eighths of all pairs.

B batch, S queries, T keys, K key-value heads, G queries per key-value head, N head dimension, Q queries of a block.
"""

import dataclasses
import math
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tbjax import native

Arrays = TypeVar("Arrays")

# A masked score: finite, so that a row which may attend to nothing (left padding) stays finite too.
MASKED = -1e30

# What attention gave, as `tbjax.remat` calls it.
ATTENDED = "attended"

# Float32 scores on one device at a time: small beside a layer's activations at training lengths, and still large enough
# for efficient matmuls.
SCORE_BYTES = 64 * 2**20

# A block's queries are a multiple of this where not all of them fit, and so are a band's: the width of the matrix units
# of TPUs, and a multiple of every tile of NVIDIA's.
BLOCK_MULTIPLE = 128

# Of so many bands each is a program of its own; of twice as many, a tenth less would be computed.
BANDS = 4


class Keys(NamedTuple):
    """What a query may look at, and from where."""

    query_slots: jax.Array  # [S] place of each query in the sequence of keys
    valid: (
        jax.Array | None
    )  # [B, T] bool: a real token stands there; None: everywhere, and queries and keys are the same
    positions: jax.Array  # [B, T] position of each key among its row's (or its document's) real tokens
    segments: jax.Array | None = None  # [B, T] the document of each key, which only its own queries see; None: one
    slots: jax.Array | None = None  # [T] place of each key in its sequence; None: they stand in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores are made of queries and keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[tuple[float, ...], ...] | None = None  # ALiBi's, [K, G]


def block_queries(queries: int, keys: int, heads: int) -> int:
    """How many of `queries` are scored at once on a device with so many `heads`, over all of its rows."""
    fitting = SCORE_BYTES // (4 * keys * heads)
    if fitting >= queries:
        return queries
    blocks = math.ceil(queries / max(BLOCK_MULTIPLE, fitting))
    return min(queries, math.ceil(queries / blocks / BLOCK_MULTIPLE) * BLOCK_MULTIPLE)


class Band(NamedTuple):
    """Consecutive queries, from `first` to before `last`; of the keys they see those from `begin` to before `last`."""

    first: int
    last: int
    begin: int

    def queries(self, a: Arrays) -> Arrays:
        """This band of [B, S, ...]."""
        return jax.tree.map(lambda a: a[:, self.first : self.last], a)

    def keys(self, key: jax.Array, value: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array, Keys]:
        """What the band sees, as if nothing else were there."""
        key, value, positions, segments = jax.tree.map(
            lambda a: a[:, self.begin : self.last], (key, value, keys.positions, keys.segments)
        )
        return key, value, Keys(keys.query_slots[self.first : self.last] - self.begin, None, positions, segments)

    def back(self, of_keys: jax.Array, count: int) -> jax.Array:
        """The gradient of what the band sees as one of all `count` keys."""
        return jnp.pad(of_keys, ((0, 0), (self.begin, count - self.last), (0, 0), (0, 0)))


def bands_of(queries: int, window: int | None) -> tuple[Band, ...]:
    """The bands of so many queries, which see themselves and what came before, or as much of it as a window shows."""
    width = math.ceil(queries / BANDS / BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    return tuple(
        Band(first, min(first + width, queries), 0 if window is None else max(0, first - window + 1))
        for first in range(0, queries, width)
    )


class _Sums(NamedTuple):
    """What the softmax of each query [B, S, K, G] was made of, from which its weights are known again."""

    highest: jax.Array  # of its scores
    share: jax.Array  # one over the sum of the exponentials of its scores less the highest; zero of no query


class _Given(NamedTuple):
    """What the backward pass of queries is given."""

    out: jax.Array  # [B, S, K, G, N]
    sums: _Sums
    of_out: jax.Array  # the gradient of `out`


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def blockwise(
    scoring: Scoring,
    block: int,
    bands: tuple[Band, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Keys,
) -> jax.Array:
    """The values [B, T, K, N] that each query [B, S, K, G, N] attends to by the keys [B, T, K, N], summed: `block`
    queries at a time, of each of the `bands` if there are any."""
    return _forward(scoring, block, bands, query, key, value, keys)[0]


def _forward(
    scoring: Scoring,
    block: int,
    bands: tuple[Band, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Keys,
) -> Any:
    if len(bands) > 1:
        parts = [_summed(scoring, block, band.queries(query), *band.keys(key, value, keys)) for band in bands]
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts)
    else:
        found = _summed(scoring, block, query, key, value, keys)
    out, sums = checkpoint_name(found, ATTENDED)
    return out, (query, key, value, keys, out, sums)


def _backward(scoring: Scoring, block: int, bands: tuple[Band, ...], kept: Any, of_out: jax.Array) -> Any:
    query, key, value, keys, out, sums = kept
    given = _Given(out, sums, of_out)
    if len(bands) <= 1:
        of_query, of_key, of_value = _gradients(scoring, block, query, key, value, keys, given)
        return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype), None
    parts = [
        _gradients(scoring, block, band.queries(query), *band.keys(key, value, keys), band.queries(given))
        for band in bands
    ]
    of_query, *of_both = zip(*parts, strict=True)
    spread = [
        [band.back(a.astype(jnp.float32), key.shape[1]) for band, a in zip(bands, of_keys, strict=True)]
        for of_keys in of_both
    ]
    of_key, of_value = (reduce(jnp.add, of_keys) for of_keys in spread)
    return jnp.concatenate(of_query, axis=1), of_key.astype(key.dtype), of_value.astype(value.dtype), None


blockwise.defvjp(_forward, _backward)


def _summed(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> tuple[jax.Array, _Sums]:
    if block >= query.shape[1]:
        return _block(scoring, query, key, value, keys)

    def step(_: None, queries: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, _Sums]]:
        return None, _block(scoring, queries[0], key, value, keys._replace(query_slots=queries[1]))

    _, blocks = jax.lax.scan(step, None, in_blocks(block, (query, keys.query_slots)))
    return jax.tree.map(lambda a: joined(a, query.shape[1]), blocks)


def _gradients(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys, given: _Given
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of the queries, the keys and the values; of the latter two in float32 where several blocks are summed."""

    def pull(query: jax.Array, slots: jax.Array, given: _Given) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _block_gradients(scoring, query, key, value, keys._replace(query_slots=slots), given)

    if block >= query.shape[1]:
        return pull(query, keys.query_slots, given)

    def step(carry: Any, queries: Any) -> Any:
        of_query, *of_rest = pull(*queries)
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, tuple(of_rest)), of_query

    # Summed over the blocks in float32, whatever the precision of keys and values.
    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (key, value))
    queries = in_blocks(block, (query, keys.query_slots, given))
    (of_key, of_value), of_query = jax.lax.scan(step, zeros, queries)
    return joined(of_query, query.shape[1]), of_key, of_value


# Products are spelled out in the order in which a cache lies, heads first. Given an einsum for the one query of
# decoding, XLA for the CPU puts keys and values first and turns all of them round, for every token anew.
_EACH_HEAD = ((0, 1), (0, 1))


def _block(scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys) -> tuple[jax.Array, _Sums]:
    """Some of the queries [B, Q, K, G, N], all scores at once."""
    (query,), (key, value) = _heads_first(query), _keys_heads_first(key, value)
    scores = _scored(scoring, keys, _products(query, key))
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - highest)
    share = 1 / jnp.sum(exponentials, axis=-1, keepdims=True)
    weights = (exponentials * share).astype(value.dtype)
    out = native.dot_summed_wide(weights, value, (((4,), (2,)), _EACH_HEAD))
    return jnp.moveaxis(out, 3, 1), _Sums(*(jnp.moveaxis(a[..., 0], 3, 1) for a in (highest, share)))


def _block_gradients(
    scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys, given: _Given
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of `_block`'s queries, keys and values. Of a softmax's gradient the part that sums over all keys is the
    product of what came out and its gradient, so nothing is summed over the scores."""
    (query, of_out, out), (key, value) = _heads_first(query, given.of_out, given.out), _keys_heads_first(key, value)
    scores, pull = jax.vjp(partial(_scored, scoring, keys), _products(query, key))
    highest, share = (a[..., None] for a in _heads_first(*given.sums))
    # Of the queries that fill up the last block nothing is known: no score of theirs may exceed the highest.
    weights = jnp.exp(jnp.minimum(scores - highest, 0)) * share
    of_weights = jnp.einsum("bkgqn,bktn->bkgqt", of_out, value, preferred_element_type=jnp.float32)
    shared = jnp.sum(out.astype(jnp.float32) * of_out.astype(jnp.float32), axis=-1, keepdims=True)
    (of_products,) = pull(weights * (of_weights - shared))
    of_products, weights = of_products.astype(query.dtype), weights.astype(value.dtype)
    of_query = jnp.einsum("bkgqt,bktn->bkgqn", of_products, key)
    # Written so that where a CPU has to turn an operand it is not the scores.
    of_key = jnp.einsum("bkgqn,bkgqt->bknt", query, of_products)
    of_value = jnp.einsum("bkgqn,bkgqt->bknt", of_out, weights)
    return jnp.moveaxis(of_query, 3, 1), jnp.moveaxis(of_key, 3, 1), jnp.moveaxis(of_value, 3, 1)


def _heads_first(*queries: jax.Array) -> list[jax.Array]:
    """Each [B, Q, K, G, ...] as [B, K, G, Q, ...]. Otherwise a CPU would turn the scores, which are far larger."""
    return [jnp.moveaxis(a, 1, 3) for a in queries]


def _keys_heads_first(*keys: jax.Array) -> list[jax.Array]:
    """Each [B, T, K, N] as [B, K, T, N]."""
    return [jnp.moveaxis(a, 1, 2) for a in keys]


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, K, G, Q, T], float32"""
    return jax.lax.dot_general(query, key, (((4,), (3,)), _EACH_HEAD), preferred_element_type=jnp.float32)


def _scored(scoring: Scoring, keys: Keys, products: jax.Array) -> jax.Array:
    """The scores that the products of queries and keys give."""
    scores = products * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores = scores + scoring.scale * alibi(scoring.slopes, keys.positions)
    return jnp.where(_visible(scoring, keys, products.shape[-1]), scores, MASKED)


def _visible(scoring: Scoring, keys: Keys, count: int) -> jax.Array:
    """[B, 1, 1, Q, T], or 1 for B: which keys each query may attend to."""
    distance = keys.query_slots[:, None] - (jnp.arange(count) if keys.slots is None else keys.slots)
    visible = distance >= 0
    if scoring.window is not None:
        visible &= distance < scoring.window
    visible = visible[None] if keys.valid is None else visible & keys.valid[:, None]
    if keys.segments is not None:
        visible &= keys.segments[:, keys.query_slots, None] == keys.segments[:, None]
    return visible[:, None, None]


def alibi(slopes: Any, positions: jax.Array) -> jax.Array:
    """[B, K, G, 1, T]: each head's slope [K, G] times the key's position, rounded to bfloat16 as Falcon was trained."""
    bias = jnp.asarray(slopes, jnp.bfloat16)[..., None] * positions.astype(jnp.bfloat16)[:, None, None]
    return bias[:, :, :, None].astype(jnp.float32)


def in_blocks(block: int, arrays: Arrays) -> Arrays:
    """Each [B, S, ...] or [S] as [blocks, B, Q, ...] or [blocks, Q]; what is missing in the last block is zeros."""

    def split(a: jax.Array) -> jax.Array:
        axis = min(1, a.ndim - 1)
        a = jnp.pad(a, [(0, -a.shape[axis] % block if i == axis else 0) for i in range(a.ndim)])
        shape = (*a.shape[:axis], -1, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    return jax.tree.map(split, arrays)


def joined(blocks: jax.Array, queries: int) -> jax.Array:
    """[blocks, B, Q, ...] as [B, S, ...]"""
    a = jnp.moveaxis(blocks, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :queries]
