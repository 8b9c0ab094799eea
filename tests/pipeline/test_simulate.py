"""The simulator: the published figures to their last digit, the papers' formulas, and what holds for all times."""

import csv
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, ForwardOnly, GPipe, Interleaved1F1B, Kind, OneFOneB
from tbjax.pipeline.simulate import Times, simulate
from tests.pipeline.cases import DURATION, schedules, simulations, uniform_times

PUBLISHED = Path(__file__).parent.parent / "data" / "pipeline_bubbles.csv"
UNIT = Times(forward=1, backward_input=1, backward_weight=1)


def published():
    """Qi et al. 2024, the inputs of Table 9 and the bubble rates of Table 5, each schedule on its own."""
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            times = Times(
                forward=float(row["t_forward_ms"]),
                backward_input=float(row["t_backward_input_ms"]),
                backward_weight=float(row["t_backward_weight_ms"]),
                communication=float(row["t_comm_ms"]),
            )
            contenders = {
                "1f1b": OneFOneB(),
                "interleaved": Interleaved1F1B(int(row["chunks"])),
                "zb_h1": ZBH1(),
                "zb_h2": ZBH2(),
            }
            for name, schedule in contenders.items():
                stages, microbatches = int(row["stages"]), int(row["microbatches"])
                case = (schedule, stages, microbatches, times, row[f"bubble_{name}"])
                yield pytest.param(*case, id=f"{row['model']}-{microbatches}-{name}")


@pytest.mark.parametrize(("schedule", "stages", "microbatches", "times", "bubble"), list(published()))
def test_published_bubble_rates_come_out_to_all_four_decimals(schedule, stages, microbatches, times, bubble):
    timeline = simulate(schedule, stages, microbatches, times, wraps="first")
    assert f"{timeline.bubble_rate:.4f}" == bubble
    if not isinstance(schedule, Interleaved1F1B):
        assert simulate(schedule, stages, microbatches, times) == timeline


@given(st.integers(2, 8), st.integers(1, 4), st.integers(2, 4), uniform_times(), st.floats(0, 1))
def test_interleaved_as_published_is_its_formula_and_a_transfer_a_stage_short(stages, groups, chunks, times, part):
    # Transfers that are short beside the work of a chunk; longer ones take other paths to the end.
    longest = min(times.forward, times.backward_input + times.backward_weight) / (2 * stages * chunks**2)
    times = dataclasses.replace(times, communication=part * longest)
    microbatches, transfer = stages * groups, times.communication
    once = times.forward + times.backward_input + times.backward_weight
    formula = microbatches * once + (stages - 1) * once / chunks + ((2 * chunks - 1) * stages - 2) * transfer
    case = (Interleaved1F1B(chunks), stages, microbatches, times)
    assert simulate(*case, wraps="first").total == pytest.approx(formula, rel=1e-9)
    assert simulate(*case).total == pytest.approx(formula + stages * transfer, rel=1e-9)


@given(schedules(), uniform_times())
def test_waiting_for_every_wrap_takes_no_less_time(case, times):
    assert simulate(*case, times).total >= simulate(*case, times, wraps="first").total - 1e-9


# The table of properties: idle time and the most activations held, for T = tF + tB + tW and no transfers.
FORMULAS = [
    (GPipe(), lambda p, m, f, b, w: (p - 1) * (f + b + w), lambda p, m: m),
    (OneFOneB(), lambda p, m, f, b, w: (p - 1) * (f + b + w), lambda p, m: p),
    (Interleaved1F1B(2), lambda p, m, f, b, w: (p - 1) * (f + b + w) / 2, lambda p, m: p * (1 + (p - 1) / (2 * p))),
    (Interleaved1F1B(3), lambda p, m, f, b, w: (p - 1) * (f + b + w) / 3, lambda p, m: p * (1 + (p - 1) / (3 * p))),
    (ZBH1(), lambda p, m, f, b, w: (p - 1) * (f + b - w), lambda p, m: p),
    (ZBH2(), lambda p, m, f, b, w: (p - 1) * (f + b - 2 * w), lambda p, m: 2 * p - 1),
]


