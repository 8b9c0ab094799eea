"""The batch of a step is the same on any number of devices; the run itself is shown in tests/hosts/test_elastic.py."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tbjax
from tbjax.training.config import TrainConfig
from tbjax.training.elastic import accumulation, agreed, as_begun
from tbjax.training.saving import FORMAT


@pytest.mark.parametrize(
    ("batch", "ways", "at_once", "parts"), [(8, 4, 2, 1), (8, 2, 2, 2), (8, 1, 2, 4), (24, 2, 5, 3), (7, 1, 2, 7)]
)
def test_fewer_devices_take_more_turns(batch, ways, at_once, parts):
    assert accumulation(batch, ways, at_once) == parts


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8))
def test_every_sequence_has_its_turn_and_no_device_more_than_it_may(share, ways, at_once):
    parts = accumulation(share * ways, ways, at_once)
    assert share % parts == 0
    assert share // parts <= at_once


def test_a_batch_that_the_devices_cannot_share_says_what_would_do():
    with pytest.raises(ValueError, match=r"8 sequences .* 3 data-parallel devices.*dp \* fsdp \* ep = 2"):
        accumulation(8, 3, 2)


def test_a_run_goes_on_with_the_batch_that_it_began_with(tmp_path):
    for step, text in (
        (5, json.dumps({"format": FORMAT, "step": 5, "data": None, "plan": None, "config": {"batch_size": 12}})),
        (10, "half writ"),
    ):
        (tmp_path / str(step) / "progress").mkdir(parents=True)
        (tmp_path / str(step) / "progress" / "metadata").write_text(text)
    assert as_begun(TrainConfig(steps=20), tmp_path).batch_size == 12
    assert as_begun(TrainConfig(steps=20, batch_size=24, seq_len=8), tmp_path) == TrainConfig(
        steps=20, batch_size=24, seq_len=8
    )
    assert as_begun(TrainConfig(steps=20), tmp_path / "none") == TrainConfig(steps=20)
    assert as_begun(TrainConfig(steps=20), None) == TrainConfig(steps=20)


def test_the_plan_is_the_first_processes():
    plan = tbjax.plan("llama-2-7b-hf", "h100:8", global_batch=64)
    assert agreed(plan) == plan
