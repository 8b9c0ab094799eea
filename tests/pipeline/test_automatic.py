"""The search's schedules can be run, keep to the memory, and are never worse than the patterns drawn by hand."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.pipeline.automatic import Automatic
from tbjax.pipeline.graph import check
from tbjax.pipeline.schedule import ZBH1, ZBH2, OneFOneB
from tbjax.pipeline.simulate import Times, simulate
from tests.pipeline.cases import uneven_times, uniform_times
from tests.pipeline.test_simulate import PUBLISHED


@st.composite
def problems(draw):
    stages, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    return stages, microbatches, draw(st.one_of(uniform_times(), uneven_times((stages,))))


@settings(max_examples=60)
@given(problems(), st.floats(0, 1), st.sampled_from(["total", "makespan"]))
def test_it_is_never_worse_than_zero_bubble_in_the_same_memory(problem, part, objective):
    stages, microbatches, times = problem
    for schedule, memory in ((ZBH1(), stages), (ZBH2(), 2 * stages - 1), (OneFOneB(), stages)):
        automatic = Automatic(times, memory, part, objective)
        found = simulate(automatic, stages, microbatches, times, weight_activations=part)
        drawn = simulate(schedule, stages, microbatches, times, weight_activations=part)
        assert getattr(found, objective) <= getattr(drawn, objective) + 1e-9
        assert max(found.peak_activations) <= memory + 1e-6


@settings(max_examples=60)
@given(problems(), st.floats(1, 12), st.floats(0, 1))
def test_any_memory_is_kept_to(problem, memory, part):
    stages, microbatches, times = problem
    automatic = Automatic(times, memory, part)
    check(automatic, stages, microbatches)
    timeline = simulate(automatic, stages, microbatches, times, weight_activations=part)
    assert max(timeline.peak_activations) <= memory + 1e-6


def test_measured_times_leave_hardly_a_bubble_with_room_for_twice_1f1b():
    """On each row of the published measurements with p = 8, weight gradients holding half of the activations."""
    with PUBLISHED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["stages"] == "8"]
    assert rows
    for row in rows:
        times = Times(
            forward=float(row["t_forward_ms"]),
            backward_input=float(row["t_backward_input_ms"]),
            backward_weight=float(row["t_backward_weight_ms"]),
            communication=float(row["t_comm_ms"]),
        )
        timeline = simulate(Automatic(times, 16, 0.5), 8, int(row["microbatches"]), times, weight_activations=0.5)
        assert timeline.bubble_rate < 0.05 * float(row["bubble_zb_h2"])


def test_more_room_is_used():
    times = Times(forward=1, backward_input=1.2, backward_weight=0.7, communication=0.05)
    rates = [simulate(Automatic(times, memory), 4, 12, times).bubble_rate for memory in (1, 2, 4, 7, None)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < rates[2] / 2 < rates[0] / 4


def test_what_is_asked_for_is_possible():
    times = Times(forward=1, backward_input=1, backward_weight=1)
    with pytest.raises(ValueError, match=r"memory=0.5: a stage needs room for one microbatch"):
        Automatic(times, 0.5)
    with pytest.raises(ValueError, match="weight_activations=2 is a part"):
        Automatic(times, 4, 2)
    with pytest.raises(ValueError, match="objective='speed' is unknown: 'total' or 'makespan'"):
        Automatic(times, 4, 1.0, "speed")
    with pytest.raises(ValueError, match="one chunk a stage: 3 times were given, not 4"):
        Automatic(Times(forward=(1, 2, 3), backward_input=1, backward_weight=1), 4).tasks(4, 8)
    with pytest.raises(ValueError, match="microbatches must be a positive integer, not 0"):
        Automatic(times, 4).tasks(4, 0)
