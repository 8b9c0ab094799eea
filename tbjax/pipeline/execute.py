"""Runs a schedule: one program for all stages, on any mesh whose axis `pp` is larger than one.

The program is one `shard_map` over `pp` (the other axes stay the compiler's, so that a stage is computed with dp, fsdp,
ep and tp like any model) around one scan over the ticks of the schedule's grid. In each tick a stage looks up its task
and does it, and then what it made travels to its neighbours. Every stage takes part in the transfers in every tick,
whatever it does; the table says who keeps what arrived.

Nothing is differentiated as a whole. Backwards are tasks like others, so what is held at any moment is what the
schedule holds, and not what reversing a loop would.

M microbatches, B sequences of one, S sequence.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.layers.context import arranged, to_natural_order
from tbjax.model import Decoder, Hidden
from tbjax.pipeline.graph import NONE
from tbjax.pipeline.grid import IDLE, Cell, Grid, lay_out
from tbjax.pipeline.schedule import ForwardOnly, Kind, Schedule, chosen
from tbjax.pipeline.stages import Payload, Stage, Tokens, Weights, finish, join, over_stages, specs
from tbjax.pipeline.training import StageRemat, State, TrainingStage, when

# As `Loss`, with the whole batch as its last argument: what a microbatch's part is measured by is counted there.
WholeLoss = Callable[[Decoder, Hidden, Any, Any], jax.Array]

# How stages share the table of the grid, each its own column, and the microbatches, each all of them.
_SPECS = PartitionSpec(None, "pp"), PartitionSpec()

# (cell, microbatch, activation, gradient, state) -> state, what is sent to a neighbour
Task = Callable[[Cell, Any, Payload, Payload, Any], tuple[Any, Payload]]


def pipelined_gradients(
    model: Decoder,
    batch: Tokens,
    loss: WholeLoss,
    *,
    schedule: Schedule | str,
    microbatches: int,
    dtype: Any = None,
    remat: StageRemat = "full",
) -> tuple[jax.Array, Decoder]:
    """The sum of the losses of the microbatches, and its gradient in the form of the model.

    `batch` is a tuple of arrays [B, S] with `tokens` and `mask` among them. `loss` gets the model, the hidden states of
    a microbatch, the microbatch and the whole batch. `remat` says what is kept from forward to backward: see
    `tbjax.pipeline.training`.
    """
    schedule = chosen(schedule)
    grid = lay_out(schedule, model.sharding.size("pp"), microbatches, saves=remat != "stage")
    if grid.kinds == (Kind.FORWARD, IDLE):
        raise ValueError(f"schedule={schedule.name!r} only runs forward: it trains nothing.")
    if {Kind.BACKWARD, Kind.BACKWARD_WEIGHT} <= {*grid.kinds}:
        raise ValueError(f"schedule={schedule.name!r} splits some backwards and not others: split all or none.")
    return over_stages(
        partial(_train, grid=grid, loss=loss, remat=remat),
        model,
        schedule,
        (_table(grid), _microbatches(batch, microbatches, model)),
        in_specs=_SPECS,
        out_specs=(PartitionSpec(), specs(model)),
        dtype=dtype,
    )


def pipelined_hidden(
    model: Decoder, batch: Tokens, *, schedule: Schedule | None = None, microbatches: int, dtype: Any = None
) -> Hidden:
    """`model.hidden` of a batch, run through the stages in microbatches. Every stage gets the result."""
    schedule = ForwardOnly() if schedule is None else schedule
    grid = lay_out(schedule, model.sharding.size("pp"), microbatches)
    given = _table(grid), _microbatches(batch, microbatches, model)
    out = over_stages(
        partial(_infer, grid=grid), model, schedule, given, in_specs=_SPECS, out_specs=PartitionSpec(), dtype=dtype
    )
    x = out.x.swapaxes(0, 1).reshape(-1, *out.x.shape[2:])
    return finish(model, out._replace(x=to_natural_order(x, model.sharding)))


def _microbatches(batch: Any, microbatches: int, model: Decoder) -> Any:
    """[B, S] as [M, B/M, S]. Row b goes to microbatch b % M, so a device's rows of each are rows that it has."""
    rows = batch.tokens.shape[0]
    if rows % microbatches:
        raise ValueError(f"a batch of {rows} sequences does not divide into {microbatches} microbatches.")
    batch = arranged(batch, model.sharding)
    return jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)


