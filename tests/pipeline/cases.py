"""What the pipeline's property tests draw from."""

from hypothesis import strategies as st

from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, ForwardOnly, GPipe, Interleaved1F1B, OneFOneB
from tbjax.pipeline.simulate import Times

SIMPLE = (GPipe(), OneFOneB(), ZBH1(), ZBH2(), ZBV(), ForwardOnly())
DURATION = st.floats(0.01, 10)


@st.composite
def schedules(draw):
    """Any schedule, with stages and microbatches that it can serve."""
    stages, microbatches = draw(st.integers(1, 8)), draw(st.integers(1, 24))
    schedule = draw(st.sampled_from([*SIMPLE, Interleaved1F1B(draw(st.integers(1, 4)))]))
    if isinstance(schedule, Interleaved1F1B):
        microbatches = stages * draw(st.integers(1, 4))
    return schedule, stages, microbatches


@st.composite
def uniform_times(draw):
    """Equal on all stages; transfers from nothing to longer than the work."""
    communication = draw(st.sampled_from([0, 0.02, 5.0])) * draw(st.floats(0, 1))
    return Times(
        forward=draw(DURATION),
        backward_input=draw(DURATION),
        backward_weight=draw(DURATION),
        communication=communication,
    )


@st.composite
def uneven_times(draw, figures):
    """As unlike from stage to stage, or from piece to piece, as can be."""

    def some(count, least=0.01):
        return tuple(draw(st.lists(st.floats(least, 10), min_size=count, max_size=count)))

    pieces = draw(st.sampled_from(sorted(set(figures))))
    return Times(
        forward=some(pieces),
        backward_input=some(figures[0]),
        backward_weight=some(pieces),
        communication=some(figures[0], 0),
    )


@st.composite
def simulations(draw):
    """A schedule with times, uniform or not: (schedule, stages, microbatches, times)."""
    schedule, stages, microbatches = draw(schedules())
    times = draw(st.one_of(uniform_times(), uneven_times((stages, stages * schedule.chunks))))
    return schedule, stages, microbatches, times
