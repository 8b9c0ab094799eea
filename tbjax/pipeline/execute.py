"""Runs a schedule: one program for all stages, on any mesh whose axis `pp` is larger than one.

The program is one `shard_map` over `pp` (the other axes stay the compiler's, so that a stage is computed with dp, fsdp,
ep and tp like any model) around one scan over the ticks of the schedule's grid. In each tick a stage looks up its task,
switches to it, and then what it made travels to its neighbours. Transfers stand outside of the switch: every stage
takes part in them in every tick, whatever it computes, and the table says who keeps what arrived.

Nothing is differentiated as a whole. Backwards are tasks like others, which begin from the saved input of their piece
and compute its forward pass again; so what is held at any moment is what the schedule holds, and not what reversing a
loop would. The forward task of the last piece has nothing to compute, since nobody but its own backward needs the
result.

M microbatches, B sequences of one, S sequence.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tbjax.model import Decoder, Hidden
from tbjax.pipeline.graph import NONE
from tbjax.pipeline.grid import IDLE, Cell, Grid, lay_out
from tbjax.pipeline.schedule import ForwardOnly, Kind, Schedule
from tbjax.pipeline.stages import Payload, Stage, Sums, Tokens, check_cut, finish, join, specs
from tbjax.remat import Remat

# As `Loss`, with the whole batch as its last argument: what a microbatch's part is measured by is counted there.
WholeLoss = Callable[[Decoder, Hidden, Any, Any], jax.Array]


# (state, cell, microbatch, activation, gradient) -> state, what is sent to a neighbour
Task = Callable[[Any, Cell, Any, Payload, Payload], tuple[Any, Payload]]


class _Training(NamedTuple):
    """What the tasks of training add to."""

    sums: Sums
    pairs: tuple[jax.Array, ...]  # [pair slots, rows of a piece, ...]
    loss: jax.Array


def pipelined_gradients(
    model: Decoder,
    batch: Tokens,
    loss: WholeLoss,
    *,
    schedule: Schedule,
    microbatches: int,
    dtype: Any = None,
    remat: Remat = "full",
) -> tuple[jax.Array, Decoder]:
    """The sum of the losses of the microbatches, and its gradient in the form of the model.

    `batch` is a tuple of arrays [B, S] with `tokens` and `mask` among them. `loss` gets the model, the hidden states of
    a microbatch, the microbatch and the whole batch. `remat` says what the backward of a piece keeps of each layer,
    after it has begun from the piece's input.
    """
    grid = _grid(model, schedule, microbatches)
    if grid.kinds == (Kind.FORWARD, IDLE):
        raise ValueError(f"schedule={schedule.name!r} only runs forward: it trains nothing.")
    parts = _microbatches(batch, microbatches, model)
    run = partial(_train, grid=grid, loss=loss, dtype=dtype, remat=remat)
    shapes = specs(model)
    return _over_stages(run, model, (shapes, PartitionSpec()), (PartitionSpec(), shapes))(_table(grid), model, parts)


def pipelined_hidden(
    model: Decoder, batch: Tokens, *, schedule: Schedule | None = None, microbatches: int, dtype: Any = None
) -> Hidden:
    """`model.hidden` of a batch, run through the stages in microbatches. Every stage gets the result."""
    grid = _grid(model, ForwardOnly() if schedule is None else schedule, microbatches)
    parts = _microbatches(batch, microbatches, model)
    run = partial(_infer, grid=grid, dtype=dtype)
    out = _over_stages(run, model, (specs(model), PartitionSpec()), PartitionSpec())(_table(grid), model, parts)
    return finish(model, out._replace(x=out.x.swapaxes(0, 1).reshape(-1, *out.x.shape[2:])))


def _grid(model: Decoder, schedule: Schedule, microbatches: int) -> Grid:
    stages = model.sharding.size("pp")
    check_cut(model.config, stages, schedule.chunks)
    return lay_out(schedule, stages, microbatches)


def _rows(grid: Grid, model: Decoder) -> int:
    """How many repeats of the pattern one piece has."""
    return model.config.groups[0].repeats // grid.pieces


def _microbatches(batch: Any, microbatches: int, model: Decoder) -> Any:
    """[B, S] as [M, B/M, S]. Row b goes to microbatch b % M, so a device's rows of each are rows that it has."""
    rows, ways = batch.tokens.shape[0], model.sharding.size("dp", "fsdp", "ep")
    if rows % (microbatches * ways):
        raise ValueError(
            f"a batch of {rows} sequences does not divide over dp*fsdp*ep={ways} devices in {microbatches} "
            "microbatches."
        )
    return jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)


