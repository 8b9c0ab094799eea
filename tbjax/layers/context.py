"""Context parallelism: attention over a sequence that the mesh axis `cp` cuts.

A causal sequence cut into equal runs would give the last device all the work: its queries see everything. So it is cut
into twice as many chunks as there are devices, and device i holds chunks i and 2n - 1 - i, one from the front and one
from the back (zig-zag, as in the context parallelism of Llama 3, arXiv 2407.21783). That order is the *ring order*.
Tokens and all that goes with them are laid in it once, before the embedding; nothing but attention knows of it, and the
loss does not care.

    ring     queries stay, keys and values travel around the devices (Ring Attention, arXiv 2310.01889). Each device
             holds its own part of them and the one that is passing. While it computes with this, the next arrives.
    gather   keys and values of a layer are gathered on every device first: fewer and larger transfers, and memory for
             the whole sequence's, which is small where key-value heads are few.

In the ring order each visit of another device's keys is the same amount of work for everyone: half of what there is.
From a device further in front, only its front chunk is seen, by both of our chunks; from one further back, both of its
chunks, by our back chunk. So no device waits for another, and the program has no branches. Under a sliding window, the
ring visits only those whose keys some query can see.

Backwards the same way is gone again, and the gradients of keys and values travel with them: each device adds its part,
and in the end they are home.

B batch, S sequence, C tokens of a chunk, K key-value heads, G queries per key-value head, N head dimension.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tbjax.config import ModelConfig
from tbjax.layers.blocks import ATTENDED, Scoring, block_queries
from tbjax.layers.pairs import Chunk, Known, Pairs, Queries, Running
from tbjax.layers.rope import depends_on_length, within
from tbjax.sharding import ContextMethod, Sharding

AXIS = "cp"

Tree = TypeVar("Tree")


class CutKeys(NamedTuple):
    """What a query may look at where cp cuts the sequence, in ring order: see `tbjax.layers.blocks.Keys`."""

    valid: jax.Array | None  # [B, S] bool: a real token stands there; None: everywhere
    positions: jax.Array  # [B, S]
    segments: jax.Array | None  # [B, S]; None: one document


# The order.


def cuts(sharding: Sharding, sequence: int) -> bool:
    """Whether a sequence of this length is cut over cp: two equal chunks for every device."""
    devices = sharding.size(AXIS)
    return devices > 1 and sequence % (2 * devices) == 0


def check(sharding: Sharding, sequence: int) -> None:
    """Raise ValueError where there is a cp that the sequence does not divide over."""
    devices = sharding.size(AXIS)
    if sequence % (2 * devices if devices > 1 else 1):
        raise ValueError(
            f"a sequence of {sequence} tokens does not divide over cp={devices}: each device takes two chunks of equal "
            f"length, so the length must be a multiple of {2 * devices}; pad the rows to "
            f"{-(-sequence // (2 * devices)) * 2 * devices}."
        )


def ring_order(sequence: int, devices: int) -> np.ndarray:
    """Which token stands at each place [S] of the ring order."""
    chunks = np.arange(sequence).reshape(2 * devices, -1)
    return np.concatenate([np.concatenate((chunks[i], chunks[-1 - i])) for i in range(devices)])


def to_ring_order(array: Any, sharding: Sharding) -> jax.Array:
    """Integers or truths [B, S], in ring order and cut over cp; as they are where cp cuts nothing."""
    array = jnp.asarray(array)
    if not cuts(sharding, array.shape[1]):
        return array
    # They are few, and so known to every device first: then each picks its own.
    whole = sharding.constrain(array, "batch", None)
    return sharding.constrain(whole[:, ring_order(array.shape[1], sharding.size(AXIS))], "batch", "sequence")


def arranged(batch: Any, sharding: Sharding) -> Any:
    """A batch, a named tuple of integers [B, S] with `tokens`, `positions` and `segments` among them, in ring order.

    With documents it gets its positions here: from the ring order they could not be counted.
    """
    check(sharding, jnp.shape(batch.tokens)[1])
    if not cuts(sharding, jnp.shape(batch.tokens)[1]):
        return batch
    if batch.segments is not None and batch.positions is None:
        batch = batch._replace(positions=within(jnp.asarray(batch.segments)))
    return jax.tree.map(partial(to_ring_order, sharding=sharding), batch)


def check_arranged(config: ModelConfig, mask: Any, positions: Any, segments: Any) -> None:
    """Raise where a model asks of an arranged batch what only the natural order tells."""
    if segments is not None and positions is None:
        raise ValueError("segments in ring order must come with positions, as `context.arranged` gives them.")
    if segments is not None and any(map(depends_on_length, (config.rope, config.window_rope))):
        raise NotImplementedError(
            "packed documents (segments) whose rope depends on their length go through no pipeline with cp > 1: use "
            "pp=1 or cp=1, or rows of one document each."
        )
    if mask is not None and config.alibi:
        raise NotImplementedError(
            "an attention mask with ALiBi goes through no pipeline with cp > 1: use pp=1 or cp=1, or leave the mask "
            "out where padding stands on the right and has no targets."
        )


def to_natural_order(states: jax.Array, sharding: Sharding) -> jax.Array:
    """States [B, S, ...] back from ring order, in two transfers: of every device's even chunk, and of its odd one."""
    if not cuts(sharding, states.shape[1]):
        return states
    n = sharding.size(AXIS)
    spec = sharding.activation(("batch", "sequence", *[None] * (states.ndim - 2)), states.shape)

    def turn(states: jax.Array) -> jax.Array:
        halves = _halves(states)
        odd_first = jax.lax.axis_index(AXIS) % 2  # chunk i is odd where i is, and 2n - 1 - i is of the other kind
        found = []
        for parity in (0, 1):
            mine = jax.lax.dynamic_index_in_dim(halves, odd_first ^ parity, keepdims=False)
            wanted = [2 * device + parity for device in range(n)]
            routes = [(min(chunk, 2 * n - 1 - chunk), device) for device, chunk in enumerate(wanted)]
            found.append(jax.lax.ppermute(mine, AXIS, routes))
        return jnp.concatenate(found, axis=1)

    return sharding.per_device(turn, (spec,), spec)(states)


