"""Pipeline schedules as values: which tasks each stage runs, and in which order.

A model cut into stages processes a batch as microbatches. For each microbatch every stage runs a forward and a
backward. A backward may be split in two: the gradient for the stage's input, which the stage before it waits for, and
the gradient for its weights, which nobody waits for and which can fill what would be idle time (Qi et al. 2024, "Zero
Bubble Pipeline Parallelism"). A schedule is no more than an order of those tasks on each stage. When a task starts
follows from that order, from what it waits for and from how long tasks take: that is the simulator's business, and a
schedule knows no times.

A stage may hold several pieces of the model, its chunks. The pieces are numbered along the model by their position;
`Schedule.position` says at which position chunk c of stage s lies. In a loop, the model goes round the stages once per
chunk; in a V it goes down the stages and comes back up, so that the first stage holds both ends.

A schedule of your own is a frozen dataclass with `name`, `tasks` and, if it has chunks, `chunks` and `position`. All
that is built on schedules checks it first (`graph.resolve`) and then treats it like those below.
"""

import abc
import dataclasses
import enum
import functools
from collections import deque
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a task computes."""

    FORWARD = 0
    BACKWARD = 1  # both gradients, in one task
    BACKWARD_INPUT = 2  # the gradient for the input of the piece, to be sent to the piece before it
    BACKWARD_WEIGHT = 3  # the gradient for the weights of the piece

    @property
    def letter(self) -> str:
        return "FBBW"[self]

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", "-")

    @property
    def sends_gradient(self) -> bool:
        return self in (Kind.BACKWARD, Kind.BACKWARD_INPUT)


class Task(NamedTuple):
    """One piece of work of a stage: one microbatch through one of its chunks."""

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.words} of microbatch {self.microbatch} (chunk {self.chunk})"


Order = tuple[Task, ...]  # of one stage, in the order in which it runs them


class Schedule(abc.ABC):
    """An order of tasks for any number of stages and microbatches. Those that derive from it are frozen dataclasses."""

    name: str
    chunks: int = 1  # pieces of the model on each stage

    @abc.abstractmethod
    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        """The tasks of every stage, in order. Raises ValueError for numbers that the schedule cannot serve."""

    def position(self, stage: int, chunk: int, stages: int) -> int:
        """Which piece of the model, counted from its input, chunk `chunk` of `stage` is. Here: a loop."""
        return chunk * stages + stage

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        """How many chunks' activations `stage` may hold at once, for backwards or weight gradients yet to come.

        The executor's buffers are this deep, so the checker holds every schedule to its word. A schedule that says
        nothing may hold everything.
        """
        del stage, stages
        return microbatches * self.chunks


@dataclasses.dataclass(frozen=True)
class ForwardOnly(Schedule):
    """Inference: every microbatch once through the stages, nothing held."""

    name = "forward"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        return (_forwards(0, microbatches),) * stages

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class GPipe(Schedule):
    """All forwards, then all backwards (Huang et al. 2019). Every microbatch's activations are held at once."""

    name = "gpipe"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        backwards = tuple(Task(Kind.BACKWARD, 0, microbatch) for microbatch in range(microbatches))
        return (_forwards(0, microbatches) + backwards,) * stages


@dataclasses.dataclass(frozen=True)
class OneFOneB(Schedule):
    """As few forwards ahead as keep every stage busy, then one forward, one backward (Narayanan et al. 2019).

    The bubble is GPipe's; the activations held no longer grow with the number of microbatches.
    """

    name = "1f1b"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        return tuple(
            _alternate(
                [Task(Kind.FORWARD, 0, microbatch) for microbatch in range(microbatches)],
                [Task(Kind.BACKWARD, 0, microbatch) for microbatch in range(microbatches)],
                ahead=self.limit(stage, stages, microbatches),
            )
            for stage in range(stages)
        )

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        return min(stages - stage, microbatches)


