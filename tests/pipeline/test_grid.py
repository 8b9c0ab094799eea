"""A grid keeps step with the simulator, and its slots hold what is in them exactly as long as it is needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.pipeline.graph import NONE, ScheduleError
from tbjax.pipeline.grid import IDLE, lay_out
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, GPipe, Kind, OneFOneB, Schedule, Task
from tbjax.pipeline.simulate import Times, simulate
from tests.pipeline.cases import schedules


@settings(max_examples=60, deadline=None)
@given(schedules(), st.booleans())
def test_a_grid_lasts_as_long_as_the_simulation_of_equal_tasks_without_transfers(case, saves):
    schedule, stages, microbatches = case
    grid = lay_out(schedule, stages, microbatches, saves=saves)
    split = Kind.BACKWARD_WEIGHT in grid.kinds
    half = schedule.chunks * (1 if split else 0.5)  # a whole backward is one task
    times = Times(forward=schedule.chunks, backward_input=half, backward_weight=half)
    timeline = simulate(schedule, stages, microbatches, times)
    assert grid.ticks == timeline.makespan
    assert grid.tasks == sum(map(len, timeline.tasks))


@settings(max_examples=60, deadline=None)
@given(schedules(), st.booleans())
def test_every_task_finds_in_its_slots_what_was_made_for_it(case, saves):
    """Plays the grid through with names in the place of arrays."""
    schedule, stages, microbatches = case
    grid = lay_out(schedule, stages, microbatches, saves=saves)
    cells, last = grid.cells, grid.pieces - 1
    forward_only = grid.kinds in ((Kind.FORWARD, IDLE), (Kind.FORWARD,))
    slots = [[None] * grid.slots for _ in range(stages)]
    kept = [[None] * grid.kept_slots for _ in range(stages)]
    splits = Kind.BACKWARD_WEIGHT in grid.kinds
    done = []
    for tick in range(grid.ticks):
        made = [None] * stages
        for stage in range(stages):
            cell = [int(column[tick, stage]) for column in cells]
            cell = type(cells)(*cell)
            if cell.kind == IDLE:
                continue
            position, microbatch = cell.position, cell.microbatch
            assert position == schedule.position(stage, cell.chunk, stages)
            done.append((cell.kind, position, microbatch))
            if cell.kind == Kind.FORWARD:
                made[stage] = ("activation", position, microbatch)
                if saves and position == last and not forward_only:
                    made[stage] = ("gradient", position + 1, microbatch)
                if saves and not forward_only:
                    kept[stage][cell.kept] = ("for the backward", position, microbatch)
            if cell.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
                if saves:
                    assert kept[stage][cell.kept] == ("for the backward", position, microbatch)
                made[stage] = ("gradient", position, microbatch)
                if saves or position < last:
                    assert slots[stage][cell.gradient] == ("gradient", position + 1, microbatch)
            if (cell.kind == Kind.FORWARD or (made[stage] and not saves)) and position > 0:
                assert slots[stage][cell.activation] == ("activation", position - 1, microbatch)
            if cell.kind == Kind.BACKWARD_INPUT:
                kept[stage][cell.kept] = ("for the weights", position, microbatch)
            if cell.kind == Kind.BACKWARD_WEIGHT:
                assert kept[stage][cell.kept] == ("for the weights", position, microbatch)
        for sender, receiver, column in (
            *((stage, stage, cells.own) for stage in range(stages)),
            *((*link, cells.from_before) for link in grid.down),
            *((*link, cells.from_after) for link in grid.up),
        ):
            if column[tick, receiver] != NONE:
                assert made[sender] is not None
                slots[receiver][column[tick, receiver]] = made[sender]
    assert len(set(done)) == len(done) == grid.tasks
    if saves or splits:
        peak = max(schedule.limit(stage, stages, microbatches) for stage in range(stages))
        assert grid.kept_slots <= peak


@pytest.mark.parametrize(
    ("schedule", "slots", "kept"),
    # Eight stages, 32 microbatches. One slot more than activations are held: for the gradient that has arrived.
    [(GPipe(), 33, 32), (OneFOneB(), 9, 8)],
)
def test_pools_are_as_deep_as_the_schedule_needs(schedule, slots, kept):
    assert lay_out(schedule, 8, 32).slots == slots
    assert lay_out(schedule, 8, 32, saves=True).kept_slots == kept


@pytest.mark.parametrize(("schedule", "kept"), [(ZBH1(), 8), (ZBH2(), 15), (ZBV(), 16)])
def test_what_waits_for_weight_gradients_takes_no_more_slots_than_the_schedule_promises(schedule, kept):
    assert lay_out(schedule, 8, 32, saves=True).kept_slots == kept


def test_a_schedule_that_skips_a_neighbour_is_refused():
    class Leaping(Schedule):
        name = "leaping"

        def tasks(self, stages, microbatches):
            kinds = (Kind.FORWARD, Kind.BACKWARD)
            return ((tuple(Task(kind, 0, m) for kind in kinds for m in range(microbatches))),) * stages

        def position(self, stage, chunk, stages):
            return (0, 2, 1, 3, 4)[stage]

    with pytest.raises(ScheduleError, match=r"sends from stage . to stage . of 5: the executor connects neighbours"):
        lay_out(Leaping(), 5, 2)
