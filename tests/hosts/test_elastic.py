"""A run whose hosts come and go, with real agents, workers and kills (told in `benchmarks.elastic`)."""

import itertools
import math
import re

import pytest

from benchmarks import elastic

STEPS = 32


@pytest.mark.slow
def test_a_host_dies_in_a_step_and_comes_back_and_the_losses_do_not_know(tmp_path):
    outcome = elastic.kill_and_return(tmp_path, STEPS)
    assert outcome.processes[-3:] == [4, 2, 4]
    # Laid out anew by the planner for those that were there.
    assert {math.prod(map(int, re.findall(r"\d+", mesh))) for mesh in outcome.meshes} == {4, 2}
    assert list(outcome.undisturbed) == sorted(outcome.losses) == list(range(1, STEPS + 1))
    # Every step learned from the same sequences: two batches differ by more than the order of a sum does.
    losses = list(outcome.undisturbed.values())
    assert min(abs(after - before) for before, after in itertools.pairwise(losses)) > 1e-4
    assert outcome.largest_difference <= 1e-4
    assert outcome.data[0] == outcome.data[1]
    killed, joined = outcome.changes
    assert killed.repeated <= elastic.SAVE_EVERY
    assert joined.repeated == 0  # whoever joins lets the others save first


@pytest.mark.slow
def test_a_cut_link_ends_in_an_error_and_a_restart(tmp_path):
    if not elastic.can_make_networks():
        pytest.skip("needs root and network namespaces")
    change, (near, far) = elastic.cut_the_link(tmp_path, STEPS)
    assert change.repeated <= elastic.SAVE_EVERY
    for said in (near, far):
        assert "of 2 (torchrun) on 2 hosts" in said
        assert "Heartbeat" in said or "stopped sending heartbeats" in said
    assert f"{STEPS} steps: loss" in near  # on its own