@dataclasses.dataclass(frozen=True)
class Interleaved1F1B(Schedule):
    """1F1B over several chunks a stage: the pipeline fills in a fraction of the time (Narayanan et al. 2021).

    Microbatches go in groups of as many as there are stages: a group passes through the first chunk of a stage, then
    through its second, and so on, by which time the first of the group has come round. With one chunk it is a 1F1B
    that runs further ahead, so that transfers are hidden, for up to 2p-1 microbatches' activations.
    """

    name = "interleaved"
    chunks: int = 2

    def __post_init__(self) -> None:
        _positive(chunks=self.chunks)

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        if microbatches % stages:
            below = microbatches // stages * stages
            nearest = f"{below} or {below + stages}" if below else str(stages)
            raise ValueError(
                f"the interleaved schedule runs microbatches in groups of as many as there are stages: microbatches="
                f"{microbatches} is not a multiple of stages={stages}; {nearest} would do."
            )
        forwards, backwards = [], []
        for first in range(0, microbatches, stages):
            group = range(first, first + stages)
            for chunk in range(self.chunks):
                forwards += [Task(Kind.FORWARD, chunk, microbatch) for microbatch in group]
                backwards += [Task(Kind.BACKWARD, self.chunks - 1 - chunk, microbatch) for microbatch in group]
        return tuple(
            _alternate(forwards, backwards, ahead=self.limit(stage, stages, microbatches)) for stage in range(stages)
        )

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        # Two more for each stage that follows (one on the way there, one on the way back), and a whole group for each
        # chunk that the first microbatch has to pass before its backward begins.
        return min(2 * (stages - 1 - stage) + (self.chunks - 1) * stages + 1, microbatches * self.chunks)


@dataclasses.dataclass(frozen=True)
class ZBH1(Schedule):
    """1F1B with weight gradients put off until there is nothing else to do, in 1F1B's memory (Qi et al. 2024).

    Stage i (from 0) runs p-i forwards ahead, like 1F1B, and stays i weight gradients behind: what the later stages do
    not hold for backwards they hold for weight gradients, so that every stage holds p.
    """

    name = "zb-h1"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        return tuple(_put_off(microbatches, ahead=stages - stage, behind=stage) for stage in range(stages))

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        return min(stages, microbatches)


@dataclasses.dataclass(frozen=True)
class ZBH2(Schedule):
    """ZB-H1 with forwards enough to fill the pipeline's start as well, in twice the memory (Qi et al. 2024).

    Where forward, input gradient and weight gradient take equally long, no stage is ever idle between its first task
    and its last.
    """

    name = "zb-h2"

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        return tuple(
            _put_off(microbatches, ahead=2 * (stages - 1 - stage) + 1, behind=2 * stage) for stage in range(stages)
        )

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        return min(2 * stages - 1, microbatches)


@dataclasses.dataclass(frozen=True)
class ZBV(Schedule):
    """Two chunks a stage, placed in a V: where F, B and W take equally long, no bubble in 1F1B's memory.

    The first stage holds the first piece of the model and the last, so it may begin a microbatch's backward as soon as
    its forward has come back. The steady state is F B W of the one chunk, then F B W of the other (Qi et al. 2024).
    """

    name = "zb-v"
    chunks = 2

    def position(self, stage: int, chunk: int, stages: int) -> int:
        return stage if chunk == 0 else 2 * stages - 1 - stage

    def tasks(self, stages: int, microbatches: int) -> tuple[Order, ...]:
        _positive(stages=stages, microbatches=microbatches)
        # The order below needs 2p-1 microbatches to fill the pipeline. With fewer it is that order with the tasks of
        # the others left out, which stays valid: microbatches do not wait for each other.
        padded = max(microbatches, 2 * stages - 1)
        orders = (_down_and_up(stage, stages, padded) for stage in range(stages))
        return tuple(tuple(task for task in order if task.microbatch < microbatches) for order in orders)

    def limit(self, stage: int, stages: int, microbatches: int) -> int:
        return 2 * min(stages, microbatches)


NAMED: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (GPipe, OneFOneB, Interleaved1F1B, ZBH1, ZBH2, ZBV, ForwardOnly)
}


@functools.lru_cache(maxsize=256)
def named(name: str, chunks: int | None = None) -> Schedule:
    """The schedule called `name`; `chunks` is for the interleaved one alone."""
    if name not in NAMED:
        raise ValueError(f"schedule {name!r} is unknown: tbjax knows {', '.join(NAMED)}.")
    if name == Interleaved1F1B.name:
        return Interleaved1F1B() if chunks is None else Interleaved1F1B(chunks)
    schedule = NAMED[name]()
    if chunks not in (None, 1, schedule.chunks):
        raise ValueError(
            f"chunks={chunks}: the {name} schedule has {schedule.chunks} a stage; only interleaved lets you choose."
        )
    return schedule


