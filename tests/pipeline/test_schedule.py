"""Schedules are values, and their orders are those of the papers."""

import dataclasses

import pytest

from tbjax.pipeline.graph import holding
from tbjax.pipeline.schedule import (
    NAMED,
    ZBH1,
    ZBH2,
    ZBV,
    ForwardOnly,
    GPipe,
    Interleaved1F1B,
    Kind,
    OneFOneB,
    named,
)

ALL = [GPipe(), OneFOneB(), Interleaved1F1B(1), Interleaved1F1B(3), ZBH1(), ZBH2(), ZBV(), ForwardOnly()]


def spelled(order):
    """As in the papers' figures: letter and microbatch, small letters for the second chunk."""
    return " ".join(
        (task.kind.letter.lower() if task.chunk else task.kind.letter) + str(task.microbatch) for task in order
    )


def test_gpipe_runs_all_forwards_first():
    assert [spelled(order) for order in GPipe().tasks(2, 3)] == ["F0 F1 F2 B0 B1 B2"] * 2


def test_1f1b_runs_fewer_ahead_the_later_the_stage():
    first, second, third = OneFOneB().tasks(3, 4)
    assert spelled(first) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert spelled(second) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert spelled(third) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert all(task.kind in (Kind.FORWARD, Kind.BACKWARD) for task in first)


def test_interleaved_sends_groups_through_the_chunks_in_turn():
    first, last = Interleaved1F1B(2).tasks(2, 4)
    assert spelled(first) == "F0 F1 f0 f1 F2 b0 F3 b1 f2 B0 f3 B1 b2 b3 B2 B3"
    assert spelled(last) == "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3"


def test_zero_bubble_schedules_put_off_weight_gradients_on_later_stages():
    assert spelled(ZBH1().tasks(3, 4)[0]) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert spelled(ZBH1().tasks(3, 4)[2]) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"
    assert spelled(ZBH2().tasks(2, 4)[0]) == "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3"
    assert spelled(ZBH2().tasks(2, 4)[1]) == "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3"


def test_zb_v_goes_down_the_stages_and_comes_back_up():
    schedule = ZBV()
    assert [[schedule.position(stage, chunk, 3) for chunk in (0, 1)] for stage in range(3)] == [[0, 5], [1, 4], [2, 3]]
    first, last = schedule.tasks(2, 3)
    assert spelled(first) == "F0 F1 F2 f0 b0 w0 f1 b1 w1 B0 W0 f2 b2 w2 B1 W1 B2 W2"
    assert spelled(last) == "F0 f0 F1 f1 b0 w0 F2 B0 W0 f2 b1 w1 B1 b2 B2 W1 w2 W2"


def test_forward_only_has_no_backward_and_holds_one():
    assert [spelled(order) for order in ForwardOnly().tasks(2, 3)] == ["F0 F1 F2"] * 2
    assert holding(ForwardOnly().tasks(1, 3)[0]) == [1, 1, 1]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_are_frozen_values(schedule):
    assert schedule == dataclasses.replace(schedule)
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.chunks = 5


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize(("stages", "microbatches"), [(0, 4), (-1, 4), (4, 0), (2.0, 4), (4, True), ("4", 4)])
def test_counts_are_positive_integers(schedule, stages, microbatches):
    with pytest.raises(ValueError, match="must be a positive integer, not"):
        schedule.tasks(stages, microbatches)


@pytest.mark.parametrize(("microbatches", "advice"), [(6, "4 or 8 would do"), (3, "; 4 would do"), (1, "; 4 would do")])
def test_interleaved_says_which_numbers_of_microbatches_would_do(microbatches, advice):
    with pytest.raises(ValueError, match=rf"microbatches={microbatches} is not a multiple of stages=4.*{advice}"):
        Interleaved1F1B(2).tasks(4, microbatches)


def test_chunks_are_a_positive_integer():
    with pytest.raises(ValueError, match="chunks must be a positive integer, not 0"):
        Interleaved1F1B(0)


def test_schedules_are_found_by_name():
    assert [named(name).name for name in NAMED] == list(NAMED)
    assert named("interleaved", 3) == Interleaved1F1B(3)
    assert named("interleaved") == Interleaved1F1B(2)
    assert named("zb-v", 2) == ZBV()
    assert named("1f1b", 1) == OneFOneB()
    with pytest.raises(ValueError, match="'pipedream' is unknown: tbjax knows gpipe, 1f1b"):
        named("pipedream")
    with pytest.raises(ValueError, match="chunks=2: the gpipe schedule has 1"):
        named("gpipe", 2)
