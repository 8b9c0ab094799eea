"""Attention a pair of chunks at a time: one chunk of queries looks at one chunk of keys, in whatever order they come.

A softmax can be summed up in parts: for each query three running numbers suffice (the highest score so far, the sum of
exponentials and the sum of values, both relative to it), and a part that brings a higher score scales the sums down.
So attention over a sequence in chunks is a series of pairs, and who sees what is decided for each pair from where its
chunks begin. Backwards, the sum of exponentials is known, and every pair gives its gradients on its own.

Sums are float32, whatever the precision of keys and values. Of scores there is never more than a block of queries times
a chunk of keys. A query that sees no key at all (padding on the left) gets zeros.

B batch, C queries or keys in a chunk, Q queries of a block, T keys, K key-value heads, G queries per key-value head,
N head dimension.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbjax.layers.blocks import MASKED, Scoring, alibi, in_blocks, joined


class Queries(NamedTuple):
    """A chunk of queries."""

    query: jax.Array  # [B, C, K, G, N]
    slots: jax.Array  # [C] places in the sequence
    segments: jax.Array | None  # [B, C] documents; None: all one


class Chunk(NamedTuple):
    """A chunk of keys. It can be that of another device: then all of it has travelled but where it begins."""

    key: jax.Array  # [B, C, K, N]
    value: jax.Array
    positions: jax.Array | None  # [B, C] for ALiBi
    valid: jax.Array | None  # [B, C] bool: a real token stands there; None: everywhere
    segments: jax.Array | None


class Running(NamedTuple):
    """What has been summed for a chunk of queries, float32."""

    values: jax.Array  # [B, C, K, G, N]
    highest: jax.Array  # [B, C, K, G]
    total: jax.Array  # [B, C, K, G]

    @classmethod
    def start(cls, query: jax.Array) -> "Running":
        """Nothing, for queries [..., K, G, N]."""
        numbers = jnp.zeros(query.shape[:-1], jnp.float32)
        return cls(jnp.zeros(query.shape, jnp.float32), numbers + MASKED, numbers)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """The attention's output, and the logarithm of the sum of exponentials."""
        seen = jnp.where(self.total > 0, self.total, 1)
        return self.values / seen[..., None], self.highest + jnp.log(seen)


class Known(NamedTuple):
    """What the backward pass knows of a chunk of queries."""

    queries: Queries
    of_out: jax.Array  # [B, C, K, G, N] the gradient of the output
    logarithm: jax.Array  # [B, C, K, G] as `Running.finish` gives it
    along: jax.Array  # [B, C, K, G] the output times its gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """How pairs are scored: the same for all of them."""

    scoring: Scoring
    slopes: jax.Array | None  # [K, G] of this device's heads
    block: int  # queries that are scored at once

    def forward(self, running: Running, queries: Queries, chunk: Chunk, first: Any, *, causal: bool) -> Running:
        """`running`, with what the queries see of a chunk that begins at slot `first`.

        Where all of the chunk stands before all of the queries, it need not be compared (`causal=False`).
        """

        def step(running: Running, queries: Queries) -> Running:
            scores, _, seen = self._scores(queries, chunk, first, causal)
            scores = scores if seen is None else jnp.where(seen, scores, MASKED)
            before = _heads_first(running.highest)
            highest = jnp.maximum(before, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - highest[..., None])
            weights = weights if seen is None else jnp.where(seen, weights, 0)
            kept = _heads_last(jnp.exp(before - highest))
            found = _einsum("bkgqt,btkn->bqkgn", weights.astype(chunk.value.dtype), chunk.value)
            total = running.total * kept + _heads_last(jnp.sum(weights, axis=-1))
            return Running(running.values * kept[..., None] + found, _heads_last(highest), total)

        return self._by_blocks(step, running, queries)

    def backward(
        self, known: Known, chunk: Chunk, first: Any, *, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of the queries, the keys and the values that come of one pair, float32."""
        query_dtype, value_dtype = known.queries.query.dtype, chunk.value.dtype
        size = known.queries.query.shape[1]

        def step(carry: tuple[jax.Array, jax.Array], known: Known) -> Any:
            scores, slope, seen = self._scores(known.queries, chunk, first, causal)
            # No score is above the logarithm, but in the rows of zeros that fill up the last block.
            weights = jnp.exp(jnp.minimum(scores - _heads_first(known.logarithm)[..., None], 0))
            weights = weights if seen is None else jnp.where(seen, weights, 0)
            of_out = known.of_out.astype(value_dtype)
            of_value = _einsum("bkgqt,bqkgn->btkn", weights.astype(value_dtype), of_out)
            of_weights = _einsum("bqkgn,btkn->bkgqt", of_out, chunk.value)
            of_scores = weights * (of_weights - _heads_first(known.along)[..., None]) * self.scoring.scale
            of_scores = (of_scores if slope is None else of_scores * slope).astype(query_dtype)
            of_query = _einsum("bkgqt,btkn->bqkgn", of_scores, chunk.key)
            of_key = _einsum("bkgqt,bqkgn->btkn", of_scores, known.queries.query)
            return (carry[0] + of_key, carry[1] + of_value), of_query

        zeros = jnp.zeros(chunk.key.shape, jnp.float32), jnp.zeros(chunk.value.shape, jnp.float32)
        if self.block >= size:
            (of_key, of_value), of_query = step(zeros, known)
        else:
            (of_key, of_value), of_query = jax.lax.scan(step, zeros, in_blocks(self.block, known))
            of_query = joined(of_query, size)
        return of_query, of_key, of_value

    def _by_blocks(self, step: Any, running: Running, queries: Queries) -> Running:
        size = queries.query.shape[1]
        if self.block >= size:
            return step(running, queries)
        blocks = in_blocks(self.block, (running, queries))
        _, new = jax.lax.scan(lambda _, block: (None, step(*block)), None, blocks)
        return jax.tree.map(lambda a: joined(a, size), new)

    def _scores(
        self, queries: Queries, chunk: Chunk, first: Any, causal: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Scores [B, K, G, Q, T], their slope where they are capped, and which of them count (None: all)."""
        scores, slope = _einsum("bqkgn,btkn->bkgqt", queries.query, chunk.key) * self.scoring.scale, None
        if self.scoring.softcap is not None:
            bent = jnp.tanh(scores / self.scoring.softcap)
            scores, slope = self.scoring.softcap * bent, 1 - jnp.square(bent)
        if self.slopes is not None and chunk.positions is not None:
            scores = scores + self.scoring.scale * alibi(self.slopes, chunk.positions)
        conditions = []
        distance = queries.slots[:, None] - (first + jnp.arange(chunk.key.shape[1]))
        if causal:
            conditions.append(distance[None] >= 0)
        if self.scoring.window is not None:
            conditions.append(distance[None] < self.scoring.window)
        if chunk.valid is not None:
            conditions.append(chunk.valid[:, None])
        if queries.segments is not None and chunk.segments is not None:
            conditions.append(queries.segments[..., None] == chunk.segments[:, None])
        if not conditions:
            return scores, slope, None
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        return scores, slope, seen[:, None, None]


def _einsum(rule: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(rule, *operands, preferred_element_type=jnp.float32)


def _heads_first(numbers: jax.Array) -> jax.Array:
    """[B, Q, K, G] -> [B, K, G, Q], as scores have them."""
    return jnp.moveaxis(numbers, 1, 3)


def _heads_last(numbers: jax.Array) -> jax.Array:
    return jnp.moveaxis(numbers, 3, 1)
