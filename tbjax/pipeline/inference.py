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

from tbjax.layers.cache import KVCache, heads_of
from tbjax.layers.ring import LayerCache, cache_dims, parts_of
from tbjax.model import Decoder, Surroundings
from tbjax.pipeline.execute import pipelined_hidden
from tbjax.pipeline.schedule import ForwardOnly
from tbjax.pipeline.stages import Stage, over_stages
from tbjax.room import in_stages, slots

# Of each position in the pattern the keys and the values, [L, G, B, K, T, N].
Caches = list[LayerCache]
_OWN = PartitionSpec("pp")  # how they lie over the stages


# By scores [B, V] and what is known of the rows: what is picked of each, its `token` among it, and the rows thereafter.
Pick = Callable[[jax.Array, Any], tuple[Any, Any]]


class Unanswered(NamedTuple):
    """A batch without targets, as the stages take it."""

    tokens: Any
    mask: Any
    positions: Any
    segments: Any


def runs_in_stages(model: Decoder) -> bool:
    """Whether a model is run by this file: it lies over stages, and its layers follow one pattern."""
    return in_stages(model.config, model.sharding.size("pp"))


def logits(model: Decoder, tokens: Any, mask: Any = None, positions: Any = None, segments: Any = None) -> jax.Array:
    """As a call of the model: [B, S, V]."""
    return model.logits(states(model, tokens, mask, positions, segments))


def states(model: Decoder, tokens: Any, mask: Any = None, positions: Any = None, segments: Any = None) -> jax.Array:
    """As `model.hidden`: [B, S, D]."""
    batch = Unanswered(*(None if a is None else jnp.asarray(a) for a in (tokens, mask, positions, segments)))
    if batch.tokens.ndim != 2:
        raise ValueError(f"tokens must be integers [batch, sequence], not {list(batch.tokens.shape)}.")
    rows = batch.tokens.shape[0]
    groups, of_one = deal(rows, model)
    whole = jax.tree.map(lambda a: _filled(a, groups * of_one), batch)
    hidden = pipelined_hidden(model, whole, microbatches=groups)
    return hidden.states[:rows]


