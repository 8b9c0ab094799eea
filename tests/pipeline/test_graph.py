"""One check for every schedule, a user's own too: what passes can run, what cannot run is refused by name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.pipeline.graph import NONE, ScheduleError, check, holding, resolve
from tbjax.pipeline.schedule import ZBH1, ForwardOnly, GPipe, Interleaved1F1B, Kind, OneFOneB, Order, Schedule, Task
from tests.pipeline.cases import schedules

LETTERS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "I": Kind.BACKWARD_INPUT, "W": Kind.BACKWARD_WEIGHT}


@dataclasses.dataclass(frozen=True)
class Own(Schedule):
    """A schedule such as a user would write: one line for each stage, `I` for the input's gradient alone."""

    lines: tuple[str, ...]
    at_most: int | None = None
    name = "own"

    def tasks(self, stages, microbatches) -> tuple[Order, ...]:
        return tuple(tuple(Task(LETTERS[word[0]], 0, int(word[1:])) for word in line.split()) for line in self.lines)

    def limit(self, stage, stages, microbatches):
        return microbatches if self.at_most is None else self.at_most


def own(*lines, at_most=None):
    return Own(lines, at_most)


@given(schedules())
def test_every_schedule_passes_for_all_numbers_that_it_serves(case):
    schedule, stages, microbatches = case
    graph = resolve(schedule, stages, microbatches)
    per_microbatch = {GPipe: 2, OneFOneB: 2, Interleaved1F1B: 2, ForwardOnly: 1}.get(type(schedule), 3)
    assert len(graph.stage) == stages * microbatches * schedule.chunks * per_microbatch
    assert len(set(zip(graph.kind, graph.position, graph.microbatch, strict=True))) == len(graph.stage)


@given(schedules())
def test_tasks_of_a_graph_come_after_what_they_wait_for(case):
    schedule, stages, microbatches = case
    graph = resolve(schedule, stages, microbatches)
    for index, producer in enumerate(graph.producer):
        kind, position = graph.kind[index], graph.position[index]
        ends = {Kind.FORWARD: 0, Kind.BACKWARD_WEIGHT: position}.get(kind, stages * schedule.chunks - 1)
        if producer == NONE:  # at the model's input or its loss, or in want of nothing from elsewhere
            assert position == ends
            continue
        assert producer < index
        assert graph.microbatch[producer] == graph.microbatch[index]
        assert graph.position[producer] == position + (-1 if kind is Kind.FORWARD else 1)
        assert graph.sender[index] in (NONE, graph.stage[producer])
        assert (graph.sender[index] == NONE) == (graph.stage[producer] == graph.stage[index])
    for indices in graph.indices:
        assert list(indices) == sorted(indices)


@given(schedules(), st.floats(0, 1))
def test_what_a_stage_holds_is_bounded_and_all_let_go(case, weight_activations):
    schedule, stages, microbatches = case
    for stage, order in enumerate(resolve(schedule, stages, microbatches).orders):
        held = holding(order, weight_activations)
        assert max(held) <= schedule.limit(stage, stages, microbatches) + 1e-9
        assert min(held) > -1e-9
        assert held[-1] <= 1 + 1e-9  # the last task's own


@given(st.integers(1, 8), st.integers(1, 30))
def test_limits_without_weight_gradients_to_put_off_are_reached(stages, microbatches):
    for schedule in (GPipe(), OneFOneB(), ForwardOnly()):
        for stage, order in enumerate(resolve(schedule, stages, microbatches).orders):
            assert max(holding(order)) == schedule.limit(stage, stages, microbatches)


@settings(max_examples=50)
@given(st.randoms(), st.integers(2, 4), st.integers(1, 5))
def test_a_shuffled_order_is_refused_or_runs(random, stages, microbatches):
    """Whatever is accepted has each task after all that it needs; whatever is refused says which stage is at fault."""
    lines = []
    for order in ZBH1().tasks(stages, microbatches):
        words = [f"{'FBIW'[task.kind]}{task.microbatch}" for task in order]
        i, j = random.randrange(len(words)), random.randrange(len(words))
        words[i], words[j] = words[j], words[i]
        lines.append(" ".join(words))
    try:
        graph = resolve(own(*lines), stages, microbatches)
    except ScheduleError as error:
        assert "stage" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        run = set()
        for kind, position, microbatch in zip(graph.kind, graph.position, graph.microbatch, strict=True):
            needs = {
                Kind.FORWARD: [(Kind.FORWARD, position - 1)] if position else [],
                Kind.BACKWARD_INPUT: [(Kind.FORWARD, position)]
                + ([(Kind.BACKWARD_INPUT, position + 1)] if position + 1 < stages else []),
                Kind.BACKWARD_WEIGHT: [(Kind.BACKWARD_INPUT, position)],
            }[kind]
            assert all((*need, microbatch) in run for need in needs)
            run.add((kind, position, microbatch))


def test_a_users_own_schedule_may_mix_whole_and_split_backwards():
    check(own("F0 F1 B0 I1 W1", "F0 B0 F1 I1 W1"), 2, 2)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (own("F0 B0"), "has tasks for 1 stages, not for stages=2"),
        (own("F0 B0", "F0"), "stage 1: backward of microbatch 0 .chunk 0. is missing"),
        (own("F0 I0", "F0 B0"), "stage 0: backward-weight of microbatch 0 .chunk 0. is missing"),
        (own("F0 B0", ""), "stage 1: forward of microbatch 0 .chunk 0. is missing"),
        (own("F0 F0 B0", "F0 B0"), "stage 0: forward of microbatch 0 .chunk 0. is there twice"),
        (own("F0 B0", "B0 F0"), "stage 1: backward of microbatch 0 .* comes before the forward that it needs"),
        (own("F0 W0 I0", "F0 B0"), "stage 0: backward-weight .* comes before the backward-input that it needs"),
        (own("F0 B0 I0 W0", "F0 B0"), "both a whole backward and a split one"),
        (own("F0 B0 F1", "F0 B0"), "stage 0: there is no forward of microbatch 1"),
        (own("F0 B0", "F0 B0", at_most=0), "stage 0 holds the activations of 1 chunks at once, more than the 0"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(schedule, says):
    with pytest.raises(ScheduleError, match=says):
        check(schedule, 2, 1)


def test_stages_that_wait_for_each_other_are_named():
    # The first stage wants the gradient of microbatch 0 before it sends 1; the second wants 1 before it sends that.
    with pytest.raises(ScheduleError, match=r"standstill: stage 0 waits to run the backward of microbatch 0.*stage 1"):
        check(own("F0 B0 F1 B1", "F0 F1 B1 B0"), 2, 2)
    with pytest.raises(ScheduleError, match="stage 1 waits to run the forward of microbatch 1"):
        check(own("F0 B0 F1 B1", "F0 F1 B1 B0"), 2, 2)


def test_pieces_of_the_model_lie_in_one_place_each():
    @dataclasses.dataclass(frozen=True)
    class Misplaced(OneFOneB):
        def position(self, stage, chunk, stages):
            return 0

    with pytest.raises(ScheduleError, match=r"places the 2 pieces of the model at \[\[0\], \[0\]\]"):
        check(Misplaced(), 2, 2)
