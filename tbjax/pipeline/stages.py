"""A decoder cut into pieces, and what the stage that holds some of them does with one microbatch going forward.

The decoder's layers are stacked, and the mesh axis `pp` cuts the stack: a stage holds its layers as its part of the
same arrays that an unpipelined decoder has, in the rows that a `Cut` gives them. What stands before the layers (the
embedding) and after them (norm, head, loss) is whole on every stage; the first piece uses the one and the last the
other.

Between pieces goes a `Payload`: the residual stream, and the load of the experts so far, which the auxiliary loss needs
of all layers together. Its gradient comes back in the same form.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.config import ModelConfig
from tbjax.cut import Cut, cut
from tbjax.layers.moe import RouterLoad
from tbjax.model import Decoder, Hidden, Surroundings, auxiliary_loss
from tbjax.pipeline.exchange import Exchange, route, table
from tbjax.pipeline.grid import Cell
from tbjax.pipeline.schedule import Schedule, chosen
from tbjax.sharding import leaves


class Tokens(Protocol):
    """What a batch has at least: integers [B, S], each but the tokens or None, as `Decoder.hidden` takes them."""

    @property
    def tokens(self) -> Any: ...

    @property
    def mask(self) -> Any: ...

    @property
    def positions(self) -> Any: ...

    @property
    def segments(self) -> Any: ...


class Payload(NamedTuple):
    """What one piece of the model hands to the next, or its gradient."""

    x: jax.Array  # [B, S, D]
    load: RouterLoad | None  # of all experts so far; None without experts


class Weights(NamedTuple):
    """A decoder's arrays (or the gradients of them): the layers', stacked, and the ends'."""

    layers: list[jax.Array]
    ends: list[jax.Array]


def cut_for(
    config: ModelConfig, schedule: Schedule | str | None, stages: int, counts: Sequence[int] | None = None
) -> Cut | None:
    """The cut under which `schedule` finds every layer where it runs it: for the `Sharding` that a model is made with.

    `counts` says how many layers each piece of the model has, in the model's order; by default as equal as can be. None
    is the cut that a mesh has by itself: without stages, or where the layers follow no single pattern.
    """
    schedule = None if schedule is None else chosen(schedule)
    group, *others = config.groups
    if counts is not None:
        if stages == 1 or others:
            why = (
                "the mesh has no stages (pp=1)" if stages == 1 else "the layers of this model follow no single pattern"
            )
            raise ValueError(f"stage_layers={counts!r}: {why}, so there is nothing to share out.")
        counts = _repeats(config, counts, stages * (1 if schedule is None else schedule.chunks))
    return None if stages == 1 or others else cut(group.repeats, stages, schedule, counts=counts)


