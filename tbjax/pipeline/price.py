"""What a schedule costs, in microseconds: for a search that asks tens of thousands of times.

Where all stages take equally long, a simulation always ends up on one of very few paths: from the first task to the
last, so many forwards, so many gradients, so many transfers. Which of them is the longest depends on the times, but
the paths themselves depend only on the schedule and on the numbers of stages and microbatches. `price` takes the
longest of those paths; they are written down below for the named schedules, and the tests hold the result to the
simulator's over random times. Where the paths are not known (stages that differ, a schedule of your own, fewer
microbatches than fill the pipeline, transfers as long as the work) it simulates.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

from tbjax.pipeline.graph import holding, resolve
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, ForwardOnly, GPipe, Interleaved1F1B, OneFOneB, Schedule
from tbjax.pipeline.simulate import Times, check_part, simulate


class Price(NamedTuple):
    """The figures of a timeline without the timeline."""

    total: float  # the span of the stage that is at it longest
    makespan: float  # from the first start to the last end
    bubble_rate: float
    peak_activations: tuple[float, ...]


class Path(NamedTuple):
    """What a path through a schedule passes: tasks of one chunk, and transfers."""

    forwards: int
    inputs: int
    weights: int
    transfers: int


class _Paths(NamedTuple):
    to_total: tuple[Path, ...]
    to_makespan: tuple[Path, ...]


def price(
    schedule: Schedule, stages: int, microbatches: int, times: Times, *, weight_activations: float = 1.0
) -> Price:
    """What `simulate` says of the same arguments."""
    paths = _paths(schedule, stages, microbatches) if times.uniform else None
    if paths is None or not _short_enough(schedule, times):
        timeline = simulate(schedule, stages, microbatches, times, weight_activations=weight_activations)
        return Price(timeline.total, timeline.makespan, timeline.bubble_rate, timeline.peak_activations)
    forward, inputs, weights, transfer = _scalars(times)
    chunks = schedule.chunks
    once = forward if isinstance(schedule, ForwardOnly) else forward + inputs + weights
    forward, inputs, weights = forward / chunks, inputs / chunks, weights / chunks
    total = max([f * forward + i * inputs + w * weights + t * transfer for f, i, w, t in paths.to_total])
    makespan = max([f * forward + i * inputs + w * weights + t * transfer for f, i, w, t in paths.to_makespan])
    if total <= 0:
        raise ValueError(f"{times} takes no time at all: there is nothing to price.")
    bubble_rate = max(0.0, 1 - microbatches * once / total)
    return Price(total, makespan, bubble_rate, peak_activations(schedule, stages, microbatches, weight_activations))


@functools.lru_cache(maxsize=4096)
def peak_activations(
    schedule: Schedule, stages: int, microbatches: int, weight_activations: float = 1.0
) -> tuple[float, ...]:
    """What each stage holds at most, in microbatches' activations. It follows from the order alone."""
    check_part(weight_activations)
    if type(schedule) in (ZBH1, ZBH2):
        # A stage runs some forwards ahead, and then each forward finds one more weight gradient put off, up to as many
        # as the schedule allows: together its limit, where all of them weigh full.
        limit = schedule.limit(0, stages, 2 * stages)
        ahead = [stages - stage if isinstance(schedule, ZBH1) else limit - 2 * stage for stage in range(stages)]
        return tuple(
            min(microbatches, now) + weight_activations * min(max(microbatches - now, 0), limit - now) for now in ahead
        )
    filled = type(schedule) is ZBV and microbatches >= 2 * stages - 1
    if filled or type(schedule) in (ForwardOnly, GPipe, OneFOneB, Interleaved1F1B):
        # These reach their limits while the pipeline fills, when there are no weight gradients yet.
        return tuple(schedule.limit(stage, stages, microbatches) / schedule.chunks for stage in range(stages))
    orders = resolve(schedule, stages, microbatches).orders
    return tuple(max(holding(order, weight_activations)) / schedule.chunks for order in orders)


def _scalars(times: Times) -> tuple[float, float, float, float]:
    return cast(
        tuple[float, float, float, float],
        (times.forward, times.backward_input, times.backward_weight, times.communication),
    )


def _short_enough(schedule: Schedule, times: Times) -> bool:
    """Whether transfers are too short to open paths other than those written down."""
    forward, inputs, weights, transfer = _scalars(times)
    if isinstance(schedule, Interleaved1F1B):
        return transfer * schedule.chunks <= min(forward, inputs + weights)
    if isinstance(schedule, ZBH2):
        return 2 * transfer <= min(forward + inputs, weights)
    if isinstance(schedule, ZBV):
        return 8 * transfer <= min(forward, inputs, weights)
    return True


@functools.lru_cache(maxsize=4096)
def _paths(schedule: Schedule, stages: int, microbatches: int) -> _Paths | None:
    find = _PATHS.get(type(schedule))
    if find is None or stages < 1 or microbatches < 1:
        return None  # the simulator says what is wrong
    if stages == 1:
        work, backward = microbatches * schedule.chunks, not isinstance(schedule, ForwardOnly)
        only = (Path(work, work * backward, work * backward, 0),)
        return _Paths(only, only)
    return find(schedule, stages, microbatches)


