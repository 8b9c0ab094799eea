"""What the tasks of a schedule wait for, and the one check that every schedule passes before anything uses it.

A task waits for three things: the stage has to be done with the task before it, a forward needs the output of the
piece before, a backward the gradient from the piece after. Each has at most one of the latter, so a schedule is a
graph with two edges into every task, and "it can run" means that the graph has no cycle. `resolve` builds the graph,
in an order in which every task comes after what it waits for, or says what is wrong with the schedule.
"""

import dataclasses
import functools
from collections.abc import Sequence

from tbjax.pipeline.schedule import Kind, Order, Schedule, Task

NONE = -1  # in place of the index of a task


class ScheduleError(ValueError):
    """A schedule that cannot be run as it stands."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """The tasks of a schedule, flattened so that each comes after all that it waits for.

    Of task i: its stage, its kind, the position in the model of what it works on, and its producer, the task whose
    result it waits for (NONE if it needs none), with the stage that sends it (NONE if that is its own).
    """

    orders: tuple[Order, ...]  # the schedule's own, by stage
    indices: tuple[tuple[int, ...], ...]  # where the tasks of `orders` stand in the lists below
    stage: tuple[int, ...]
    kind: tuple[Kind, ...]
    position: tuple[int, ...]
    microbatch: tuple[int, ...]
    producer: tuple[int, ...]
    sender: tuple[int, ...]


@functools.lru_cache(maxsize=16)  # a graph of 64 stages and 512 microbatches takes some fifty megabytes
def resolve(schedule: Schedule, stages: int, microbatches: int) -> Graph:
    """The checked graph of `schedule`. Raises ScheduleError where it cannot run, or holds more than it says."""
    orders = tuple(map(tuple, schedule.tasks(stages, microbatches)))
    if len(orders) != stages:
        raise ScheduleError(f"schedule {schedule.name} has tasks for {len(orders)} stages, not for stages={stages}.")
    positions = _positions(schedule, stages)
    _check_each_task_once(schedule, orders, microbatches)
    for stage, order in enumerate(orders):
        held = max(holding(order), default=0)
        limit = schedule.limit(stage, stages, microbatches)
        if held > limit:
            raise ScheduleError(
                f"schedule {schedule.name}: stage {stage} holds the activations of {held:g} chunks at once, more than "
                f"the {limit} that its limit() states: raise the limit, or run backwards earlier."
            )
    return _flatten(schedule, orders, positions)


def check(schedule: Schedule, stages: int, microbatches: int) -> None:
    """Raise ScheduleError unless `schedule` can be run.

    Every task is there exactly once, nothing runs before what it needs, no stages wait for each other in a circle,
    and no stage holds more than the schedule states.
    """
    resolve(schedule, stages, microbatches)


def holding(order: Sequence[Task], weight_activations: float = 1) -> list[float]:
    """How many chunks' activations a stage holds after each of its tasks has begun.

    A chunk counts 1 from its forward until its backward or input gradient is done, and `weight_activations` from then
    until its weight gradient is done. A task's own is held while it runs.
    """
    forward_only = all(task.kind is Kind.FORWARD for task in order)
    held, now = [], 0.0
    for task in order:
        if task.kind is Kind.FORWARD:
            now += 1
        held.append(now)
        if task.kind is Kind.BACKWARD or forward_only:
            now -= 1
        elif task.kind is Kind.BACKWARD_INPUT:
            now -= 1 - weight_activations
        elif task.kind is Kind.BACKWARD_WEIGHT:
            now -= weight_activations
    return held


def _positions(schedule: Schedule, stages: int) -> list[list[int]]:
    """By stage and chunk, having checked that every piece of the model lies in one place."""
    positions = [
        [schedule.position(stage, chunk, stages) for chunk in range(schedule.chunks)] for stage in range(stages)
    ]
    pieces = stages * schedule.chunks
    if sorted(position for row in positions for position in row) != list(range(pieces)):
        raise ScheduleError(
            f"schedule {schedule.name} places the {pieces} pieces of the model at {positions} (by stage and chunk): "
            f"each of 0 to {pieces - 1} must be there once."
        )
    return positions


# What must have run before, on the same stage, and which kinds make a microbatch complete: as sets of bits, since a
# large schedule has a hundred thousand tasks.
_BIT = {kind: 1 << kind for kind in Kind}
_NEEDS = {Kind.BACKWARD: Kind.FORWARD, Kind.BACKWARD_INPUT: Kind.FORWARD, Kind.BACKWARD_WEIGHT: Kind.BACKWARD_INPUT}
_FORWARD = _BIT[Kind.FORWARD]
_WHOLE = _FORWARD | _BIT[Kind.BACKWARD]
_SPLIT = _FORWARD | _BIT[Kind.BACKWARD_INPUT] | _BIT[Kind.BACKWARD_WEIGHT]


def _check_each_task_once(schedule: Schedule, orders: Sequence[Order], microbatches: int) -> None:
    """Each chunk of each stage runs each microbatch forward, and backward whole or split (or, of none, not at all)."""
    forward_only = all(task.kind is Kind.FORWARD for order in orders for task in order)
    complete = {_FORWARD} if forward_only else {_WHOLE, _SPLIT}
    for stage, order in enumerate(orders):
        where = f"schedule {schedule.name}, stage {stage}"
        seen = [[0] * microbatches for _ in range(schedule.chunks)]
        for task in order:
            kind, chunk, microbatch = task
            if not (0 <= chunk < schedule.chunks and 0 <= microbatch < microbatches):
                raise ScheduleError(
                    f"{where}: there is no {task}, with {schedule.chunks} chunks and {microbatches} microbatches."
                )
            before = seen[chunk][microbatch]
            if before & _BIT[kind]:
                raise ScheduleError(f"{where}: {task} is there twice.")
            if kind in _NEEDS and not before & _BIT[_NEEDS[kind]]:
                raise ScheduleError(f"{where}: {task} comes before the {_NEEDS[kind].words} that it needs.")
            seen[chunk][microbatch] = before | _BIT[kind]
        for chunk, row in enumerate(seen):
            for microbatch, there in enumerate(row):
                if there not in complete:
                    raise ScheduleError(f"{where}: {_incomplete(chunk, microbatch, there)}")


def _incomplete(chunk: int, microbatch: int, there: int) -> str:
    if there & _WHOLE == _WHOLE:
        return f"microbatch {microbatch} (chunk {chunk}) has both a whole backward and a split one: one of the two."
    wanted = _SPLIT if there & (_SPLIT - _FORWARD) else _WHOLE
    missing = next(kind for kind in Kind if _BIT[kind] & wanted & ~there)
    return f"{Task(missing, chunk, microbatch)} is missing."


def _flatten(schedule: Schedule, orders: tuple[Order, ...], positions: list[list[int]]) -> Graph:
    """Run the schedule without a clock: each stage goes on until its next task waits for one that has not run."""
    stages, last = len(orders), len(orders) * schedule.chunks - 1
    holder = {position: stage for stage, row in enumerate(positions) for position in row}
    outputs: dict[tuple[int, int], int] = {}  # (position, microbatch) -> the forward
    gradients: dict[tuple[int, int], int] = {}  # (position, microbatch) -> the backward that sends its input's gradient
    indices: list[list[int]] = [[] for _ in orders]
    columns: list[tuple[int, Kind, int, int, int, int]] = []
    ready = list(range(stages))
    waiting: dict[tuple[bool, int, int], int] = {}  # the result waited for -> the stage that waits
    while ready:
        stage = ready.pop()
        order, done = orders[stage], indices[stage]
        while len(done) < len(order):
            kind, chunk, microbatch = order[len(done)]
            position = positions[stage][chunk]
            producer = source = NONE
            if kind is not Kind.BACKWARD_WEIGHT:
                forward = kind is Kind.FORWARD
                source = position - 1 if forward else position + 1
                if 0 <= source <= last:
                    found = (outputs if forward else gradients).get((source, microbatch))
                    if found is None:
                        waiting[forward, source, microbatch] = stage
                        break
                    producer = found
                results = outputs if forward else gradients
                results[position, microbatch] = len(columns)
                if (forward, position, microbatch) in waiting:
                    ready.append(waiting.pop((forward, position, microbatch)))
            sender = holder[source] if producer != NONE and holder[source] != stage else NONE
            done.append(len(columns))
            columns.append((stage, kind, position, microbatch, producer, sender))
    if len(columns) < sum(map(len, orders)):
        raise ScheduleError(_deadlock(schedule, orders, indices))
    stage, kind, position, microbatch, producer, sender = zip(*columns, strict=True)
    return Graph(orders, tuple(map(tuple, indices)), stage, kind, position, microbatch, producer, sender)


def _deadlock(schedule: Schedule, orders: Sequence[Order], indices: Sequence[Sequence[int]]) -> str:
    stuck = [
        f"stage {stage} waits to run the {order[len(done)]}"
        for stage, (order, done) in enumerate(zip(orders, indices, strict=True))
        if len(done) < len(order)
    ]
    return (
        f"schedule {schedule.name} comes to a standstill: {'; '.join(stuck)}. What each of them needs stands later "
        "in another stage's order."
    )
