"""A schedule as the table that the executor walks through: what each stage does in each tick, and in which buffers.

The executor is one program for all stages, so its stages keep step: in a tick each runs one task at most, and what it
made travels to a neighbour before the next tick begins. Every task then takes one tick, and the grid is the schedule
simulated with tasks that take equally long and transfers that take no time: it has as many ticks as that simulation
lasts.

Activations and gradients between pieces have one shape, so one pool of slots per stage serves for both: an activation
from its arrival until its last use, a gradient likewise. A pool of its own is for what a stage needs again itself: a
microbatch has one slot of it from its forward in a piece until its last gradient there, for what the backward needs and
then for the pairs of which weight gradients are made. Each pool is as deep as the stage that needs most at any moment,
and no deeper: a slot is taken again as soon as it is free.
"""

import dataclasses
import functools
import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tbjax.pipeline.graph import NONE, Graph, ScheduleError, resolve
from tbjax.pipeline.schedule import Kind, Schedule

IDLE = len(Kind)  # in place of a task's kind


class Cell(NamedTuple):
    """One tick of one stage; with arrays [ticks, stages] of int32 for its numbers, the whole grid.

    Slots are NONE where nothing is read or kept; `microbatch` and the like are 0 where the stage is idle.
    """

    kind: Any  # a Kind, or IDLE
    chunk: Any
    position: Any  # of the chunk in the model
    microbatch: Any
    activation: Any  # the slot in which the piece's input stands
    gradient: Any  # the slot in which the gradient of its output stands
    kept: Any  # the slot of what the stage itself needs again: from a forward to the last gradient that it leads to
    own: Any  # the slot for what this tick makes, where the stage itself uses it
    from_before: Any  # the slot for what the stage before makes in this tick
    from_after: Any  # the slot for what the stage after makes in this tick


@dataclasses.dataclass(frozen=True)
class Grid:
    """What every stage does in every tick."""

    stages: int
    chunks: int
    microbatches: int
    cells: Cell
    slots: int  # of activations and gradients
    kept_slots: int
    down: tuple[tuple[int, int], ...]  # (sender, receiver): transfers to the next stage, from the last one to the first
    up: tuple[tuple[int, int], ...]  # and to the one before

    @property
    def ticks(self) -> int:
        return self.cells.kind.shape[0]

    @property
    def pieces(self) -> int:
        return self.stages * self.chunks

    @property
    def kinds(self) -> tuple[int, ...]:
        """What there is in the grid, IDLE included."""
        return tuple(sorted({IDLE, *np.unique(self.cells.kind).tolist()}))

    @property
    def tasks(self) -> int:
        """How many ticks of how many stages are not idle."""
        return int(np.sum(self.cells.kind != IDLE))


@functools.lru_cache(maxsize=16)
def lay_out(schedule: Schedule, stages: int, microbatches: int, *, saves: bool = False) -> Grid:
    """The grid of `schedule`.

    With `saves` a forward keeps what its backward needs, and the last piece's forward hands the gradient that its
    backward begins with to its own stage. Otherwise a backward begins with the input of its piece. Raises ScheduleError
    where the schedule cannot run, or sends past a neighbour.
    """
    graph = resolve(schedule, stages, microbatches)
    ticks = _ticks(graph, stages)
    shape = max(ticks) + 1, stages
    cells = Cell(*(np.full(shape, NONE, np.int32) for _ in Cell._fields))
    cells.kind[:] = IDLE
    for blank in (cells.chunk, cells.position, cells.microbatch):
        blank[:] = 0
    for stage, (order, indices) in enumerate(zip(graph.orders, graph.indices, strict=True)):
        for task, index in zip(order, indices, strict=True):
            tick = ticks[index]
            cells.kind[tick, stage], cells.chunk[tick, stage], cells.microbatch[tick, stage] = task
            cells.position[tick, stage] = graph.position[index]
    slots, down, up = _place_transfers(schedule, graph, ticks, cells, saves)
    kept_slots = _place_own(graph, ticks, cells.kept, saves)
    for array in cells:
        array.setflags(write=False)
    return Grid(stages, schedule.chunks, microbatches, cells, slots, kept_slots, down, up)


def _ticks(graph: Graph, stages: int) -> list[int]:
    """When each task runs: as soon as its stage is done with the task before and what it needs has arrived."""
    free, ticks = [0] * stages, []
    for stage, producer in zip(graph.stage, graph.producer, strict=True):
        tick = max(free[stage], ticks[producer] + 1 if producer != NONE else 0)
        ticks.append(tick)
        free[stage] = tick + 1
    return ticks