def _one_path(each: int, transfers: int) -> _Paths:
    """As many tasks of each kind, whatever the times."""
    path = (Path(each, each, each, transfers),)
    return _Paths(path, path)


def _forward_only(schedule: Schedule, p: int, m: int) -> _Paths:
    return _Paths((Path(m, 0, 0, 0),), (Path(m + p - 1, 0, 0, p - 1),))


def _gpipe(schedule: Schedule, p: int, m: int) -> _Paths:
    """Down once, filling; up once, draining."""
    return _one_path(m + p - 1, 2 * (p - 1))


def _zigzags(p: int, m: int) -> int:
    """The transfers on 1F1B's only path.

    It goes down to the last stage and back up, which moves it on by p microbatches, and again, until fewer are left;
    for those it turns back halfway.
    """
    full, rest = divmod(m + p - 1, p)
    return 2 * (p - 1) * full + 2 * max(rest - 1, 0)


def _one_f_one_b(schedule: Schedule, p: int, m: int) -> _Paths:
    return _one_path(m + p - 1, _zigzags(p, m))


def _interleaved(schedule: Schedule, p: int, m: int) -> _Paths | None:
    """The first microbatch's way through all pieces and the last one's back through all, the full pipeline between."""
    if m % p:
        return None
    v = schedule.chunks
    return _one_path(v * m + p - 1, 2 * (v * p - 1))


def _zb_h1(schedule: Schedule, p: int, m: int) -> _Paths | None:
    if m < p:
        return None
    n = m + p - 1  # all microbatches, and the pipeline to be filled or drained once
    zigzags, once = _zigzags(p, m), -(-n // p)
    both_ends = [
        # Twice down and up, the last stage's weight gradients between them.
        Path(n, n, m - p + 1, min(zigzags, 4 * (p - 1))),
        # 1F1B's path, with a weight gradient at each turn: longer where two transfers take longer than one of those.
        Path(n, n, min(once, m - p + 1), zigzags),
    ]
    # The first stage's work without a pause but for the first gradient, which has to come up the stages.
    first_stage = Path(m, n, m, 2 * (p - 1))
    # To the last stage's end rather than the first's: its weight gradients in place of the way back up.
    to_last = [Path(f, i - p + 1, w + p - 1, t - p + 1) for f, i, w, t in both_ends]
    return _Paths((*both_ends, first_stage), (*both_ends, first_stage, *to_last))


def _zb_h2(schedule: Schedule, p: int, m: int) -> _Paths | None:
    if m < 2 * p - 1:
        return None
    n, e = m + p - 1, p - 1
    to_first = (Path(n, n, m - 2 * e, 2 * e), Path(m - e, n, m, 2 * e))
    return _Paths((*to_first, Path(m, m, m, 0)), (*to_first, Path(n, m, m, e)))


def _zb_v(schedule: Schedule, p: int, m: int) -> _Paths | None:
    """How much a path has of each beyond the work of one stage (2m of each kind), in stages that follow the first.

    Found by following the longest paths of simulations over five decades of times; every one is linear in the number
    of stages, and none depends on the number of microbatches.
    """
    if m < 2 * p or p < 3:
        return None
    e = p - 1

    def paths(*beyond: tuple[int, int, int, int]) -> tuple[Path, ...]:
        return tuple(Path(2 * m + f, 2 * m + i, 2 * m + w, t) for f, i, w, t in beyond)

    shared = (
        (0, 2 * e, -2 * e, 6 * e - 2),
        (e - 1, e + 1, -2 * e, 6 * e - 2),
        (2 * e - 1, 1, -2 * e, 4 * e - 2),
        (2 * e, 0, -2 * e - 1, 4 * e),
    )
    to_total = (
        (-e, 1, e - 1, 2 * e),
        (-e, e, 0, 4 * e - 2),
        (1 - e, 0, e - 1, 2 * e - 2),
        (-1, 1, 0, 4 * e - 2),
        (e - 1, 1 - e, 0, 2 * e - 2),
        (e, 0, -e, 4 * e),
        (2 * e, -e, -e, 2 * e),
    )
    to_makespan = (
        (0, 1, e - 1, 3 * e),
        (0, e, 0, 5 * e - 2),
        (1, 0, e - 1, 3 * e - 2),
        (e - 1, 1, 0, 5 * e - 2),
        (2 * e - 1, 1 - e, 0, 3 * e - 2),
        (2 * e, -e, -1, 3 * e),
    )
    return _Paths(paths(*shared, *to_total), paths(*shared, *to_makespan))


_PATHS: dict[type[Schedule], Callable[[Schedule, int, int], _Paths | None]] = {
    ForwardOnly: _forward_only,
    GPipe: _gpipe,
    OneFOneB: _one_f_one_b,
    Interleaved1F1B: _interleaved,
    ZBH1: _zb_h1,
    ZBH2: _zb_h2,
    ZBV: _zb_v,
}