def _over_stages(run: Callable[..., Any], model: Decoder, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on every stage. Its first argument is the table, of which each stage gets its own column."""
    shard_map: Any = jax.shard_map
    return shard_map(
        run,
        mesh=model.sharding.mesh,
        axis_names={"pp"},
        in_specs=(PartitionSpec(None, "pp"), *in_specs),
        out_specs=out_specs,
        check_vma=False,
    )


def _table(grid: Grid) -> Cell:
    return Cell(*map(jnp.asarray, grid.cells))


def _train(table: Cell, model: Decoder, parts: Any, *, grid: Grid, loss: WholeLoss, dtype: Any, remat: Remat) -> Any:
    """One stage's part in a step of training."""
    stage = Stage(
        model, _rows(grid, model), grid.pieces - 1, dtype, lambda model, hidden, part: loss(model, hidden, part, parts)
    )
    stage = stage.differentiable(_part(parts, 0, model), remat=remat, split=Kind.BACKWARD_WEIGHT in grid.kinds)

    def forward(state: _Training, cell: Cell, part: Tokens, payload: Payload, gradient: Payload) -> Any:
        return state, jax.lax.cond(
            cell.position == stage.last, lambda payload: payload, partial(stage.forward, cell, part), payload
        )

    def backward(state: _Training, cell: Cell, part: Tokens, payload: Payload, gradient: Payload) -> Any:
        out, loss, sums, pairs = stage.backward(cell, part, payload, gradient, state.sums, state.pairs)
        return _Training(sums, pairs, state.loss + loss), out

    def weights(state: _Training, cell: Cell, part: Tokens, payload: Payload, gradient: Payload) -> Any:
        return state._replace(sums=stage.weights(cell, part, state.sums, state.pairs)), payload

    tasks: dict[int, Task] = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: backward,
        Kind.BACKWARD_INPUT: backward,
        Kind.BACKWARD_WEIGHT: weights,
    }
    state = _Training(stage.zeros(), stage.no_pairs(grid.pair_slots), jnp.float32(0))
    state = _walk(table, grid, tasks, parts, stage, state)
    sums = Sums(state.sums.layers, jax.lax.psum(state.sums.ends, "pp"))
    gradients = jax.tree.map(lambda total, weight: total.astype(weight.dtype), join(model, sums), model)
    return jax.lax.psum(state.loss, "pp"), gradients


def _infer(table: Cell, model: Decoder, parts: Any, *, grid: Grid, dtype: Any) -> Payload:
    """One stage's part in a forward pass: what the last piece hands out, of all microbatches."""
    stage = Stage(model, _rows(grid, model), grid.pieces - 1, dtype)

    def forward(state: Payload, cell: Cell, part: Tokens, payload: Payload, gradient: Payload) -> Any:
        out = stage.forward(cell, part, payload)
        return jax.lax.cond(cell.position == stage.last, _collect, lambda state, *_: state, state, cell, out), out

    nothing = _blank(stage, _part(parts, 0, model))
    state = Payload(_pool(nothing.x, grid.microbatches), nothing.load)
    # Nobody but the stage with the last piece has anything other than zeros.
    return jax.lax.psum(_walk(table, grid, {Kind.FORWARD: forward}, parts, stage, state), "pp")


def _collect(state: Payload, cell: Cell, out: Payload) -> Payload:
    states = jax.lax.dynamic_update_index_in_dim(state.x, out.x, cell.microbatch, 0)
    return Payload(states, jax.tree.map(jnp.add, state.load, out.load))


def _walk(table: Cell, grid: Grid, tasks: Mapping[int, Task], parts: Any, stage: Stage, state: Any) -> Any:
    """The scan over ticks; each task turns (state, cell, microbatch, payload, gradient) into (state, what it made)."""

    def idle(state: Any, cell: Cell, part: Tokens, payload: Payload, gradient: Payload) -> Any:
        return state, payload

    branches = [tasks.get(kind, idle) for kind in grid.kinds]
    number = np.zeros(IDLE + 1, np.int32)
    number[list(grid.kinds)] = np.arange(len(branches))

    def tick(carry: tuple[Payload, Any], row: Cell) -> tuple[tuple[Payload, Any], None]:
        slots, state = carry
        cell = Cell(*(column[0] for column in row))
        part = _part(parts, cell.microbatch, stage.model)
        arrived = _take(slots, cell.activation), _take(slots, cell.gradient)
        state, made = jax.lax.switch(jnp.asarray(number)[cell.kind], branches, state, cell, part, *arrived)
        made = stage.lay(made)
        for slot, pairs in ((cell.from_before, grid.down), (cell.from_after, grid.up)):
            if pairs:
                slots = _put(slots, slot, jax.tree.map(lambda a, pairs=pairs: jax.lax.ppermute(a, "pp", pairs), made))
        return (_put(slots, cell.own, made), state), None

    slots = _pool(_blank(stage, _part(parts, 0, stage.model)), grid.slots)
    (_, state), _ = jax.lax.scan(tick, (slots, state), table)
    return state


def _part(parts: Any, microbatch: Any, model: Decoder) -> Any:
    """One microbatch."""
    taken = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, microbatch, keepdims=False), parts)
    return jax.tree.map(lambda a: model.sharding.constrain(a, "batch", "sequence"), taken)


def _blank(stage: Stage, part: Tokens) -> Payload:
    return stage.lay(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(stage.enter, part)))


def _pool(item: Any, slots: int) -> Any:
    """Room for so many of `item`."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (slots, *a.shape)), item)


def _take(pool: Any, slot: jax.Array) -> Any:
    """What stands in a slot; anything at all where the slot is NONE."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, jnp.maximum(slot, 0), keepdims=False), pool)


def _put(pool: Any, slot: jax.Array, item: Any) -> Any:
    """The pool with `item` in a slot; unchanged where the slot is NONE."""

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        place = jnp.maximum(slot, 0)
        old = jax.lax.dynamic_index_in_dim(rows, place, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(slot == NONE, old, new), place, 0)

    return jax.tree.map(put, pool, item)
