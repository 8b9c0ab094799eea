"""A training step computes on any mesh and under any policy what it computes on one device, and leaves all in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, ShardingStrategy, leaves
from tbjax.training import IGNORED, Batch, abstract_batch, abstract_state, init_state, make_optimizer, make_step
from tbjax.training.gradients import gradients_of
from tests import tiny

ROWS, SEQUENCE, STEPS = 8, 16, 3
# Weights are about 0.02: a wrong gradient moves them by percents. Adam divides a gradient by its own size, so one that
# is nothing but rounding moves its weight as far as any other, and a larger rate would measure those.
LEARNING_RATE = 3e-4
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
EXPERTS = {"dp": 2, "ep": 2, "tp": 2}
LAID = [(name, mesh) for name in ("llama", "mixtral") for mesh in (*MESHES, EXPERTS)]


@pytest.mark.parametrize(("name", "mesh"), LAID, ids=[f"{name}-{mesh}" for name, mesh in LAID])
def test_three_steps_on_any_mesh_are_the_three_steps_of_one_device(name, mesh):
    compare(run(name, Sharding(on(mesh))), on_one_device(name))


@pytest.mark.parametrize("strategy", ["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "HYBRID_SHARD"])
def test_a_strategy_changes_where_things_lie_and_nothing_else(strategy):
    sharding = Sharding(on((2, 4, 1)), ShardingStrategy(strategy))
    compare(run("llama", sharding), on_one_device("llama"))


def test_sequence_parallelism_changes_nothing():
    compare(run("llama", Sharding(on((1, 2, 4)), sequence_parallel=True)), on_one_device("llama"))


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "lion", "muon"])
def test_every_optimizer_works_on_parts(optimizer):
    compare(run("llama", Sharding(on((2, 2, 2))), optimizer), on_one_device("llama", optimizer))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_do_not_depend_on_what_is_kept_or_on_microbatches(name, remat, microbatches):
    model = born(name, Sharding(on((2, 2, 2))))
    # The routers' loss balances each microbatch by itself, so it is left out.
    loss, gradients, targets = jax.jit(
        lambda model, batch: gradients_of(
            model, batch, dtype=jnp.float32, remat=remat, microbatches=microbatches, auxiliary=False
        )
    )(model, batch(name))
    wanted_loss, wanted = plain_gradients(name)
    assert targets == np.sum(batch(name).targets >= 0)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for path, gradient in gradients.items():
        assert distance(gradient, wanted[path]) <= 1e-5, path


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [*((strategy, "adamw") for strategy in ShardingStrategy), ("FULL_SHARD", "adafactor"), ("OPTIMIZER", "muon")],
)
def test_everything_lies_where_the_abstract_state_says(strategy, optimizer):
    sharding = Sharding(on((2, 2, 2)), strategy)
    abstract = abstract_state(
        tiny.our_config(tiny.BY_NAME["llama"]), sharding, lambda m: make_optimizer(optimizer, m), precision="float32"
    )
    model = born("llama", sharding)
    state = init_state(model, make_optimizer(optimizer, model))
    step = make_step(make_optimizer(optimizer, model), precision="float32", microbatches=2)
    for current in (state, step(state, batch("llama"))[0]):
        for array, wanted in zip(jax.tree.leaves(current), jax.tree.leaves(abstract), strict=True):
            assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
            assert array.sharding.is_equivalent_to(wanted.sharding, array.ndim), (strategy, array.sharding, wanted)


@pytest.mark.parametrize(
    ("strategy", "parameters", "state"),
    [("NO_SHARD", 1, 1), ("OPTIMIZER", 1, 8), ("SHARD_GRAD_OP", 1, 8), ("FULL_SHARD", 8, 8)],
)
def test_a_strategy_holds_the_bytes_that_it_promises(strategy, parameters, state):
    abstract = abstract_state(
        tiny.our_config(tiny.BY_NAME["llama"]),
        Sharding(on((1, 8, 1)), strategy),
        lambda m: make_optimizer("adamw", m),
    )
    # All but the norms' scales, which nothing cuts, are cut by fsdp.
    assert parameters * held(abstract.model) == pytest.approx(whole(abstract.model), rel=0.05)
    assert state * held(abstract.optimizer) == pytest.approx(2 * whole(abstract.model), rel=0.05)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gathered_weights_are_kept_under_no_policy(name, remat):
    config = tiny.our_config(tiny.BY_NAME[name])
    sharding = Sharding(on((1, 8, 1)))
    made = lambda m: make_optimizer("adamw", m)  # noqa: E731
    state = abstract_state(config, sharding, made, precision="float32")
    step = make_step(made(state.model), precision="float32", remat=remat)
    program = step.lower(state, abstract_batch(ROWS, SEQUENCE, sharding)).compile().as_text()
    experts = [config.moe.experts] if config.moe else []
    wide, narrow = (config.mlp, config.embed) if config.moe is None else (config.embed, config.mlp)
    cut = (config.mlp, config.embed // 8) if config.moe is None else (config.embed // 8, config.mlp)

    def array(*shape):
        return f"f32[{','.join(map(str, shape))}]"

    assert array(config.layers, *experts, *cut) in program  # the stack as it is stored
    assert array(*experts, wide, narrow) in program  # a layer of it as it is used
    assert array(config.layers, *experts, wide, narrow) not in program


def test_a_step_takes_the_memory_of_the_state():
    sharding = Sharding(on((1, 8, 1)))
    made = lambda m: make_optimizer("adamw", m)  # noqa: E731
    state = abstract_state(tiny.our_config(tiny.BY_NAME["llama"]), sharding, made)
    compiled = make_step(made(state.model)).lower(state, abstract_batch(ROWS, SEQUENCE, sharding)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * (held(state.model) + held(state.optimizer))


def test_mixed_precision_keeps_float32_parameters_and_computes_in_bfloat16():
    losses, model = run("llama", Sharding(on((2, 2, 2))), precision="mixed")
    wanted, _ = on_one_device("llama")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(losses, wanted, rtol=2e-3)
    assert not np.array_equal(losses, wanted)


def test_pure_bfloat16_keeps_nothing_wider():
    _, model = run("llama", Sharding(on((1, 1, 1))), precision="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


def test_what_the_step_does_not_know_is_refused_by_name():
    made = lambda m: make_optimizer("adamw", m)  # noqa: E731
    model = born("llama", Sharding(on((1, 8, 1))))
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: tbjax knows 'adamw'"):
        make_optimizer("adam", model)
    with pytest.raises(ValueError, match="precision='fp8' is unknown"):
        make_step(made(model), precision="fp8")
    with pytest.raises(ValueError, match="remat='some' is unknown"):
        make_step(made(model), remat="some")(init_state(model, made(model)), batch("llama"))
    with pytest.raises(ValueError, match="a batch of 8 sequences does not divide over dp\\*fsdp\\*ep=8 devices in 2"):
        make_step(made(model), microbatches=2)(init_state(model, made(model)), batch("llama"))
    with pytest.raises(ValueError, match="microbatches=0: a batch is computed in one or more"):
        make_step(made(model), microbatches=0)(init_state(model, made(model)), batch("llama"))


def run(name, sharding, optimizer="adamw", precision="float32"):
    """The losses of three steps, and the model after them."""
    model = born(name, sharding, jnp.bfloat16 if precision == "bfloat16" else jnp.float32)
    rule = make_optimizer(optimizer, model, learning_rate=LEARNING_RATE)
    state, step, losses = init_state(model, rule, precision=precision), make_step(rule, precision=precision), []
    for _ in range(STEPS):
        state, metrics = step(state, batch(name))
        losses.append(float(metrics.loss))
    assert int(state.step) == STEPS
    return losses, state.model


@functools.cache
def on_one_device(name, optimizer="adamw"):
    return run(name, Sharding(make_mesh((1, 1, 1), jax.devices()[:1])), optimizer)


@functools.cache
def plain_gradients(name):
    """By differentiating the textbook loss."""
    model, tokens = born(name, Sharding(make_mesh((1, 1, 1), jax.devices()[:1]))), batch(name)

    @jax.value_and_grad
    def loss(model):
        scores = jax.nn.log_softmax(model(tokens.tokens))
        taken = jnp.take_along_axis(scores, np.maximum(tokens.targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(taken * (tokens.targets >= 0)) / np.sum(tokens.targets >= 0)

    value, gradients = loss(model)
    return value, dict(zip((leaf.path for leaf in leaves(model)), jax.tree.leaves(gradients), strict=True))


def born(name, sharding, dtype=jnp.float32):
    config = tiny.our_config(tiny.BY_NAME[name])
    if config.moe:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, auxiliary_loss_weight=0.1))
    make = lambda: Decoder(config, sharding, dtype=dtype, key=jax.random.key(1))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


@functools.cache
def batch(name):
    random = np.random.default_rng(0)
    tokens = random.integers(0, tiny.our_config(tiny.BY_NAME[name]).vocab_size, (ROWS, SEQUENCE + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:] = IGNORED  # so the microbatches have different numbers of targets
    targets[5, :2] = IGNORED
    return Batch(tokens[:, :-1], targets)


def on(mesh):
    sizes = list(mesh.values()) if isinstance(mesh, dict) else mesh
    return make_mesh(mesh, jax.devices()[: int(np.prod(sizes))])


def compare(ours, wanted):
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    assert wanted[0][-1] < wanted[0][0]  # it learns
    for leaf, a, b in zip(leaves(ours[1]), jax.tree.leaves(ours[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert distance(a, b) <= 1e-5, leaf.path


def distance(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30)


def held(tree):
    """Bytes on one device, as the shardings say."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape), dtype=int)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def whole(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
