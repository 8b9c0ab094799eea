"""A state and a step must have been asked for the same: what does not fit is refused before anything is compiled."""

import jax
import jax.numpy as jnp
import pytest

import tbjax
from tbjax.training.optimizer import make_optimizer
from tbjax.training.state import abstract_batch, abstract_state, init_state
from tbjax.training.step import make_step
from tests import tiny

CONFIG = tiny.our_config(tiny.BY_NAME["llama"])
MESH = tbjax.make_mesh({"dp": 1}, jax.devices()[:1])


def rule(model):
    return make_optimizer("adamw", model)


def traced(state_options, step_options):
    sharding = tbjax.Sharding(MESH)
    state = abstract_state(CONFIG, sharding, rule, **state_options)
    step = make_step(rule(state.model), **step_options)
    return jax.eval_shape(step, state, abstract_batch(2, 8, sharding))


def test_weights_are_of_the_precision_s_dtype():
    model = tbjax.from_config(CONFIG, MESH, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"'mixed' trains float32 weights, but the model's are bfloat16: load it with"):
        init_state(model, rule(model))
    assert init_state(model, rule(model), precision="bfloat16").model.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"'bfloat16' trains bfloat16 weights, but the model's are float32"):
        traced({"precision": "mixed"}, {"precision": "bfloat16"})


@pytest.mark.parametrize(
    ("state", "step", "named"),
    [
        ({}, {"precision": "float16"}, "precision='float16'"),
        ({}, {"on_nonfinite": "stop"}, "on_nonfinite='stop'"),
        ({"on_nonfinite": "stop"}, {}, "on_nonfinite='keep'"),
        ({}, {"offload": ("optimizer",)}, r"offload=\('optimizer',\)"),
        ({}, {"offload": ("parameters",)}, r"offload=\('parameters',\)"),
    ],
)
def test_a_state_made_with_other_options_is_refused(state, step, named):
    with pytest.raises(ValueError, match=f"the step has {named}, but the state was made without it"):
        traced(state, step)
    traced(step, step)


def test_no_clipping_is_none_or_zero():
    model = tbjax.from_config(CONFIG, MESH)
    gradient = {"final_norm.weight": jnp.full(CONFIG.embed, 5.0)}
    for clip_norm in (None, 0):
        sgd = make_optimizer("sgd", model, learning_rate=1.0, clip_norm=clip_norm)
        update, _ = sgd.update(gradient, sgd.init(gradient), gradient)
        assert (update["final_norm.weight"] == -5).all()


def test_adafactor_does_not_measure_rows_without_a_layer():
    config = tiny.our_config(tiny.Case("five", "llama", {"num_hidden_layers": 5}))
    model = tbjax.api.abstract(config, {"pp": 2, "fsdp": 4})
    with pytest.raises(ValueError, match="5 layers over pp=2 leave rows without a layer"):
        make_optimizer("adafactor", model)