def _repeats(config: ModelConfig, counts: Sequence[int], pieces: int) -> list[int]:
    """Layers of each piece, as `stage_layers` gives them, in repeats of the model's pattern."""
    if isinstance(counts, str) or not isinstance(counts, Iterable) or not all(isinstance(n, Integral) for n in counts):
        raise TypeError(
            f"stage_layers={counts!r}: give the number of layers of each of the {pieces} pieces, as (4, 4)."
        )
    asked, width = f"stage_layers={[*map(int, counts)]}", len(config.groups[0].pattern)
    if len(counts) != pieces or sum(counts) != config.layers or min(counts) < 1:
        raise ValueError(
            f"{asked}: this model has {config.layers} layers, to be shared out to {pieces} pieces of one layer at "
            f"least (a piece for each stage and chunk); here are {len(counts)} that add up to {sum(counts)}."
        )
    if any(count % width for count in counts):
        raise ValueError(
            f"{asked}: this model repeats a pattern of {width} layers, which no piece may break, so each has a "
            f"multiple of {width}."
        )
    return [int(count) // width for count in counts]


def cuts(model: Decoder, schedule: Schedule) -> tuple[Cut, Cut]:
    """How the model's layers are stored, and how they are run by `schedule`: as they are stored, where that serves.

    Raises ValueError where they cannot be cut for it.
    """
    config, stages = model.config, model.sharding.size("pp")
    group, *others = config.groups
    if others:
        raise ValueError(
            f"pp={stages}: the {config.layers} layers of this model follow no single pattern, but "
            f"{len(config.groups)} one after the other, and a pipeline cuts one stack of repeats: use pp=1, with "
            "fsdp or tp in its place."
        )
    stored = model.sharding.stack(group.repeats)
    return stored, stored if stored.serves(schedule) else cut(group.repeats, stages, schedule)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The work of one stage, on its own part of the decoder (inside the `shard_map` over pp)."""

    model: Decoder
    cut: Cut
    spans: jax.Array  # [chunks, 2]: of each of the stage's own chunks the first row, and how many
    index: jax.Array  # which stage it is
    exchange: Exchange  # by which the layers have come
    dtype: Any

    @property
    def rows(self) -> int:
        """Repeats of the pattern in the longest piece."""
        return self.cut.longest

    @property
    def last(self) -> int:
        """The position of the last piece."""
        return len(self.cut.pieces) - 1

    def span(self, cell: Cell) -> tuple[Any, Any]:
        """The first row of the piece that the cell names, and how many it has: numbers known to the compiler, if all
        have as many."""
        if self.cut.even:
            return cell.chunk * self.rows, self.rows
        own = self.spans[cell.chunk]
        return own[0], own[1]

    def enter(self, tokens: jax.Array) -> Payload:
        """What the first piece begins with."""
        load = None
        if self.model.config.moe is not None:
            zeros = jnp.zeros(self.model.config.moe.experts, jnp.float32)
            load = RouterLoad(zeros, zeros, jnp.float32(0))
        return self.lay(Payload(self.model.start(tokens, self.dtype), load))

    def blank(self, part: Tokens) -> Payload:
        """A payload of zeros."""
        return self.lay(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(self.enter, part.tokens)))

    def lay(self, payload: Payload) -> Payload:
        """Tells the compiler how a payload is to lie within the stage."""
        return payload._replace(x=self.model.sharding.residual(payload.x))

    def around(self, part: Tokens) -> Surroundings:
        given = part.tokens, part.mask, part.positions
        return self.model.surroundings(*given, segments=part.segments, ring_order=True)

    def arrive(self, cell: Cell, part: Tokens, payload: Payload) -> Payload:
        """What the piece that the cell names begins with: tokens for the first, otherwise what has arrived."""
        return jax.lax.cond(
            cell.position == 0, lambda payload: self.enter(part.tokens), lambda payload: payload, payload
        )

    def forward(self, cell: Cell, part: Tokens, payload: Payload) -> Payload:
        """The piece that the cell names, from what the piece before handed out."""
        around, (first, count) = self.around(part), self.span(cell)

        def layer(row: jax.Array, payload: Payload) -> Payload:
            return self.layer(self.row(first + row), around, payload)

        return jax.lax.fori_loop(0, count, layer, self.arrive(cell, part, payload))

    def layer(self, blocks: Any, around: Surroundings, payload: Payload) -> Payload:
        """One repeat of the pattern."""
        x, _, loads = self.model.repeat(0, blocks, payload.x, around)
        return Payload(x, jax.tree.map(lambda *parts: sum(parts), payload.load, *loads) if loads else payload.load)

    def row(self, row: Any) -> list[Any]:
        """The weights of one repeat."""
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, row, keepdims=False), list(self.model.stacks[0]))


def over_stages(
    work: Callable[..., Any],
    model: Decoder,
    schedule: Schedule,
    given: tuple[Any, ...],
    *,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    dtype: Any = None,
    kind: type[Stage] = Stage,
) -> Any:
    """`work(stage, *given)` on every stage, with its layers where `schedule` runs them.

    `in_specs` and `out_specs` say how what is given and returned lies over the axis `pp`, as `shard_map` takes it;
    `kind` is what a stage is made as.
    """
    stored, run = cuts(model, schedule)
    way = route(stored, run)
    spans = [[run.local(stage, chunk) for chunk in range(run.chunks)] for stage in range(run.stages)]
    tables = jnp.asarray(spans), jnp.arange(run.stages), jnp.asarray(table(way, run.stages))

    def on_stage(tables: Any, model: Decoder, *given: Any) -> Any:
        spans, index, moves = tables
        exchange = Exchange(way, moves)
        weights = split(model)
        running = join(model, weights._replace(layers=exchange.there(weights.layers)))
        return work(kind(running, run, spans[0], index[0], exchange, dtype), *given)

    shard_map: Any = jax.shard_map
    return shard_map(
        on_stage,
        mesh=model.sharding.mesh,
        axis_names={"pp"},
        in_specs=(PartitionSpec("pp"), specs(model), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )(tables, model, *given)


def finish(model: Decoder, payload: Payload) -> Hidden:
    """What comes after the last piece, up to the head."""
    loads = [] if payload.load is None else [jax.tree.map(lambda a: a[None], payload.load)]
    return Hidden(model.final_norm(payload.x), None, auxiliary_loss(loads))


def split(model: Decoder) -> Weights:
    """The arrays of a decoder, sorted."""
    weights = Weights([], [])
    for path, array in zip(_paths(model), jax.tree.leaves(model), strict=True):
        (weights.ends if is_end(path) else weights.layers).append(array)
    return weights


def join(model: Decoder, weights: Weights) -> Decoder:
    """`model` with other arrays in the place of its own."""
    layers, ends = iter(weights.layers), iter(weights.ends)
    return jax.tree.unflatten(
        jax.tree.structure(model), [next(ends if is_end(path) else layers) for path in _paths(model)]
    )


def specs(model: Decoder) -> Any:
    """How the pipeline's axis cuts the model, as `shard_map` takes it."""
    return jax.tree.unflatten(
        jax.tree.structure(model),
        [PartitionSpec() if is_end(path) else PartitionSpec("pp") for path in _paths(model)],
    )


def is_end(path: str) -> bool:
    """Whether a parameter belongs to no layer."""
    return not path.startswith("stacks.")


def _paths(model: Decoder) -> list[str]:
    return [leaf.path for leaf in leaves(model)]
