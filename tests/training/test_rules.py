"""Rules over the paths of parameters: what is frozen, and whose weights decay."""

import jax
import numpy as np
import optax
import pytest

from tbjax.sharding import by_path
from tbjax.training import abstract_batch, abstract_state, init_state, make_optimizer, make_step
from tbjax.training.rules import chosen
from tests.training.cases import ROWS, SEQUENCE, batch, born, config, on

PATHS = ["embedding.weight", "final_norm.weight", "head.weight", "stacks.0.0.mlp.up.weight"]


def test_a_rule_is_an_expression_or_a_function_of_a_path():
    assert chosen(None, PATHS, "frozen") == frozenset()
    assert chosen("embedding|norm", PATHS, "frozen") == {"embedding.weight", "final_norm.weight"}
    assert chosen("^head", PATHS, "frozen") == {"head.weight"}
    assert chosen(lambda path: path.startswith("stacks."), PATHS, "frozen") == {"stacks.0.0.mlp.up.weight"}
    with pytest.raises(ValueError, match=r"frozen='lora' is about none of the 4 parameters, such as embedding.weight"):
        chosen("lora", PATHS, "frozen")
    with pytest.raises(ValueError, match=r"decayed='\(' is no regular expression"):
        chosen("(", PATHS, "decayed")


@pytest.mark.parametrize(
    "mesh", [(1, 2, 1), pytest.param({"pp": 2, "fsdp": 2, "tp": 2}, marks=pytest.mark.slow)], ids=str
)
def test_what_is_frozen_stays_and_has_no_state(mesh):
    frozen, sharding = "embedding|norm|query", on(mesh)
    model = born("llama", sharding)
    rule = make_optimizer("adamw", model, learning_rate=1e-2)
    before = jax.device_get(by_path(model))
    state = init_state(model, rule, frozen=frozen)
    left_out = chosen(frozen, before, "frozen")
    moments = state.optimizer[1][0].mu
    assert moments.keys() == before.keys() - left_out
    abstract = abstract_state(config("llama"), sharding, lambda m: make_optimizer("adamw", m), frozen=frozen)
    assert jax.tree.structure(abstract.optimizer) == jax.tree.structure(state.optimizer)
    microbatches = 2 if sharding.size("pp") > 1 else 1
    state, _ = make_step(rule, precision="float32", frozen=frozen, microbatches=microbatches)(state, batch("llama"))
    for path, value in by_path(state.model).items():
        assert np.array_equal(value, before[path]) == (path in left_out), path


def test_no_gradient_is_computed_for_what_is_frozen():
    def matmuls(frozen):
        sharding = on((1, 1, 1))
        rule = lambda model: make_optimizer("sgd", model)  # noqa: E731
        state = abstract_state(config("llama"), sharding, rule, frozen=frozen)
        step = make_step(rule(state.model), frozen=frozen)
        return step.lower(state, abstract_batch(ROWS, SEQUENCE, sharding)).compile().as_text().count(" dot(")

    everything = matmuls(None)
    assert matmuls(r"mlp\.(up|gate|down)") == everything - 3
    assert matmuls("head") == everything - 1
    with pytest.raises(ValueError, match=r"frozen='\.' leaves nothing to train: it is about all 12 parameters"):
        matmuls(".")


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weights_decay_by_rule(name):
    """With gradients of zero, what moves is what decays."""
    model = born("llama", on((1, 1, 1)))
    values = by_path(model)
    matrices = {path for path, value in values.items() if "norm" not in path}
    for rule, expected in (
        (None, matrices),
        ("norm|head", {path for path in values if "norm" in path or "head" in path}),
    ):
        optimizer = make_optimizer(name, model, learning_rate=0.1, weight_decay=0.1, decayed=rule)
        zeros = jax.tree.map(lambda a: 0 * a, values)
        updates, _ = optimizer.update(zeros, optimizer.init(values), values)
        assert {path for path, update in updates.items() if np.any(update)} == expected
        for path in expected:
            np.testing.assert_allclose(updates[path], -0.01 * values[path], rtol=1e-5)


def test_any_transformation_of_optax_serves():
    model = born("llama", on((1, 1, 1)))
    rule = optax.chain(optax.clip_by_global_norm(0.5), optax.adabelief(1e-3), optax.ema(0.9))
    state, step = init_state(model, rule), make_step(rule, precision="float32")
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch("llama"))
        losses.append(float(metrics.loss))
    assert losses[2] < losses[0]