class _Stay(NamedTuple):
    """Something in a pool: written at the end of tick `start` (or in it), read for the last time in tick `end`."""

    start: int
    end: int
    what: int


def _place_transfers(
    schedule: Schedule, graph: Graph, ticks: list[int], cells: Cell, saves: bool
) -> tuple[int, tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Gives every activation and gradient a slot; returns how many there are, and who sends to whom."""
    stages = len(graph.orders)
    # Of every transfer, by its producer: on which stage it is needed, and by which tasks.
    users: dict[int, list[int]] = {}
    forwards: dict[tuple[int, int], int] = {}
    for index, (kind, producer) in enumerate(zip(graph.kind, graph.producer, strict=True)):
        place = graph.position[index], graph.microbatch[index]
        if producer != NONE:
            users.setdefault(producer, []).append(index)
        if kind is Kind.FORWARD:
            forwards[place] = index
        elif kind.sends_gradient:
            forward = forwards[place]
            if saves and producer == NONE:
                users[forward] = [index]  # the last piece's forward makes the gradient
            elif not saves and (entered := graph.producer[forward]) != NONE:
                users[entered].append(index)  # a backward begins from the piece's input
    depth = 0
    links: dict[int, set[tuple[int, int]]] = {+1: set(), -1: set(), 0: set()}
    stays: list[list[_Stay]] = [[] for _ in range(stages)]
    for producer, using in users.items():
        stays[graph.stage[using[0]]].append(_Stay(ticks[producer], max(ticks[u] for u in using), producer))
    for stage, found in enumerate(stays):
        slots, used = _colour(found)
        depth = max(depth, used)
        for producer, slot in slots.items():
            sender = graph.stage[producer]
            direction = _direction(schedule, sender, stage, stages)
            links[direction].add((sender, stage))
            {0: cells.own, +1: cells.from_before, -1: cells.from_after}[direction][ticks[producer], stage] = slot
            for user in users[producer]:
                is_activation = (
                    graph.kind[producer] is Kind.FORWARD and graph.position[user] != graph.position[producer]
                )
                (cells.activation if is_activation else cells.gradient)[ticks[user], stage] = slot
    return depth, tuple(sorted(links[+1])), tuple(sorted(links[-1]))


def _direction(schedule: Schedule, sender: int, receiver: int, stages: int) -> int:
    """+1 to the next stage, -1 to the one before, 0 for a stage's own. The last stage and the first are neighbours."""
    if sender == receiver:
        return 0
    if (sender + 1) % stages == receiver:
        return +1
    if (sender - 1) % stages == receiver:
        return -1
    raise ScheduleError(
        f"schedule {schedule.name} sends from stage {sender} to stage {receiver} of {stages}: the executor connects "
        "neighbours alone, so pieces that follow each other must lie on one stage or on two that do."
    )


def _place_own(graph: Graph, ticks: list[int], column: np.ndarray, saves: bool) -> int:
    """Gives a slot to every microbatch in a piece, for as long as its stage has to hold something of it; returns how
    many there are. Where forwards keep nothing, that begins with the backward."""
    depth = 0
    for stage, indices in enumerate(graph.indices):
        held: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            if saves or graph.kind[index] is not Kind.FORWARD:
                held.setdefault((graph.position[index], graph.microbatch[index]), []).append(ticks[index])
        stays = {during[0]: during for during in held.values() if len(during) > 1}
        slots, used = _colour(_Stay(start, during[-1], start) for start, during in stays.items())
        depth = max(depth, used)
        for start, slot in slots.items():
            column[stays[start], stage] = slot
    return depth


def _colour(stays: Iterable[_Stay]) -> tuple[dict[int, int], int]:
    """A slot for each, no two at once in one, in as few as there are at any moment; and how many that is."""
    slots: dict[int, int] = {}
    busy: list[tuple[int, int]] = []  # (until, slot)
    free: list[int] = []
    used = 0
    for stay in sorted(stays):
        # What is read for the last time in the tick at whose end this is written makes room for it.
        while busy and busy[0][0] <= stay.start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(used)
            used += 1
        slot = heapq.heappop(free)
        heapq.heappush(busy, (stay.end, slot))
        slots[stay.what] = slot
    return slots, used