def chosen(schedule: Schedule | str) -> Schedule:
    """A schedule that is given as it is or by its name."""
    if isinstance(schedule, str):
        return named(schedule)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} is no schedule: give one of the names {', '.join(NAMED)}, or a "
            "tbjax.pipeline.schedule.Schedule such as Interleaved1F1B(chunks=4)."
        )
    return schedule


def _forwards(chunk: int, microbatches: int) -> Order:
    return tuple(Task(Kind.FORWARD, chunk, microbatch) for microbatch in range(microbatches))


def _alternate(forwards: list[Task], backwards: list[Task], *, ahead: int) -> Order:
    """`ahead` forwards, then a backward and a forward in turn for as long as there are forwards."""
    order = list(forwards[:ahead])
    for index, backward in enumerate(backwards):
        order.append(backward)
        order += forwards[ahead + index : ahead + index + 1]
    return tuple(order)


def _put_off(microbatches: int, *, ahead: int, behind: int) -> Order:
    """`ahead` forwards, then input gradient, weight gradient of `behind` microbatches ago, forward, in turn."""
    order = [Task(Kind.FORWARD, 0, microbatch) for microbatch in range(min(ahead, microbatches))]
    for microbatch in range(microbatches):
        order.append(Task(Kind.BACKWARD_INPUT, 0, microbatch))
        if microbatch >= behind:
            order.append(Task(Kind.BACKWARD_WEIGHT, 0, microbatch - behind))
        if microbatch + ahead < microbatches:
            order.append(Task(Kind.FORWARD, 0, microbatch + ahead))
    order += [Task(Kind.BACKWARD_WEIGHT, 0, late) for late in range(max(0, microbatches - behind), microbatches)]
    return tuple(order)


class _Steps:
    """An order under construction: the next microbatch of every kind and chunk, and the weight gradients owed."""

    def __init__(self) -> None:
        self.order: list[Task] = []
        self.owed: deque[Task] = deque()
        self.next: dict[tuple[Kind, int], int] = {}

    def forward(self, chunk: int) -> None:
        self._append(Kind.FORWARD, chunk)

    def backward_input(self, chunk: int) -> None:
        task = self._append(Kind.BACKWARD_INPUT, chunk)
        self.owed.append(task._replace(kind=Kind.BACKWARD_WEIGHT))

    def backward_weight(self) -> None:
        """The one owed for longest."""
        self.order.append(self.owed.popleft())

    def done(self, kind: Kind, chunk: int) -> int:
        return self.next.get((kind, chunk), 0)

    def _append(self, kind: Kind, chunk: int) -> Task:
        task = Task(kind, chunk, self.done(kind, chunk))
        self.next[kind, chunk] = task.microbatch + 1
        self.order.append(task)
        return task


def _down_and_up(stage: int, stages: int, microbatches: int) -> list[Task]:
    """ZB-V's order on one stage, for at least 2p-1 microbatches."""
    steps, below = _Steps(), stages - stage  # `below`: the stages from this one to the foot of the V
    # Forwards on the way down until the first microbatch has been to the foot and back ...
    for _ in range(2 * below - 1):
        steps.forward(0)
    # ... both ways until it has reached the first stage, and its backward has come down to this one.
    for _ in range(stage):
        steps.forward(1)
        steps.forward(0)
    # Backwards of the upper chunk, until the first has been to the foot and back.
    for _ in range(below):
        steps.forward(1)
        steps.backward_input(1)
        steps.backward_weight()
    # From here on a stage has something of each to do at all times.
    while steps.done(Kind.FORWARD, 1) < microbatches:
        if steps.done(Kind.FORWARD, 0) < microbatches:
            steps.forward(0)
        steps.backward_input(0)
        steps.backward_weight()
        steps.forward(1)
        steps.backward_input(1)
        steps.backward_weight()
    # Only backwards are left, and the other stages wait for them: weight gradients are put off until ...
    for _ in range(stage):
        steps.backward_input(0)
        steps.backward_input(1)
    # ... nothing else arrives any faster.
    for _ in range(below):
        steps.backward_input(0)
        steps.backward_weight()
    while steps.owed:
        steps.backward_weight()
    return steps.order


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive integer, not {number!r}.")