def deal(rows: int, model: Decoder) -> tuple[int, int]:
    """How many groups the rows make, and of how many rows each."""
    ways = model.sharding.size("dp", "fsdp", "ep")
    of_one = -(-rows // model.sharding.size("pp"))
    of_one = -(-of_one // ways) * ways if rows >= ways else of_one
    return -(-rows // of_one), of_one


def prefill(
    model: Decoder, tokens: jax.Array, mask: jax.Array, capacity: int, pick: Pick, rows: Any
) -> tuple[Any, Any, KVCache]:
    """What is picked of each row's scores after its prompt [B, S], the rows thereafter, and the cache of the prompts.

    `rows` is what `pick` has to know of them, in arrays over the batch.
    """
    batch, capacity = tokens.shape[0], slots(None, capacity, capacity, parts_of(model.config, model.sharding))
    shape = deal(batch, model)
    tokens, mask, rows = jax.tree.map(lambda a: _grouped(jnp.asarray(a), shape), (tokens, mask, rows))

    def work(stage: "_Stage", tokens: jax.Array, mask: jax.Array, rows: Any) -> tuple[Any, Caches]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        nothing = jnp.zeros((shape[1], capacity), bool)

        def tick(number: jax.Array, carry: Any) -> Any:
            x, caches, picked = carry
            group = jnp.clip(number - stage.index, 0, shape[0] - 1)
            mine = group == number - stage.index
            empty = KVCache([], nothing, jnp.int32(0))
            around = stage.model.surroundings(tokens[group], mask[group], positions[group], empty)
            x = jnp.where(stage.is_first, stage.begin(tokens[group]), x)
            x, caches = stage.run(x, around, caches, group, mine)
            found = pick(stage.scores(x[:, -1:]), _of(rows, group))
            return stage.hand_on(x), caches, _put(picked, found, group, mine & stage.is_last)

        one = jax.eval_shape(lambda: pick(stage.scores(stage.nothing((shape[1], 1))), _of(rows, 0)))
        picked = jax.tree.map(lambda a: jnp.zeros((shape[0], *a.shape), a.dtype), one)
        carry = stage.nothing(tokens.shape[1:]), stage.caches(shape, capacity), picked
        _, caches, picked = jax.lax.fori_loop(0, shape[0] + stage.cut.stages - 1, tick, carry)
        return stage.from_last(picked), caches

    given = tokens, mask, rows
    picked, caches = _serve(work, model, given, (PartitionSpec(),) * len(given))
    valid = jnp.zeros((*shape, capacity), bool).at[..., : tokens.shape[-1]].set(mask.astype(bool))
    cache = KVCache([caches], valid, jnp.int32(tokens.shape[-1]))
    return *jax.tree.map(lambda a: _together(a, batch), picked), cache


def decode(model: Decoder, state: Any, written: Any, pick: Pick, eos: jax.Array, count: jax.Array) -> tuple[Any, Any]:
    """`written`, arrays [B, room] of what is picked, with the next `count` tokens of each row, or fewer if every row
    has met one of `eos` before; and the state (`tbjax.generate.programs.State`) thereafter."""
    batch, cache = state.token.shape[0], state.cache
    shape = cache.valid.shape[0], cache.valid.shape[1]
    # All but the first group are still on their way when the first has come round.
    turns = jnp.asarray(count) + (shape[0] > 1)

    def work(stage: "_Stage", given: tuple[Any, ...], caches: Caches) -> tuple[Any, Caches]:
        first, done, rows, written, valid, length, eos, count, turns = given
        numbers = jnp.arange(valid.shape[-1])

        def tick(number: jax.Array, carry: Any) -> Any:
            x, caches, written, kept = carry
            group = (number - stage.index) % stage.cut.stages
            step = (number - stage.index - group) // stage.cut.stages
            mine = (group < shape[0]) & (step >= 0) & (step < count)
            group, step = jnp.minimum(group, shape[0] - 1), jnp.clip(step, 0, jnp.maximum(count - 1, 0))
            known = valid[group] | ((numbers >= length) & (numbers < length + step))
            position = jnp.sum(known, axis=1, keepdims=True)
            begun = first[group][:, None]  # what the state ends with; of later ones only the states come by
            around = stage.model.surroundings(begun, None, position, KVCache([], known, length + step))
            x = jnp.where(stage.is_first & (step == 0), stage.begin(begun), x)
            x, caches = stage.run(x, around, caches, group, mine)
            _, done, rows = kept
            picked, after = pick(stage.scores(x), _of(rows, group))
            x = jnp.where(stage.is_last, stage.begin(picked.token[:, None]), x)
            mine &= stage.is_last
            ended = done[group] | jnp.isin(picked.token, eos)
            kept = _put(kept, (picked.token, ended, after), group, mine)

            def noted(all_: jax.Array, new: jax.Array) -> jax.Array:
                return all_.at[group, :, step].set(jnp.where(mine, new, all_[group, :, step]))

            return stage.hand_on(x), caches, jax.tree.map(noted, written, picked), kept

        def circle(state: Any) -> Any:
            """Once round all stages: about one token of every row."""
            number, _, carry = state
            ticks = number * stage.cut.stages
            carry = jax.lax.fori_loop(ticks, ticks + stage.cut.stages, tick, carry)
            return number + 1, unfinished(carry[-1][1]), carry

        def unfinished(done: jax.Array) -> jax.Array:
            # All stages stop in the same tick, so they must know alike what only the last one sees.
            return jax.lax.psum(jnp.int32(stage.is_last & ~jnp.all(done)), "pp") > 0

        carry = stage.nothing((shape[1], 1)), caches, written, (first, done, rows)
        state = jnp.int32(0), unfinished(done) & (count > 0), carry
        _, _, (_, caches, *found) = jax.lax.while_loop(lambda state: (state[0] < turns) & state[1], circle, state)
        return stage.from_last(tuple(found)), caches

    grouped = jax.tree.map(lambda a: _grouped(a, shape), (state.token, state.done, state.rows, written))
    given = *grouped, cache.valid, cache.length, eos, jnp.asarray(count), turns
    found, caches = _serve(work, model, (given, cache.layers[0]), (PartitionSpec(), _OWN))
    written, (token, done, rows) = jax.tree.map(lambda a: _together(a, batch), found)
    numbers = jnp.arange(cache.valid.shape[-1])
    valid = cache.valid | ((numbers >= cache.length) & (numbers < cache.length + count))
    cache = KVCache([caches], valid, cache.length + count)
    return written, state._replace(cache=cache, token=token, done=done, rows=rows)


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
        config = self.model.config
        heads = heads_of(config, self.model.sharding)
        empty = jnp.zeros((self.cut.rows, *shape, heads, capacity, config.head_dim), self.model.dtype)
        empty = _kept(self.model, empty)
        return [LayerCache(empty, empty) for _ in config.groups[0].pattern]

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

    def scores(self, x: jax.Array) -> jax.Array:
        """Of what may follow what the last layer gave [B, 1, D]: [B, V]."""
        return self.model.logits(self.model.final_norm(x))[:, 0]

    def from_last(self, tree: Any) -> Any:
        """What the last stage has, known to all."""

        def known(a: jax.Array) -> jax.Array:
            wide = a.astype(jnp.int32) if a.dtype == bool else a
            return jax.lax.psum(jnp.where(self.is_last, wide, 0), "pp").astype(a.dtype)

        return jax.tree.map(known, tree)


def _of(tree: Any, group: Any) -> Any:
    """One group's part of arrays over groups."""
    return jax.tree.map(lambda a: a[group], tree)


def _put(tree: Any, new: Any, group: jax.Array, counts: jax.Array) -> Any:
    """Arrays over groups with what is `new` of one of them, if it `counts`."""
    return jax.tree.map(lambda a, b: a.at[group].set(jnp.where(counts, b, a[group])), tree, new)


def _serve(
    work: Callable[..., tuple[Any, Caches]], model: Decoder, given: tuple[Any, ...], in_specs: tuple[Any, ...]
) -> tuple[Any, Caches]:
    """`work(stage, *given)` on every stage: what it returns first is the same on all, the caches are each one's own."""
    out_specs = PartitionSpec(), _OWN
    return over_stages(work, model, ForwardOnly(), given, in_specs=in_specs, out_specs=out_specs, kind=_Stage)


def _kept(model: Decoder, cache: jax.Array) -> jax.Array:
    """A cache in one order in memory, see `Decoder`."""
    return model.sharding.in_order(cache, None, None, *cache_dims(model.config, model.sharding))


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