def _table(grid: Grid) -> Cell:
    return Cell(*map(jnp.asarray, grid.cells))


def _train(stage: Stage, cells: Cell, parts: Any, *, grid: Grid, loss: WholeLoss, remat: StageRemat) -> Any:
    """One stage's part in a step of training."""
    training = TrainingStage.make(
        stage,
        lambda model, hidden, part: loss(model, hidden, part, parts),
        _part(parts, 0, stage.model),
        remat=remat,
        splits=Kind.BACKWARD_WEIGHT in grid.kinds,
    )

    def forward(cell: Cell, part: Tokens, payload: Payload, gradient: Payload, state: State) -> Any:
        return training.forward(cell, part, payload, state)

    def late(cell: Cell, part: Tokens, payload: Payload, gradient: Payload, state: State) -> Any:
        return training.weights(cell, part, state), payload

    tasks: dict[int, Task] = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: training.backward,
        Kind.BACKWARD_INPUT: training.backward,
        Kind.BACKWARD_WEIGHT: late,
    }
    state = _walk(stage, cells, parts, grid, tasks, training.start(grid.kept_slots))
    sums = Weights(stage.exchange.back(state.sums.layers), jax.lax.psum(state.sums.ends, "pp"))
    sums = join(stage.model, sums)
    gradients = jax.tree.map(lambda total, weight: total.astype(weight.dtype), sums, stage.model)
    return jax.lax.psum(state.loss, "pp"), gradients


def _infer(stage: Stage, cells: Cell, parts: Any, *, grid: Grid) -> Payload:
    """One stage's part in a forward pass: what the last piece hands out, of all microbatches."""

    def forward(cell: Cell, part: Tokens, payload: Payload, gradient: Payload, state: Payload) -> Any:
        out = stage.forward(cell, part, payload)
        return when(cell.position == stage.last, lambda _, state: _collect(state, cell, out), state), out

    nothing = stage.blank(_part(parts, 0, stage.model))
    state = Payload(_pool(nothing.x, grid.microbatches), nothing.load)
    # Nobody but the stage with the last piece has anything other than zeros.
    return jax.lax.psum(_walk(stage, cells, parts, grid, {Kind.FORWARD: forward}, state), "pp")


def _collect(state: Payload, cell: Cell, out: Payload) -> Payload:
    states = jax.lax.dynamic_update_index_in_dim(state.x, out.x, cell.microbatch, 0)
    return Payload(states, jax.tree.map(jnp.add, state.load, out.load))


def _walk(stage: Stage, cells: Cell, parts: Any, grid: Grid, tasks: Mapping[int, Task], state: Any) -> Any:
    """The scan over ticks: each stage's task, then the transfers."""

    def tick(carry: tuple[Payload, Any], row: Cell) -> tuple[tuple[Payload, Any], None]:
        slots, state = carry
        cell = Cell(*(column[0] for column in row))
        done = state, jax.tree.map(lambda a: a[0], slots)
        for kind, task in tasks.items():
            if kind in grid.kinds:

                def run(turn: jax.Array, done: tuple[Any, Payload], task: Task = task) -> tuple[Any, Payload]:
                    # Of what does not depend on the turn the compiler would make one for all turns, before the loop:
                    # of pieces of one layer nearly everything, in every tick, whether there is a turn or not.
                    now = Cell(*(number + turn for number in cell))
                    part = _part(parts, now.microbatch, stage.model)
                    return task(now, part, _take(slots, now.activation), _take(slots, now.gradient), done[0])

                done = jax.lax.fori_loop(0, (cell.kind == kind).astype(jnp.int32), run, done)
        state, made = done
        made = stage.lay(made)
        for slot, pairs in ((cell.from_before, grid.down), (cell.from_after, grid.up)):
            if pairs:
                slots = _put(slots, slot, jax.tree.map(lambda a, pairs=pairs: jax.lax.ppermute(a, "pp", pairs), made))
        return (_put(slots, cell.own, made), state), None

    slots = _pool(stage.blank(_part(parts, 0, stage.model)), grid.slots)
    (_, state), _ = jax.lax.scan(tick, (slots, state), cells)
    return state


def _part(parts: Any, microbatch: Any, model: Decoder) -> Any:
    """One microbatch."""
    taken = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, microbatch, keepdims=False), parts)
    return jax.tree.map(lambda a: model.sharding.constrain(a, "batch", "sequence"), taken)


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
