"""What values say of themselves in a line: settings as one would write them, results as a sentence."""

import jax
import numpy as np
import pytest

import tbjax
from tbjax.api import abstract
from tbjax.mesh import AXES
from tbjax.planner import words
from tbjax.planner.workload import Layout, Workload
from tests import tiny
from tests.planner import plans

NAMES = {name: getattr(tbjax, name) for name in ("ModelConfig", "LayerKind", "Rope", "MoE")}


@pytest.mark.parametrize("case", tiny.CASES, ids=lambda case: case.name)
def test_a_config_is_written_as_the_call_that_makes_it(case):
    config = tiny.our_config(case)
    assert eval(repr(config), dict(NAMES)) == config  # noqa: S307 (what is written is our own)


def test_settings_that_are_as_they_would_be_anyway_are_not_said():
    assert repr(tbjax.TrainConfig(steps=3)) == "TrainConfig(steps=3)"
    assert repr(Layout(fsdp=8, strategy="OPTIMIZER")) == "Layout(fsdp=8, strategy='OPTIMIZER')"
    assert repr(Workload(global_batch=8, seq_len=32)) == "Workload(global_batch=8, seq_len=32)"
    assert repr(plans.llama()).count("LayerKind") == 1


def test_a_plan_and_its_verdict_are_a_sentence():
    plan = plans.PLANS["64 GPUs"]()
    said = repr(plan)
    assert f"llama-2-70b on 64{words.TIMES}NVIDIA H100" in said
    assert f"fsdp 8{words.TIMES}tp 8, 16 microbatches" in said.replace("remat full, ", "")
    assert "✓ Fits" in said
    assert "✗ Does not fit" in repr(plans.PLANS["does not fit"]())
    assert "Verification for h100:8x8" in repr(plans.verification(plan))
    assert repr(plan.candidates[0]).startswith(f"<fsdp 8{words.TIMES}tp 8, ")
    for value in (plan, plans.verification(plan), plan.candidates[0], plan.cluster, plan.layout):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 320


def test_a_model_says_what_it_is_and_where():
    config = tiny.our_config(tiny.BY_NAME["mixtral"])
    model = abstract(config, {"dp": 2, "ep": 2, "tp": 2})
    where = words.spelled_sizes({"dp": 2, "ep": 2, "tp": 2})
    assert repr(model) == f"<CausalLM: {words.model(config)}, {config.layers} layers, float32, on {where}>"
    assert str(model) == repr(model)
    assert repr(model.sharding) == "Sharding(mesh={'dp': 2, 'ep': 2, 'tp': 2})"
    alone = tbjax.Sharding(jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * 6), AXES), "NO_SHARD")
    assert repr(alone) == "Sharding(mesh=one device, strategy='NO_SHARD')"
