"""A model that is cut into stages, run without training: logits, and text with keys and values kept on their stages.

The rows of a batch are dealt out to groups, as many as there are stages where there are rows enough. In each tick every
stage works on a group of its own and hands it on, so that all are busy at once. Reading a prompt, a group passes down
the stages once. Writing, groups go round: the last stage chooses the next token of each row and sends what the first
begins it with on to the first, which by then is done with all other groups. A stage keeps the keys and values of its
own layers, of all groups; nothing else travels than the residual stream of one group, between neighbours.

With fewer rows than stages some stages have nothing to do: one row is written as fast as one device would write it, and
it is for its memory that a pipeline is there. A stage that has nothing to do computes all the same, and what comes out
is dropped. A tick lasts as long as its longest task, so that costs no time, and it lets all devices run the very same
operations: however the compiler cuts those within a stage, no device waits for one that does something else.

G groups, B rows of one, S tokens of a prompt, T capacity of the cache, K key-value heads, N head dimension, L rows of a
stage's part of the stack.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.layers.attention import HeadLayout
from tbjax.layers.cache import KVCache
from tbjax.model import Decoder, Surroundings
from tbjax.pipeline.execute import pipelined_hidden
from tbjax.pipeline.schedule import ForwardOnly
from tbjax.pipeline.stages import Stage, over_stages

# Of each position in the pattern the keys and the values, [L, G, B, T, K, N].
Caches = list[tuple[jax.Array, jax.Array]]
_OWN = PartitionSpec("pp")  # how they lie over the stages


class Unanswered(NamedTuple):
    """A batch without targets, as the stages take it."""

    tokens: Any
    mask: Any
    positions: Any
    segments: Any


def runs_in_stages(model: Decoder) -> bool:
    """Whether a model is run by this file: it lies over stages, and its layers follow one pattern."""
    return model.sharding.size("pp") > 1 and len(model.config.groups) == 1


def logits(model: Decoder, tokens: Any, mask: Any = None, positions: Any = None, segments: Any = None) -> jax.Array:
    """As a call of the model: [B, S, V]."""
    batch = Unanswered(*(None if a is None else jnp.asarray(a) for a in (tokens, mask, positions, segments)))
    if batch.tokens.ndim != 2:
        raise ValueError(f"tokens must be integers [batch, sequence], not {list(batch.tokens.shape)}.")
    rows = batch.tokens.shape[0]
    groups, of_one = deal(rows, model)
    whole = jax.tree.map(lambda a: _filled(a, groups * of_one), batch)
    hidden = pipelined_hidden(model, whole, microbatches=groups)
    return model.logits(hidden.states[:rows])


def deal(rows: int, model: Decoder) -> tuple[int, int]:
    """How many groups the rows make, and of how many rows each."""
    ways = model.sharding.size("dp", "fsdp", "ep")
    of_one = -(-rows // model.sharding.size("pp"))
    of_one = -(-of_one // ways) * ways if rows >= ways else of_one
    return -(-rows // of_one), of_one


def prefill(model: Decoder, tokens: jax.Array, mask: jax.Array, capacity: int) -> tuple[jax.Array, KVCache]:
    """The likeliest token [B, 1] after each prompt [B, S], and the cache that holds the prompts."""
    rows = tokens.shape[0]
    shape = deal(rows, model)
    tokens, mask = (_grouped(jnp.asarray(a), shape) for a in (tokens, mask))

    def work(stage: "_Stage", tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Caches]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        nothing = jnp.zeros((shape[1], capacity), bool)

        def tick(number: jax.Array, carry: Any) -> Any:
            x, caches, first = carry
            group = jnp.clip(number - stage.index, 0, shape[0] - 1)
            mine = group == number - stage.index
            empty = KVCache([], nothing, jnp.int32(0))
            around = stage.model.surroundings(tokens[group], mask[group], positions[group], empty)
            x = jnp.where(stage.is_first, stage.begin(tokens[group]), x)
            x, caches = stage.run(x, around, caches, group, mine)
            chosen = jnp.where(mine & stage.is_last, stage.best(x[:, -1:])[:, 0], first[group])
            return stage.hand_on(x), caches, first.at[group].set(chosen)

        carry = stage.nothing(tokens.shape[1:]), stage.caches(shape, capacity), jnp.zeros(shape, jnp.int32)
        _, caches, first = jax.lax.fori_loop(0, shape[0] + stage.cut.stages - 1, tick, carry)
        return jax.lax.psum(first, "pp"), caches

    first, caches = _serve(work, model, (tokens, mask), (PartitionSpec(), PartitionSpec()))
    valid = jnp.zeros((*shape, capacity), bool).at[..., : tokens.shape[-1]].set(mask.astype(bool))
    return _together(first, rows)[:, None], KVCache([caches], valid, jnp.int32(tokens.shape[-1]))


def decode(
    model: Decoder, first: jax.Array, cache: KVCache, eos: jax.Array, limit: jax.Array, room: int
) -> tuple[jax.Array, KVCache]:
    """[B, room]: `first`, then what follows, until every row has met one of `eos` or `limit` tokens are written."""
    rows = first.shape[0]
    shape = cache.valid.shape[0], cache.valid.shape[1]
    # All but the first group are still on their way when the first has come round.
    turns = jnp.asarray(limit) - 1 + (shape[0] > 1)

    def work(stage: "_Stage", given: tuple[Any, ...], caches: Caches) -> tuple[jax.Array, Caches]:
        first, valid, length, eos, limit, turns = given
        slots = jnp.arange(valid.shape[-1])

        def tick(number: jax.Array, carry: Any) -> Any:
            x, caches, out, done = carry
            group = (number - stage.index) % stage.cut.stages
            step = (number - stage.index - group) // stage.cut.stages
            mine = (group < shape[0]) & (step >= 0) & (step < limit - 1)
            group, step = jnp.minimum(group, shape[0] - 1), jnp.clip(step, 0, room - 2)
            known = valid[group] | ((slots >= length) & (slots < length + step))
            position = jnp.sum(known, axis=1, keepdims=True)
            token = out[group, :, :1]  # what the prompt led to; of later ones only the states come by
            around = stage.model.surroundings(token, None, position, KVCache([], known, length + step))
            x = jnp.where(stage.is_first & (step == 0), stage.begin(token), x)
            x, caches = stage.run(x, around, caches, group, mine)
            token = stage.best(x)
            x = jnp.where(stage.is_last, stage.begin(token), x)
            mine &= stage.is_last
            out = out.at[group, :, step + 1].set(jnp.where(mine, token[:, 0], out[group, :, step + 1]))
            done = done.at[group].set(done[group] | (mine & jnp.isin(token[:, 0], eos)))
            return stage.hand_on(x), caches, out, done

        def circle(state: Any) -> Any:
            """Once round all stages: about one token of every row."""
            number, _, carry = state
            ticks = number * stage.cut.stages
            carry = jax.lax.fori_loop(ticks, ticks + stage.cut.stages, tick, carry)
            return number + 1, unfinished(carry[-1]), carry

        def unfinished(done: jax.Array) -> jax.Array:
            # All stages stop in the same tick, so they must know alike what only the last one sees.
            return jax.lax.psum(jnp.int32(stage.is_last & ~jnp.all(done)), "pp") > 0

        out = jnp.zeros((*shape, room), jnp.int32).at[..., 0].set(first)
        done = jnp.isin(first, eos)
        carry = stage.nothing((shape[1], 1)), caches, out, done
        state = jnp.int32(0), unfinished(done) & (limit > 1), carry
        _, _, (_, caches, out, _) = jax.lax.while_loop(lambda state: (state[0] < turns) & state[1], circle, state)
        return jax.lax.psum(jnp.where(stage.is_last, out, 0), "pp"), caches

    given = _grouped(first, shape)[..., 0], cache.valid, cache.length, eos, jnp.asarray(limit), turns
    out, caches = _serve(work, model, (given, cache.layers[0]), (PartitionSpec(), _OWN))
    return _together(out, rows), KVCache([caches], cache.valid, cache.length)


class _Stage(Stage):
    """A stage that serves."""

    @property
    def is_first(self) -> jax.Array:
        return self.index == 0

    @property
    def is_last(self) -> jax.Array:
        return self.index == self.cut.stages - 1

    def begin(self, tokens: jax.Array) -> jax.Array:
        """What the first layer gets."""
        return self.model.sharding.residual(self.model.start(tokens))

    def nothing(self, shape: tuple[int, ...]) -> jax.Array:
        """Room for a group's residual stream [B, S, D]."""
        x = jnp.zeros((*shape, self.model.config.embed), self.model.dtype)
        return self.model.sharding.residual(x)

    def caches(self, shape: tuple[int, ...], capacity: int) -> Caches:
        """Empty caches for the stage's layers, of groups [G, B]."""
        config, tp = self.model.config, self.model.sharding.size("tp")
        heads = HeadLayout.fit(config.heads, config.kv_heads, tp).total
        empty = jnp.zeros((self.cut.rows, *shape, capacity, heads, config.head_dim), self.model.dtype)
        empty = _kept(self.model, empty)
        return [(empty, empty) for _ in config.groups[0].pattern]

    def run(
        self, x: jax.Array, around: Surroundings, caches: Caches, group: jax.Array, mine: jax.Array
    ) -> tuple[jax.Array, Caches]:
        """All of the stage's layers for one group; caches keep what comes out if it is `mine`."""

        def layer(row: jax.Array, carry: tuple[jax.Array, Caches]) -> tuple[jax.Array, Caches]:
            x, caches = carry
            old = jax.tree.map(lambda a: a[row, group], caches)
            out, new, _ = self.model.repeat(0, self.row(row), x, around, old)
            if not self.cut.even:  # a stage that has fewer layers lets the group pass through the others
                out = jnp.where(row < self.spans[0, 1], out, x)
            new = jax.tree.map(lambda a, b: jnp.where(mine, b, a), old, list(new))
            return out, jax.tree.map(lambda a, b: _kept(self.model, a.at[row, group].set(b)), caches, new)

        return jax.lax.fori_loop(0, self.rows, layer, (x, caches))

    def hand_on(self, x: jax.Array) -> jax.Array:
        """What the stage before has made; the last is before the first."""
        stages = self.cut.stages
        pairs = [(stage, (stage + 1) % stages) for stage in range(stages)]
        return jax.lax.ppermute(self.model.sharding.residual(x), "pp", pairs)

    def best(self, x: jax.Array) -> jax.Array:
        """The likeliest token [B, S] after what the last layer gave [B, S, D], known to all of the stage's devices."""
        chosen = jnp.argmax(self.model.logits(self.model.final_norm(x)), axis=-1)
        return self.model.sharding.constrain(chosen.astype(jnp.int32), None, None)


