import dataclasses

import pytest

from tbjax.planner.cost import step_time
from tbjax.planner.timeline import ONCE, drawn_microbatches, timeline
from tbjax.planner.workload import Layout
from tests.planner import plans


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_picture_takes_as_long_as_the_plan_says(schedule, remat):
    chunks = 2 if schedule == "interleaved" else 1
    layout = Layout(pp=4, fsdp=2, tp=8, microbatches=16, schedule=schedule, chunks=chunks, remat=remat)
    plan = plans.make("h100:8x8", layout)
    drawn = timeline(plan)
    assert drawn.microbatches == 16
    once = sum(plan.time.parts[part] for part in ONCE if part != "bubble")
    # Transfers are not drawn, and the plan's bubble is of the layers without the embedding and the head.
    assert drawn.total == pytest.approx(plan.time.total - once, rel=0.02)


def test_there_is_no_timeline_without_a_pipeline():
    assert timeline(plans.PLANS["64 GPUs"]()) is None


def test_there_is_no_timeline_of_serving():
    layout = Layout(pp=2, tp=4)
    plan = plans.make("h100:8", layout, plans.SERVING)
    assert plan.time == step_time(plan.config, plan.workload, layout, plan.cluster)
    assert timeline(plan) is None


@pytest.mark.parametrize("pp", [2, 8, 64])
@pytest.mark.parametrize("chunks", [1, 5])
def test_a_long_pipeline_is_drawn_in_whole_groups_of_microbatches(pp, chunks):
    layout = Layout(pp=pp, microbatches=1024, schedule="interleaved", chunks=chunks)
    drawn = drawn_microbatches(layout)
    assert drawn < 1024
    assert drawn % pp == 0
    assert drawn >= 2 * pp
    assert drawn_microbatches(dataclasses.replace(layout, microbatches=pp)) == pp
