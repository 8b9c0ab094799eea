"""When every task of a schedule starts and ends, and what follows: the step's time, its bubble, the activations held.

A task starts when its stage is free and what it waits for has arrived: the end of the task that produces it plus, if
that ran on another stage, the time of the transfer. Transfers occupy no stage. This reproduces the bubble rates of
Qi et al. 2024 (Zero Bubble Pipeline Parallelism, Table 5) for 1F1B, ZB-H1 and ZB-H2 to all the digits that they give,
with no free parameter.

Their interleaved column comes out only if a microbatch may start a chunk before it has come round: their own simulator
waits on the link from the last stage to the first for the first microbatch of each group alone. `wraps="first"` does
the same, for comparison with published figures; the default waits for every one. While transfers are short beside the
work, the difference is one transfer for each stage.

Units are the caller's: whatever time is given in comes out. Activations are counted in those that one microbatch leaves
on one stage, all its chunks together.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from tbjax.pipeline.graph import NONE, Graph, holding, resolve
from tbjax.pipeline.schedule import Kind, Schedule, Task

PerStage: TypeAlias = float | tuple[float, ...]
Wraps: TypeAlias = Literal["all", "first"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """How long a microbatch takes on a stage, all its chunks together: one figure for every stage, or one for each.

    With several chunks a stage, a tuple may also have one figure for each piece of the model, in the order in which
    the pieces follow each other; otherwise a stage's time is shared equally by its chunks.
    """

    forward: PerStage
    backward_input: PerStage
    backward_weight: PerStage
    communication: PerStage = 0.0  # of one transfer, of activations or of their gradients; a tuple: by sending stage

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float) or not 0 <= number < math.inf:
                    raise ValueError(f"Times.{name}={value!r}: times are finite numbers, zero or more.")

    @property
    def uniform(self) -> bool:
        """Whether every stage takes equally long."""
        kinds = (self.forward, self.backward_input, self.backward_weight, self.communication)
        return tuple not in map(type, kinds)


_FIELDS = tuple(field.name for field in dataclasses.fields(Times))


class Placed(NamedTuple):
    """A task in time."""

    task: Task
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule in time."""

    schedule: Schedule
    stages: int
    microbatches: int
    times: Times
    total: float  # from the first task's start to the last task's end on the stage that is at it longest
    makespan: float  # from the first task's start to the last task's end on any stage
    bubble_rate: float  # the part of `total` in which a stage is idle, on average over the stages
    peak_activations: tuple[float, ...]  # of each stage, at most
    graph: Graph = dataclasses.field(repr=False)
    ends: tuple[float, ...] = dataclasses.field(repr=False)  # of the tasks of `graph`, in its order
    durations: tuple[float, ...] = dataclasses.field(repr=False)

    @functools.cached_property
    def tasks(self) -> tuple[tuple[Placed, ...], ...]:
        """Every task of every stage with its start and end."""
        return tuple(
            tuple(
                Placed(task, self.ends[index] - self.durations[index], self.ends[index])
                for task, index in zip(order, indices, strict=True)
            )
            for order, indices in zip(self.graph.orders, self.graph.indices, strict=True)
        )