@pytest.mark.parametrize(("schedule", "idle", "peak"), FORMULAS, ids=[repr(row[0]) for row in FORMULAS])
@given(stages=st.integers(1, 8), groups=st.integers(2, 5), times=uniform_times())
def test_idle_time_and_activations_are_those_of_the_papers(schedule, idle, peak, stages, groups, times):
    microbatches = stages * groups
    f, b = times.forward, times.backward_input
    # The zero-bubble formulas are for weight gradients no longer than what they are to fill.
    w = min(times.backward_weight, f, b) if schedule in (ZBH1(), ZBH2()) else times.backward_weight
    times = dataclasses.replace(times, backward_weight=w, communication=0)
    timeline = simulate(schedule, stages, microbatches, times)
    assert timeline.total - microbatches * (f + b + w) == pytest.approx(
        idle(stages, microbatches, f, b, w), abs=1e-9 * timeline.total
    )
    assert max(timeline.peak_activations) == pytest.approx(peak(stages, microbatches))


@given(st.integers(1, 8), st.integers(1, 20))
def test_1f1b_holds_fewer_the_later_the_stage(stages, microbatches):
    peaks = simulate(OneFOneB(), stages, microbatches, UNIT).peak_activations
    assert peaks == tuple(min(stages - stage, microbatches) for stage in range(stages))


@given(st.integers(1, 10), st.integers(0, 12), DURATION)
def test_zb_v_has_no_bubble_in_1f1b_memory_where_all_take_equally_long(stages, more, duration):
    times = Times(forward=duration, backward_input=duration, backward_weight=duration)
    timeline = simulate(ZBV(), stages, 2 * stages - 1 + more, times)
    assert timeline.bubble_rate == pytest.approx(0, abs=1e-9)
    assert max(timeline.peak_activations) == stages


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16), st.floats(0, 1))
def test_what_weight_gradients_hold_counts_for_its_part(ahead, stages, microbatches, part):
    timeline = simulate(ZBH1(), stages, microbatches, UNIT, weight_activations=part)
    for stage, peak in enumerate(timeline.peak_activations):
        first = min(stages - stage, microbatches)
        assert first - 1e-9 <= peak <= first + part * stage + 1e-9
    if microbatches >= 2 * stages:
        assert timeline.peak_activations[-1] == pytest.approx(1 + part * (stages - 1))


@given(simulations())
def test_every_task_starts_as_soon_as_it_may_and_no_sooner(case):
    schedule, stages, _, times = case
    timeline = simulate(*case)
    last = stages * schedule.chunks - 1
    send = times.communication if isinstance(times.communication, tuple) else (times.communication,) * stages
    done = {}  # (is a forward, position, microbatch) -> end, stage
    for stage, row in enumerate(timeline.tasks):
        for task, _, end in row:
            if task.kind is not Kind.BACKWARD_WEIGHT:
                position = schedule.position(stage, task.chunk, stages)
                done[task.kind is Kind.FORWARD, position, task.microbatch] = (end, stage)
    for stage, row in enumerate(timeline.tasks):
        free = 0.0
        for task, start, end in row:
            arrived, forward = 0.0, task.kind is Kind.FORWARD
            position = schedule.position(stage, task.chunk, stages)
            source = position - 1 if forward else position + 1
            if task.kind is not Kind.BACKWARD_WEIGHT and 0 <= source <= last:
                produced, sender = done[forward, source, task.microbatch]
                arrived = produced + (send[sender] if sender != stage else 0)
            if task.kind.sends_gradient:
                assert start >= done[True, position, task.microbatch][0] - 1e-6
            assert start == pytest.approx(max(free, arrived), abs=1e-6)
            assert end >= start
            free = end


@given(simulations())
def test_totals_are_between_the_least_and_the_most_possible(case):
    schedule, stages, microbatches, times = case
    timeline = simulate(*case)
    work = [sum(end - start for _, start, end in row) for row in timeline.tasks]
    chain = sum(end - start for row in timeline.tasks for task, start, end in row if task.microbatch == 0)
    transfers = times.communication if times.uniform else max(times.communication)
    assert max(work) - 1e-6 <= timeline.total <= timeline.makespan + 1e-6
    # One microbatch after the other, every result waited for, is the slowest way to do it.
    assert timeline.makespan <= sum(work) + microbatches * 2 * stages * schedule.chunks * transfers + 1e-6
    if not isinstance(schedule, ForwardOnly):
        weights = sum(
            end - start
            for row in timeline.tasks
            for task, start, end in row
            if task.microbatch == 0 and task.kind is Kind.BACKWARD_WEIGHT
        )
        assert timeline.makespan >= chain - weights - 1e-6  # the critical path of a single microbatch
    assert 0 <= timeline.bubble_rate < 1
    assert timeline.bubble_rate == pytest.approx(1 - sum(work) / (stages * timeline.total), abs=1e-9)


