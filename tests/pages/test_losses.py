"""The curve of a run: the line goes through what was measured, and what is no number is a gap."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.pages.losses import MOST_POINTS, Curve, page, rungs

finite = st.floats(0, 100, allow_subnormal=False)


def lines(curve):
    found = re.findall(r'<polyline points="([^"]*)"', curve.svg())
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in found]


@given(finite, finite)
def test_the_numbers_beside_the_curve_are_round_and_around_it(one, other):
    low, high = sorted([one, other])
    found = rungs(low, high)
    assert found[0] <= low + 1e-9 * max(1, low)
    assert found[-1] >= high - 1e-9 * max(1, high)
    assert 2 <= len(found) <= 8


def test_losses_that_differ_by_their_rounding_are_level():
    assert rungs(2.5, 2.5 + 1e-12) == pytest.approx(rungs(2.5, 2.5), rel=1e-5)


def test_an_evaluation_of_another_part_of_the_run_is_not_drawn():
    curve = Curve([3.0, 2.0, 1.0], {0: 9.0, 11: 2.0, 20: 0.1}, first=10)
    assert curve.evaluations == {11: 2.0}
    assert curve.rungs[-1] <= 4


def test_a_lower_loss_is_drawn_lower_and_a_later_step_further_right():
    ((first, second, third),) = lines(Curve([3.0, 1.0, 2.0], {}))
    assert first[0] < second[0] < third[0]
    assert first[1] < third[1] < second[1]  # SVG counts downwards


def test_a_loss_that_is_no_number_is_a_gap_and_one_alone_is_a_point():
    before, after = lines(Curve([3.0, 2.0, math.nan, 1.0], {}))
    assert len(before) == 2
    assert after[0] == after[1]
    assert lines(Curve([math.nan, math.inf], {})) == []


def test_a_long_run_is_drawn_by_means_of_neighbours():
    losses = [float(step % 2) for step in range(10 * MOST_POINTS)]
    curve = Curve(losses, {}, first=7)
    assert len(curve.points) == MOST_POINTS
    assert {loss for _, loss in curve.points} == {0.5}
    assert "the mean of 10 steps" in page(curve, "a run")


@pytest.mark.parametrize("losses", [[], [2.5]])
def test_a_run_of_one_step_or_none_has_a_page_too(losses, tmp_path):
    made = page(Curve(losses, {1: 2.0} if losses else {}), "a <run>", tmp_path / "run.html")
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == made
    assert "A &lt;run&gt;" in made
    assert made.count("<circle") == len(losses)
