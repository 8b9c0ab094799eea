"""A schedule made to measure: for given times and a memory limit, with nobody's pattern to follow.

The named zero-bubble schedules are drawn for tasks that take equally long. Measured ones do not, and a device has room
for some number of microbatches' activations that is neither 1F1B's nor twice that. Qi et al. 2024 let a search find the
order; so does this one, by rules of its own.

The search plays the pipeline through, stage by stage as they become free. A stage runs the input gradient that has
arrived, for another stage is waiting for it; otherwise the forward that has arrived, if there is room for its
activations; otherwise a weight gradient, unless something better is due so soon that it would be held up. What is due
soon, which goes first and how far ahead to run are open, so several players with different tastes play, and the named
schedules that fit into the memory play too. The best of all wins: never worse, therefore, than ZB-H1 where there is
room for p microbatches, nor than ZB-H2 where there is room for 2p-1.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from typing import Literal, TypeAlias, get_args

from tbjax.pipeline.graph import holding
from tbjax.pipeline.schedule import ZBH1, ZBH2, GPipe, Kind, OneFOneB, Order, Schedule, Task
from tbjax.pipeline.simulate import PerStage, Times, check_part, simulate

Objective: TypeAlias = Literal["total", "makespan"]


@dataclasses.dataclass(frozen=True)
class Automatic(Schedule):
    """The best order that the search finds for `times` within `memory`.

    `memory` is what every stage has room for, in microbatches' activations (None: all that there are), and
    `weight_activations` the part of them that is held until the weight gradient. The objective is the time of the stage
    that is at it longest, or with "makespan" the time until all are done, for steps that wait for each other.
    """

    times: Times
    memory: float | None = None
    weight_activations: float = 1.0
    objective: Objective = "total"
    name = "auto"

    def __post_init__(self) -> None:
        if self.memory is not None and not self.memory >= 1:
            raise ValueError(
                f"memory={self.memory!r}: a stage needs room for one microbatch's activations, 1, or more."
            )
        check_part(self.weight_activations)
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective={self.objective!r} is unknown: 'total' or 'makespan'.")

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        return _best(self, stages, microbatches)

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        if self.memory is None or self.weight_activations * microbatches <= self.memory:
            return microbatches
        # Each of those that are held weighs at least what its weight gradient needs.
        return math.floor(self.memory / self.weight_activations + 1e-9)


@dataclasses.dataclass(frozen=True)
class _Fixed(Schedule):
    """Orders that are already there, so that the simulator can time them."""

    orders: tuple[Order, ...]
    name = "auto"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        return self.orders


@dataclasses.dataclass(frozen=True)
class _Taste:
    """What the rules leave open."""

    ahead: int | None  # how many forwards the last stage may run ahead of its backwards; None: as many as there is room
    steps: int  # how many more each stage before it may
    patience: float  # a weight gradient is put off if something better is due within this part of its time
    forward_first: bool  # whether a forward goes before an input gradient where both have arrived


@functools.lru_cache(maxsize=64)
def _best(wanted: Automatic, stages: int, microbatches: int) -> tuple[Order, ...]:
    memory = math.inf if wanted.memory is None else wanted.memory
    named = (schedule.tasks(stages, microbatches) for schedule in (ZBH1(), ZBH2(), OneFOneB(), GPipe()))
    fitting = [
        orders
        for orders in named
        if all(max(holding(order, wanted.weight_activations)) <= memory + 1e-9 for order in orders)
    ]
    played = [
        _play(wanted.times, stages, microbatches, memory, wanted.weight_activations, taste) for taste in _tastes()
    ]

    def cost(orders: tuple[Order, ...]) -> tuple[float, float]:
        # Not kept: nobody asks for the losers again.
        timeline = simulate.__wrapped__(_Fixed(orders), stages, microbatches, wanted.times)
        if wanted.objective == "total":
            return timeline.total, timeline.makespan
        return timeline.makespan, timeline.total

    return min(fitting + played, key=cost)


def _tastes() -> list[_Taste]:
    ways = [(None, 0), (1, 1), (1, 2)]  # as memory allows, as 1F1B and ZB-H1, as ZB-H2
    return [
        _Taste(ahead, steps, patience, forward_first)
        for (ahead, steps), patience, forward_first in itertools.product(ways, (0.0, 0.5, 1.0), (False, True))
    ]


class _Stage:
    """Where a stage stands in the game."""

    def __init__(self, microbatches: int, *, first: bool, last: bool, ahead: float) -> None:
        self.order: list[Task] = []
        self.free = 0.0
        self.forwards = self.inputs = self.weights = 0  # how many are done
        self.held = 0.0
        self.ahead = ahead
        self.last = last
        # When each microbatch's activations and gradients arrive; infinity: nobody has sent them yet.
        self.activations = [0.0 if first else math.inf] * microbatches
        self.gradients = [math.inf] * microbatches


def _play(
    times: Times, stages: int, microbatches: int, memory: float, weight_activations: float, taste: _Taste
) -> tuple[Order, ...]:
    """One game: every stage's tasks in the order in which it chose them."""
    forward, inputs, weights, transfer = (
        _by_stage(value, stages)
        for value in (times.forward, times.backward_input, times.backward_weight, times.communication)
    )
    players = [
        _Stage(
            microbatches,
            first=stage == 0,
            last=stage == stages - 1,
            ahead=math.inf if taste.ahead is None else taste.ahead + taste.steps * (stages - 1 - stage),
        )
        for stage in range(stages)
    ]
    turns = [(0.0, stage) for stage in range(stages)]  # when a stage has to choose; too often does no harm
    left = 3 * stages * microbatches
    while left:
        now, index = heapq.heappop(turns)
        stage = players[index]
        if now < stage.free:
            continue  # it has begun something else since, and has a turn at its end
        chosen, until = _choose(stage, now, memory, weights[index], taste)
        if chosen is None:
            if until < math.inf:
                heapq.heappush(turns, (until, index))
            continue  # otherwise its turn comes when something is sent to it
        left -= 1
        if chosen is Kind.FORWARD:
            microbatch, took = stage.forwards, forward[index]
            stage.forwards += 1
            stage.held += 1
        elif chosen is Kind.BACKWARD_INPUT:
            microbatch, took = stage.inputs, inputs[index]
            stage.inputs += 1
            stage.held -= 1 - weight_activations
        else:
            microbatch, took = stage.weights, weights[index]
            stage.weights += 1
            stage.held -= weight_activations
        stage.order.append(Task(chosen, 0, microbatch))
        stage.free = now + took
        heapq.heappush(turns, (stage.free, index))
        arrives = stage.free + transfer[index]
        if chosen is Kind.FORWARD and stage.last:
            stage.gradients[microbatch] = stage.free
        elif chosen is Kind.FORWARD:
            players[index + 1].activations[microbatch] = arrives
            heapq.heappush(turns, (arrives, index + 1))
        elif chosen is Kind.BACKWARD_INPUT and index > 0:
            players[index - 1].gradients[microbatch] = arrives
            heapq.heappush(turns, (arrives, index - 1))
    return tuple(tuple(player.order) for player in players)


def _choose(stage: _Stage, now: float, memory: float, weight: float, taste: _Taste) -> tuple[Kind | None, float]:
    """What to run now, or None and when to think again."""
    microbatches = len(stage.activations)
    gradient = stage.gradients[stage.inputs] if stage.inputs < stage.forwards else math.inf
    activation, room = math.inf, stage.held + 1 <= memory + 1e-9
    if room and stage.forwards < microbatches and stage.forwards - stage.inputs < stage.ahead:
        activation = stage.activations[stage.forwards]
    if activation <= now and (taste.forward_first or gradient > now):
        return Kind.FORWARD, now
    if gradient <= now:
        return Kind.BACKWARD_INPUT, now
    due = min(gradient, activation)
    if stage.weights < stage.inputs and due - now >= taste.patience * weight:
        return Kind.BACKWARD_WEIGHT, now
    return None, due


def _by_stage(value: PerStage, stages: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (value,) * stages
    if len(value) != stages:
        raise ValueError(f"the automatic schedule has one chunk a stage: {len(value)} times were given, not {stages}.")
    return value