# The attention.


def method_of(sharding: Sharding) -> ContextMethod:
    """How keys get to queries on this mesh: as asked, or else by the ring, and in a pipeline gathered.

    A transfer between neighbours names all pairs of devices that take part, whatever stage they are in, and stages of a
    pipeline do different things at a time; a gather names groups, each within a stage.
    """
    if sharding.context is not None:
        return sharding.context
    return "ring" if sharding.size("pp") == 1 else "gather"


def attend_over_context(
    query: jax.Array, key: jax.Array, value: jax.Array, keys: CutKeys, scoring: Scoring, sharding: Sharding
) -> jax.Array:
    """As `tbjax.layers.attend.attend`, for a sequence in ring order: by `sharding.context`, ring or gather."""
    check(sharding, query.shape[1])
    return _attend(scoring, sharding, query, key, value, keys)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    scoring: Scoring, sharding: Sharding, query: jax.Array, key: jax.Array, value: jax.Array, keys: CutKeys
) -> jax.Array:
    return _forward(scoring, sharding, query, key, value, keys)[0]


def _forward(
    scoring: Scoring, sharding: Sharding, query: jax.Array, key: jax.Array, value: jax.Array, keys: CutKeys
) -> Any:
    of_queries, of_keys, of_tokens, of_numbers, of_slopes = _specs(sharding, query, key)

    def run(query: jax.Array, key: jax.Array, value: jax.Array, keys: CutKeys, slopes: Any) -> Any:
        device = _Device.make(sharding, scoring, query, keys, slopes)
        method = device.ring if method_of(sharding) == "ring" else device.gather
        out, logarithm = method(_held(key, value, keys)).finish()
        return _whole(out).astype(query.dtype), _whole(logarithm)

    keys = _needed(keys, scoring)
    mapped = sharding.per_device(
        run, (of_queries, of_keys, of_keys, of_tokens, of_slopes), out_specs=(of_queries, of_numbers)
    )
    found = mapped(query, key, value, keys, scoring.slopes and jnp.asarray(scoring.slopes))
    out, logarithm = checkpoint_name(found, ATTENDED)  # as in `tbjax.layers.blocks`
    return out, (query, key, value, keys, out, logarithm)


