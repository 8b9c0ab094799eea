"""Every schedule, for a dense, a tied and a sparse model, over 2, 4 and 8 stages with tp and fsdp inside.

Microbatches go from as many as there are stages to four times as many.
"""

import pytest

from tbjax.cut import cut
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, GPipe, Interleaved1F1B, OneFOneB
from tests.pipeline.models import assert_same_gradients

SCHEDULES = (GPipe(), OneFOneB(), Interleaved1F1B(2), ZBH1(), ZBH2(), ZBV())
MESHES = ({"pp": 2, "fsdp": 2, "tp": 2}, {"pp": 4, "tp": 2}, {"pp": 4, "fsdp": 2}, {"pp": 8})
LAYERS = 16  # two chunks on each of eight stages


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()))
@pytest.mark.parametrize("name", ["dense", "tied", "experts"])
def test_loss_and_gradients_are_those_of_the_model_without_a_pipeline(name, mesh, schedule, times):
    stages = mesh["pp"]
    laid = cut(LAYERS, stages, schedule) if times == 1 else None  # layers born where they run, or brought there
    assert_same_gradients(name, mesh, schedule, times * stages, layers=LAYERS, cut=laid, batch_rows=32)
