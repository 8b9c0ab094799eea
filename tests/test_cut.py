"""A cut gives every layer a row, says which, and refuses what is none; layers get from any cut to any other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.cut import HOLE, Cut, Run, cut
from tbjax.pipeline.exchange import route
from tbjax.pipeline.graph import NONE
from tbjax.pipeline.schedule import ZBV, GPipe, Interleaved1F1B


@st.composite
def cuts(draw, stages, repeats):
    """Any cut that a schedule asks for, with any counts."""
    schedule = draw(st.sampled_from([GPipe(), ZBV(), Interleaved1F1B(2), Interleaved1F1B(3)]))
    pieces = stages * schedule.chunks
    inner = draw(st.sets(st.integers(1, repeats - 1), min_size=pieces - 1, max_size=pieces - 1))
    ends = [0, *sorted(inner), repeats]
    return cut(repeats, stages, schedule, counts=np.diff(ends).tolist()), schedule


@st.composite
def pairs(draw):
    stages = draw(st.integers(1, 5))
    repeats = draw(st.integers(3 * stages + 1, 30))
    return draw(cuts(stages, repeats)), draw(cuts(stages, repeats))


@given(pairs())
def test_every_layer_has_a_row_on_the_stage_that_its_piece_is_on(two):
    (found, schedule), _ = two
    assert [found.order[row] for row in found.places] == list(range(found.repeats))
    assert len(found.order) == found.stages * found.rows
    assert found.order.count(HOLE) == len(found.order) - found.repeats
    assert found.serves(schedule)
    for stage in range(found.stages):
        for chunk in range(found.chunks):
            first, length = found.local(stage, chunk)
            own = found.order[stage * found.rows + first :][:length]
            run = found.runs[stage][chunk]
            assert own == tuple(range(run.first, run.first + run.length))


@given(pairs())
def test_rounds_bring_every_layer_from_one_cut_to_another(two):
    (stored, _), (run, _) = two
    way = route(stored, run)
    if stored == run:
        assert not way.rounds
        return
    blocks = np.asarray(stored.order).reshape(stored.stages, -1, way.rows)
    there = np.full((run.stages, way.blocks[1], way.rows), HOLE)
    for block, receivers, place in way.rounds:
        assert sorted(receivers) == list(range(run.stages))  # a permutation
        for stage, receiver in enumerate(receivers):
            if block[stage] != NONE:
                there[receiver, place[receiver]] = blocks[stage, block[stage]]
    assert tuple(there.flatten()) == run.order


def test_layers_are_shared_out_as_equally_as_can_be_and_the_last_has_no_more_than_others():
    assert cut(8, 4).plain
    assert [run.length for run in cut(10, 4).pieces] == [3, 3, 2, 2]
    assert cut(10, 4).order == (0, 1, 2, 3, 4, 5, 6, 7, HOLE, 8, 9, HOLE)
    assert cut(8, 2, ZBV()).order == (0, 1, 6, 7, 2, 3, 4, 5)
    assert not cut(8, 2, ZBV()).serves(Interleaved1F1B(2))


def test_what_is_no_cut_is_refused():
    with pytest.raises(ValueError, match="pp=4 makes 4 pieces, but there are 3 to share out"):
        cut(3, 4)
    with pytest.raises(
        ValueError, match=r"counts=\[3, 3\]: pp=2 takes 2 counts that add up to 7, not 2 that add up to 6"
    ):
        cut(7, 2, counts=(3, 3))
    with pytest.raises(ValueError, match="no run begins at layer 2"):
        Cut(((Run(0, 2),), (Run(3, 2),)))
    with pytest.raises(ValueError, match="chunks: every stage must have as many"):
        Cut(((Run(0, 2), Run(2, 1)), (Run(3, 2),)))
