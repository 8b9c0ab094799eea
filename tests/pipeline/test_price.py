"""The closed forms are the simulator's answers, and where there is none the simulator is asked."""

import dataclasses

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tbjax.pipeline import price as prices
from tbjax.pipeline.price import price
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, GPipe, Interleaved1F1B, OneFOneB
from tbjax.pipeline.simulate import Times, simulate
from tests.pipeline.cases import schedules, simulations

UNIT = Times(forward=1, backward_input=1, backward_weight=1)


@st.composite
def unlike_times(draw):
    """Uniform over the stages; the kinds of task may differ a thousandfold, or hardly."""
    decades = draw(st.sampled_from([0.1, 1.5]))
    forward, inputs, weights = (10 ** draw(st.floats(-decades, decades)) for _ in range(3))
    transfer = draw(st.sampled_from([0, 0.01, 0.1, 3])) * draw(st.floats(0, 1)) * min(forward, inputs, weights)
    return Times(forward=forward, backward_input=inputs, backward_weight=weights, communication=transfer)


def assert_simulated(found, case, times, part):
    timeline = simulate(*case, times, weight_activations=part)
    assert found.total == pytest.approx(timeline.total, rel=1e-9)
    assert found.makespan == pytest.approx(timeline.makespan, rel=1e-9)
    assert found.bubble_rate == pytest.approx(timeline.bubble_rate, abs=1e-9)
    assert found.peak_activations == pytest.approx(timeline.peak_activations, abs=1e-9)


@settings(max_examples=400)
@given(schedules(), unlike_times(), st.floats(0, 1))
def test_prices_are_those_of_the_simulator(case, times, part):
    closed = prices._paths(*case) is not None and prices._short_enough(case[0], times)
    event(f"{case[0].name}: {'closed form' if closed else 'simulated'}")
    assert_simulated(price(*case, times, weight_activations=part), case, times, part)


@settings(max_examples=100)
@pytest.mark.parametrize("schedule", [ZBH1(), ZBH2(), ZBV(), Interleaved1F1B(2)], ids=repr)
@given(stages=st.integers(3, 7), more=st.integers(0, 3), times=unlike_times())
def test_full_pipelines_are_priced_without_simulating(schedule, stages, more, times):
    times = dataclasses.replace(times, communication=min(times.communication, _least(times) / 8))
    case = (schedule, stages, stages * (2 + more))
    assert prices._paths(*case) is not None
    assert prices._short_enough(schedule, times)
    assert_simulated(price(*case, times), case, times, 1.0)


@given(simulations())
def test_unequal_stages_are_simulated(case):
    *what, times = case
    assert_simulated(price(*what, times), what, times, 1.0)


def test_a_closed_form_does_not_build_the_schedule():
    # A million microbatches: the tasks alone would take gigabytes.
    found = price(OneFOneB(), 64, 1_000_000, UNIT)
    assert found.total == 3 * (1_000_000 + 63)
    assert found.peak_activations[0] == 64


def test_what_is_wrong_is_said_by_the_simulator():
    with pytest.raises(ValueError, match="microbatches=6 is not a multiple of stages=4"):
        price(Interleaved1F1B(2), 4, 6, UNIT)
    with pytest.raises(ValueError, match="stages must be a positive integer, not 0"):
        price(GPipe(), 0, 6, UNIT)
    with pytest.raises(ValueError, match="takes no time at all"):
        price(GPipe(), 2, 6, Times(forward=0, backward_input=0, backward_weight=0))
    with pytest.raises(ValueError, match=r"weight_activations=-0.5 is a part"):
        price(ZBH1(), 2, 6, UNIT, weight_activations=-0.5)


def _least(times):
    return min(times.forward, times.backward_input, times.backward_weight)