@functools.lru_cache(maxsize=32)
def simulate(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    times: Times,
    *,
    weight_activations: float = 1.0,
    wraps: Wraps = "all",
) -> Timeline:
    """Run `schedule` on the clock.

    `weight_activations` is the part of a microbatch's activations that is held on from its input gradient to its weight
    gradient, in the schedules that split the two (M_W over M_B in the paper).
    """
    check_part(weight_activations)
    if wraps not in ("all", "first"):
        raise ValueError(f"wraps={wraps!r} is unknown: 'all' or 'first'.")
    graph = resolve(schedule, stages, microbatches)
    durations = _durations(graph, schedule, stages, times)
    ends = _run(graph, durations, _transfers(times, stages), _producers(graph, stages) if wraps == "first" else None)
    spans, makespan, busy = [], 0.0, 0.0
    for indices in graph.indices:
        first, last = indices[0], indices[-1]
        spans.append(ends[last] - (ends[first] - durations[first]))
        makespan = max(makespan, ends[last])
        busy += sum(durations[index] for index in indices)
    total = max(spans)
    if total <= 0:
        raise ValueError(f"{times} takes no time at all: there is nothing to simulate.")
    return Timeline(
        schedule=schedule,
        stages=stages,
        microbatches=microbatches,
        times=times,
        total=total,
        makespan=makespan,
        # A sum of many floats may come out a last digit above what it should equal.
        bubble_rate=max(0.0, 1 - busy / (stages * total)),
        peak_activations=tuple(max(holding(order, weight_activations)) / schedule.chunks for order in graph.orders),
        graph=graph,
        ends=tuple(ends),
        durations=tuple(durations),
    )


def check_part(weight_activations: float) -> None:
    """Raise ValueError unless the part of the activations that weight gradients need is one."""
    if not 0 <= weight_activations <= 1:
        raise ValueError(f"weight_activations={weight_activations!r} is a part of the activations: between 0 and 1.")


def _run(
    graph: Graph, durations: Sequence[float], transfers: Sequence[float], producers: Sequence[int] | None
) -> list[float]:
    """The end of every task. The loop is all that a simulation costs, so it does nothing else."""
    free, ends = [0.0] * len(graph.orders), [0.0] * len(durations)
    rows = zip(graph.stage, durations, producers or graph.producer, graph.sender, strict=True)
    for index, (stage, duration, producer, sender) in enumerate(rows):
        start = free[stage]
        if producer != NONE:
            arrival = ends[producer] + transfers[sender]
            if arrival > start:
                start = arrival
        ends[index] = free[stage] = start + duration
    return ends


def _producers(graph: Graph, stages: int) -> list[int]:
    """What tasks wait for, less the transfers from the last stage to the first and back that do not begin a group."""
    producers = list(graph.producer)
    for index, (kind, position, microbatch) in enumerate(
        zip(graph.kind, graph.position, graph.microbatch, strict=True)
    ):
        arrives = position if kind is Kind.FORWARD else position + 1  # the link: from the piece before this position
        if arrives % stages == 0 and microbatch % stages and graph.sender[index] != NONE:
            producers[index] = NONE
    return producers


def _transfers(times: Times, stages: int) -> list[float]:
    """By sending stage; the last entry, which NONE finds, is of results that stay where they are."""
    communication = times.communication
    if isinstance(communication, tuple) and len(communication) != stages:
        raise ValueError(
            f"Times.communication has {len(communication)} figures: give one, or {stages} for stages={stages}."
        )
    return [*(communication if isinstance(communication, tuple) else [communication] * stages), 0.0]


def _durations(graph: Graph, schedule: Schedule, stages: int, times: Times) -> list[float]:
    pieces = stages * schedule.chunks
    holder = {
        schedule.position(stage, chunk, stages): stage for stage in range(stages) for chunk in range(schedule.chunks)
    }

    def by_position(name: str) -> list[float]:
        value = getattr(times, name)
        if not isinstance(value, tuple):
            return [value / schedule.chunks] * pieces
        if len(value) == pieces:
            return list(value)
        if len(value) == stages:
            return [value[holder[position]] / schedule.chunks for position in range(pieces)]
        wanted = f"{stages} for stages={stages}" + (f" or {pieces} for its pieces" if pieces != stages else "")
        raise ValueError(f"Times.{name} has {len(value)} figures: give one, or {wanted}.")

    forward, inputs, weights = map(by_position, ("forward", "backward_input", "backward_weight"))
    table = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: [i + w for i, w in zip(inputs, weights, strict=True)],
        Kind.BACKWARD_INPUT: inputs,
        Kind.BACKWARD_WEIGHT: weights,
    }
    return [table[kind][position] for kind, position in zip(graph.kind, graph.position, strict=True)]