@given(schedules(), uniform_times())
def test_bubble_rate_is_the_papers_where_stages_are_alike(case, times):
    timeline = simulate(*case, times)
    once = times.forward
    if not isinstance(case[0], ForwardOnly):
        once += times.backward_input + times.backward_weight
    assert timeline.bubble_rate == pytest.approx((timeline.total - case[2] * once) / timeline.total, abs=1e-9)


@given(simulations(), st.floats(0.1, 10))
def test_time_has_no_unit(case, factor):
    *what, times = case

    def scaled(value):
        return tuple(factor * figure for figure in value) if isinstance(value, tuple) else factor * value

    fields = {field.name: scaled(getattr(times, field.name)) for field in dataclasses.fields(times)}
    before, after = simulate(*what, times), simulate(*what, Times(**fields))
    assert after.total == pytest.approx(factor * before.total, rel=1e-6)
    assert after.bubble_rate == pytest.approx(before.bubble_rate, abs=1e-6)
    assert after.peak_activations == before.peak_activations


@given(simulations(), st.sampled_from(["forward", "backward_input", "backward_weight", "communication"]))
def test_nothing_ends_sooner_when_something_takes_longer(case, name):
    *what, times = case
    value = getattr(times, name)
    longer = tuple(1.5 * figure for figure in value) if isinstance(value, tuple) else 1.5 * value
    assert simulate(*what, dataclasses.replace(times, **{name: longer})).makespan >= simulate(*case).makespan - 1e-6


@given(simulations())
def test_a_single_stage_is_never_idle(case):
    schedule, _, microbatches, times = case
    if times.uniform:
        timeline = simulate(schedule, 1, microbatches, times)
        assert timeline.bubble_rate == pytest.approx(0, abs=1e-9)
        assert timeline.total == timeline.makespan


def test_figures_may_be_given_for_stages_or_for_pieces():
    by_stage = Times(forward=(2, 4), backward_input=(2, 4), backward_weight=0)
    by_piece = Times(forward=(1, 2, 1, 2), backward_input=(1, 2, 1, 2), backward_weight=0)
    assert simulate(Interleaved1F1B(2), 2, 4, by_stage).ends == simulate(Interleaved1F1B(2), 2, 4, by_piece).ends
    in_a_v = Times(forward=(1, 2, 2, 1), backward_input=(1, 2, 2, 1), backward_weight=0)
    assert simulate(ZBV(), 2, 4, by_stage).ends == simulate(ZBV(), 2, 4, in_a_v).ends


def test_one_slow_stage_sets_the_pace():
    slow = Times(forward=(1, 5, 1), backward_input=(1, 5, 1), backward_weight=(1, 5, 1))
    timeline = simulate(OneFOneB(), 3, 50, slow)
    assert 50 * 15 <= timeline.total <= 50 * 15 + 2 * 6
    assert timeline.bubble_rate == pytest.approx(1 - 50 * (3 + 15 + 3) / (3 * timeline.total))


def test_results_are_kept():
    first = simulate(ZBH2(), 4, 8, Times(forward=1, backward_input=2, backward_weight=1))
    assert simulate(ZBH2(), 4, 8, Times(forward=1, backward_input=2, backward_weight=1)) is first


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "1", None, (1, -1)])
@pytest.mark.parametrize("name", ["forward", "backward_input", "backward_weight", "communication"])
def test_times_are_finite_numbers(name, wrong):
    with pytest.raises(ValueError, match=rf"Times.{name}=.*finite numbers, zero or more"):
        dataclasses.replace(UNIT, **{name: wrong})


def test_what_is_asked_for_is_possible():
    with pytest.raises(ValueError, match=r"Times.forward has 3 figures: give one, or 4 for stages=4"):
        simulate(OneFOneB(), 4, 8, dataclasses.replace(UNIT, forward=(1, 2, 3)))
    with pytest.raises(ValueError, match="has 3 figures: give one, or 4 for stages=4 or 8 for its pieces"):
        simulate(ZBV(), 4, 8, dataclasses.replace(UNIT, forward=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"Times.communication has 2 figures: give one, or 4"):
        simulate(OneFOneB(), 4, 8, dataclasses.replace(UNIT, communication=(1, 2)))
    with pytest.raises(ValueError, match="takes no time at all"):
        simulate(OneFOneB(), 4, 8, Times(forward=0, backward_input=0, backward_weight=0))
    with pytest.raises(ValueError, match=r"weight_activations=1.5 is a part"):
        simulate(ZBH1(), 4, 8, UNIT, weight_activations=1.5)
    with pytest.raises(ValueError, match="wraps='none' is unknown: 'all' or 'first'"):
        simulate(ZBH1(), 4, 8, UNIT, wraps="none")