def _serve(
    work: Callable[..., tuple[jax.Array, Caches]], model: Decoder, given: tuple[Any, ...], in_specs: tuple[Any, ...]
) -> tuple[jax.Array, Caches]:
    """`work(stage, *given)` on every stage: what it returns first is the same on all, the caches are each one's own."""
    out_specs = PartitionSpec(), _OWN
    return over_stages(work, model, ForwardOnly(), given, in_specs=in_specs, out_specs=out_specs, kind=_Stage)


def _kept(model: Decoder, cache: jax.Array) -> jax.Array:
    """A cache in one order in memory, see `Decoder`."""
    return model.sharding.in_order(cache, None, None, "batch", None, "kv_heads", None)


def _grouped(array: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """[rows, ...] as [G, B, ...]. Row r goes to group r % G, so a device's rows of each are rows that it has."""
    groups, of_one = shape
    return _filled(array, groups * of_one).reshape(of_one, groups, *array.shape[1:]).swapaxes(0, 1)


def _together(array: jax.Array, rows: int) -> jax.Array:
    """And back, without the rows that were filled in."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])[:rows]


def _filled(array: jax.Array, rows: int) -> jax.Array:
    """So many rows: what is missing is the last one again, which asks for nothing that is not asked for anyway."""
    return jnp.pad(array, [(0, rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1), mode="edge")