def _backward(scoring: Scoring, sharding: Sharding, kept: Any, of_out: jax.Array) -> Any:
    query, key, value, keys, out, logarithm = kept
    of_queries, of_keys, of_tokens, of_numbers, of_slopes = _specs(sharding, query, key)

    def run(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        keys: CutKeys,
        out: Any,
        logarithm: Any,
        of_out: Any,
        slopes: Any,
    ) -> Any:
        device = _Device.make(sharding, scoring, query, keys, slopes)
        along = jnp.sum(out.astype(jnp.float32) * of_out.astype(jnp.float32), axis=-1)
        known = Known(device.queries, *map(_halves, (of_out, logarithm, along)))
        method = device.ring_back if method_of(sharding) == "ring" else device.gather_back
        of_query, of_key, of_value = map(_whole, method(known, _held(key, value, keys)))
        return of_query.astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype)

    mapped = sharding.per_device(
        run,
        (of_queries, of_keys, of_keys, of_tokens, of_queries, of_numbers, of_queries, of_slopes),
        out_specs=(of_queries, of_keys, of_keys),
    )
    slopes = scoring.slopes and jnp.asarray(scoring.slopes)
    return *mapped(query, key, value, keys, out, logarithm, of_out, slopes), None


_attend.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Device:
    """One device's part: its two chunks of queries, and what it does with the keys of others."""

    pairs: Pairs
    queries: Queries  # with the two chunks in front: [2, ...]
    index: jax.Array  # of this device on cp
    count: int  # of the devices on cp
    reach: int  # how many chunks back a query sees at most

    @classmethod
    def make(cls, sharding: Sharding, scoring: Scoring, query: jax.Array, keys: CutKeys, slopes: Any) -> "_Device":
        count, index, size = sharding.size(AXIS), jax.lax.axis_index(AXIS), query.shape[1] // 2
        block = block_queries(size, size, query.shape[0] * query.shape[2] * query.shape[3])
        slots = jnp.stack([_chunk(index, part, count) * size + jnp.arange(size) for part in (0, 1)])
        segments = None if keys.segments is None else _halves(keys.segments)
        reach = 2 * count - 1
        if scoring.window is not None:
            reach = min(reach, (scoring.window - 2) // size + 1)
        pairs = Pairs(scoring=scoring, slopes=slopes, block=block)
        return cls(pairs, Queries(_halves(query), slots, segments), index, count, reach)

    # The ring.

    def ring(self, own: Chunk) -> Running:
        """What the queries see, with keys that travel."""

        def visit(running: Running, held: Chunk, offset: Any, hop: int) -> Running:
            for part, half, first, causal in self._seen(offset):
                running = self._add(running, part, _at(held, half), first, causal=causal)
            return running

        return self._around(visit, visit(Running.start(self.queries.query), own, 0, 0), own)

    def ring_back(self, known: Known, own: Chunk) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of queries, keys and values: the latter travel with those that they are of."""

        def visit(carry: Any, held: Chunk, offset: Any, hop: int) -> Any:
            of_query, of_keys = carry[0], self._shift(carry[1:], hop)
            for part, half, first, causal in self._seen(offset):
                found = self.pairs.backward(_at(known, part), _at(held, half), first, causal=causal)
                of_query = _plus(of_query, part, found[0])
                of_keys = tuple(_plus(total, half, new) for total, new in zip(of_keys, found[1:], strict=True))
            return of_query, *of_keys

        zeros = [jnp.zeros(a.shape, jnp.float32) for a in (self.queries.query, own.key, own.value)]
        of_query, *of_keys = self._around(visit, visit(zeros, own, 0, 0), own)
        home = -self._visits()[-1] % self.count if self._visits() else 0
        return of_query, *self._shift(of_keys, home)

    def _around(self, visit: Callable[[Any, Chunk, Any, int], Any], carry: Any, own: Chunk) -> Any:
        """`visit(carry, keys, offset, hop)` for the keys of each device that has any to show.

        They belong to the device `offset` places in front, and came `hop` places since the last visit.
        """
        visits = self._visits()
        if not visits:
            return carry
        held = self._shift(own, visits[0])
        if len(visits) == self.count - 1:

            def turn(state: tuple[Any, Chunk], offset: jax.Array) -> tuple[tuple[Any, Chunk], None]:
                carry, held = state
                following = self._shift(held, 1)
                return (visit(carry, held, offset, 1), following), None

            (carry, held), _ = jax.lax.scan(turn, (carry, held), jnp.arange(1, self.count - 1))
            return visit(carry, held, visits[-1], 1)
        for before, offset, after in zip((0, *visits), visits, (*visits[1:], visits[-1]), strict=False):
            following = self._shift(held, after - offset)
            carry = visit(carry, held, offset, offset - before)
            held = following
        return carry

    def _visits(self) -> list[int]:
        """How far in front those are whose keys any device needs."""
        return [offset for offset in range(1, self.count) if any(self._needs(offset))]

    def _needs(self, offset: int) -> tuple[bool, bool]:
        """Whether any device sees, `offset` places in front: chunks on the same side as its own, and across."""
        across = min(2 * self.count - 1 - i - (i - offset) % self.count for i in range(self.count))
        return min(offset, self.count - offset) <= self.reach, across <= self.reach

    def _seen(self, offset: Any) -> list[tuple[Any, Any, Any, bool]]:
        """The pairs that there are with the keys of the device `offset` places in front.

        As (which of our chunks, which of its, the slot where its begins, whether they must be compared).
        """
        size = self.queries.slots.shape[1]
        first = lambda owner, half: _chunk(owner, half, self.count) * size  # noqa: E731
        if isinstance(offset, int) and not offset:
            pairs = [(0, 0, first(self.index, 0), True), (1, 1, first(self.index, 1), True)]
            return pairs + [(1, 0, first(self.index, 0), False)] * (self.reach > 0)
        same, across = self._needs(offset) if isinstance(offset, int) else (True, True)
        owner = (self.index - offset) % self.count
        side = (owner > self.index).astype(jnp.int32)  # further back: our back chunk sees its back chunk
        return [(side, side, first(owner, side), False)] * same + [(1, 0, first(owner, 0), False)] * across

    def _shift(self, travelling: Tree, hop: int) -> Tree:
        """What the device `hop` places in front has."""
        if not hop:
            return travelling
        routes = [(i, (i + hop) % self.count) for i in range(self.count)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, routes), travelling)

    # All keys gathered.

    def gather(self, own: Chunk) -> Running:
        """What the queries see, with all keys at hand."""
        chunks = self._gathered(own)

        def step(running: Running, turn: jax.Array) -> tuple[Running, None]:
            part, chunk, first = self._turn(turn)
            return self._add(running, part, _at(chunks, chunk), first, causal=True), None

        return jax.lax.scan(step, Running.start(self.queries.query), jnp.arange(self._turns()))[0]

    def gather_back(self, known: Known, own: Chunk) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of queries, keys and values; the latter summed over the devices."""
        chunks = self._gathered(own)

        def step(totals: Any, turn: jax.Array) -> Any:
            part, chunk, first = self._turn(turn)
            of_query, of_key, of_value = totals
            found = self.pairs.backward(_at(known, part), _at(chunks, chunk), first, causal=True)
            of_keys = _plus(of_key, chunk, found[1]), _plus(of_value, chunk, found[2])
            return (_plus(of_query, part, found[0]), *of_keys), None

        zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (self.queries.query, chunks.key, chunks.value))
        (of_query, of_key, of_value), _ = jax.lax.scan(step, zeros, jnp.arange(self._turns()))
        return of_query, self._scattered(of_key), self._scattered(of_value)

    def _turns(self) -> int:
        """The pairs of one device: as many for each, all that there are or all that the window lets see."""
        return min(2 * self.count + 1, 2 * (self.reach + 1))

    def _turn(self, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which of our chunks, which of all, and the slot where that begins."""
        size, end = self.queries.slots.shape[1], 2 * self.count * self.queries.slots.shape[1]
        if self._turns() == 2 * self.count + 1:
            # Our front chunk sees index + 1 chunks, our back chunk the others.
            part = (turn > self.index).astype(jnp.int32)
            chunk = turn - part * (self.index + 1)
            return part, chunk, chunk * size
        part = turn // (self.reach + 1)
        chunk = _chunk(self.index, part, self.count) - turn % (self.reach + 1)
        # Before the first there is nothing to see: taken as standing behind everything.
        return part, jnp.maximum(chunk, 0), jnp.where(chunk < 0, end, chunk * size)

    def _gathered(self, own: Chunk) -> Chunk:
        """All chunks in natural order: [2n, ...]."""

        def gather(a: jax.Array) -> jax.Array:
            a = jax.lax.all_gather(a, AXIS)
            return jnp.concatenate((a[:, 0], a[::-1, 1]))

        return jax.tree.map(gather, own)

    def _scattered(self, a: jax.Array) -> jax.Array:
        """The inverse, with what the devices have summed."""
        front, back = a[: self.count], a[: self.count - 1 : -1]
        return jax.lax.psum_scatter(jnp.stack((front, back), axis=1), AXIS, scatter_dimension=0)

    def _add(self, running: Running, part: Any, chunk: Chunk, first: Any, *, causal: bool) -> Running:
        new = self.pairs.forward(_at(running, part), _at(self.queries, part), chunk, first, causal=causal)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=part, axis=0)
        return jax.tree.map(lambda a, b: put(a, b), running, new)


def _specs(sharding: Sharding, query: jax.Array, key: jax.Array) -> Sequence[PartitionSpec]:
    """How queries, keys, tokens, numbers of queries, and slopes lie."""
    queries = sharding.activation(("batch", "sequence", "kv_heads", None, None), query.shape)
    keys = sharding.activation(("batch", "sequence", "kv_heads", None), key.shape)
    return queries, keys, PartitionSpec(*queries[:2]), PartitionSpec(*queries[:4]), PartitionSpec(queries[2], None)


def _needed(keys: CutKeys, scoring: Scoring) -> CutKeys:
    """Without what nothing asks for, as everything here travels."""
    return keys if scoring.slopes is not None else keys._replace(positions=None)


def _held(key: jax.Array, value: jax.Array, keys: CutKeys) -> Chunk:
    return jax.tree.map(_halves, Chunk(key, value, keys.positions, keys.valid, keys.segments))


def _chunk(device: Any, part: Any, count: int) -> Any:
    """Which chunk of the sequence is the front (0) or the back one (1) of a device."""
    return jnp.where(jnp.asarray(part) == 0, device, 2 * count - 1 - device)


def _halves(a: jax.Array) -> jax.Array:
    """A device's part [B, 2C, ...] as two chunks [2, B, C, ...]."""
    return jnp.moveaxis(a.reshape(a.shape[0], 2, -1, *a.shape[2:]), 1, 0)


def _whole(a: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])


def _at(tree: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def _plus(total: jax.Array, index: Any, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(total, _at(total, index) + new, index, 0)
