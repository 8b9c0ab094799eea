"""Precisions, the sums of gradients, and what a step does about numbers that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.sharding import by_path, leaves, with_arrays
from tbjax.training import (
    Batch,
    LossScaling,
    abstract_state,
    find_nonfinite,
    init_state,
    make_optimizer,
    make_step,
    resumed,
)
from tbjax.training.precision import first_scale, next_scale, reduction
from tests.training.cases import batch, born, config, distance, on, same
from tests.training.compiling import CONFIG, compiled, installed

LAYERS = 4
# A token that only the poisoned batch has.
POISON = 7


def test_float16_learns_what_float32_learns():
    wanted = losses("float32")
    np.testing.assert_allclose(losses("float16"), wanted, rtol=2e-3)
    assert losses("float16") != wanted


def losses(precision):
    model = born("llama", on((1, 1, 1)))
    rule = make_optimizer("adamw", model, learning_rate=1e-3)
    state, step = init_state(model, rule, precision=precision), make_step(rule, precision=precision)
    found = []
    for _ in range(3):
        state, metrics = step(state, batch("llama"))
        found.append(float(metrics.loss))
    return found


def test_an_overflow_halves_the_scale_and_skips_and_good_steps_double_it():
    scaling = LossScaling(initial=2.0**40, growth_interval=3)
    model = born("llama", on((1, 1, 1)))
    rule = make_optimizer("sgd", model)
    options = {"precision": "float16", "loss_scaling": scaling, "on_nonfinite": "stop"}
    state, step = init_state(model, rule, **options), make_step(rule, **options)
    abstract = abstract_state(config("llama"), on((1, 1, 1)), lambda m: make_optimizer("sgd", m), **options)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    expected, good = scaling.initial, 0
    seen = set()
    for _ in range(30):
        before = jax.device_get((state.model, state.optimizer))
        state, metrics = step(state, batch("llama"))
        assert float(metrics.loss_scale) == expected
        assert bool(metrics.finite)  # the scale is to blame, and nothing stops
        skipped = bool(metrics.skipped)
        assert same((state.model, state.optimizer), before) == skipped
        seen.add(skipped)
        good = 0 if skipped else good + 1
        expected = expected / 2 if skipped else expected * 2 if good == 3 else expected
        good %= 3
        assert float(state.loss_scale.value) == expected
        assert int(state.loss_scale.good_steps) == good
    assert seen == {True, False}
    assert int(state.step) == 30


def test_the_scale_neither_leaves_float32_nor_falls_below_its_lowest():
    scaling = LossScaling(initial=2.0**127, growth_interval=1, lowest=0.5)
    scale = first_scale(scaling)
    assert next_scale(scale, jnp.array(True), scaling).value == 2.0**127
    for _ in range(200):
        scale = next_scale(scale, jnp.array(False), scaling)
    assert scale.value == 0.5


@pytest.mark.parametrize("on_nonfinite", ["keep", "skip", "stop"])
def test_a_step_that_is_not_finite_does_as_it_is_told(on_nonfinite):
    model = poisoned(born("llama", on((1, 1, 1))), "embedding.weight", POISON)
    rule = make_optimizer("sgd", model)
    options = {"precision": "float32", "on_nonfinite": on_nonfinite}
    state, step = init_state(model, rule, **options), make_step(rule, **options)
    good, bad = clean(batch("llama")), batch("llama")
    before = jax.device_get((state.model, state.optimizer))
    state, metrics = step(state, bad)
    assert not bool(metrics.finite)
    assert bool(metrics.skipped) == (on_nonfinite != "keep")
    if on_nonfinite == "keep":
        assert not np.isfinite(np.asarray(by_path(state.model)["final_norm.weight"])).all()
        return
    assert same((state.model, state.optimizer), before)
    assert int(state.step) == (1 if on_nonfinite == "skip" else 0)
    state, metrics = step(state, good)
    goes_on = on_nonfinite == "skip"
    assert bool(metrics.finite) == goes_on
    assert same(state.model, before[0]) != goes_on
    if on_nonfinite == "stop":
        state, metrics = step(resumed(state), good)
        assert bool(metrics.finite)
        assert not same(state.model, before[0])
        assert int(state.step) == 1


def test_what_is_not_finite_first_is_named():
    name = "llama"
    sharding = on((1, 1, 1))
    rule = lambda model: make_optimizer("sgd", model)  # noqa: E731
    model = born(name, sharding, layers=LAYERS)
    sound = init_state(model, rule(model), precision="float16")
    assert find_nonfinite(sound, batch(name), precision="float16") is None

    path = "stacks.0.0.attention.output.weight"
    found = find_nonfinite(sound._replace(model=poisoned(model, path, 2)), batch(name), precision="float16")
    assert (found.where, found.layer, found.path) == ("parameter", 2, path)
    assert str(found) == f"Before the step, the parameter {path} was not finite already in layer 2."

    # Finite, and too large for float16 once its layer has summed over them.
    large = with_values(model, path, lambda values: values.at[2].multiply(1e6))
    found = find_nonfinite(sound._replace(model=large), batch(name), precision="float16")
    assert (found.where, found.layer) == ("forward", 2)
    assert str(found) == "In the forward pass, layer 2 is the first whose output is not finite."
    # The same weights are nothing special in float32.
    assert find_nonfinite(sound._replace(model=large), batch(name), precision="float32") is None

    scale = sound.loss_scale._replace(value=jnp.float32(2.0**60))
    found = find_nonfinite(sound._replace(loss_scale=scale), batch(name), precision="float16")
    assert found.where == "gradient"
    assert "the first that is not finite" in str(found)


def test_reductions_are_what_the_precision_allows():
    assert reduction("mixed", None) == (None, jnp.float32)
    assert reduction("mixed", "float32") == ("float32", jnp.float32)
    assert reduction("mixed", "bfloat16") == (None, jnp.bfloat16)
    assert reduction("bfloat16", None) == (None, jnp.bfloat16)
    assert reduction("bfloat16", "float32") == ("float32", jnp.float32)
    with pytest.raises(ValueError, match="reduce_dtype='bfloat16': with precision='float32' gradients can be summed"):
        reduction("float32", "bfloat16")


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_sums_in_float32_are_closer_to_those_of_one_device(name):
    """Gradients of bfloat16 matmuls: summed over four devices in bfloat16, and in float32."""
    wanted = gradients(name, (1, 1, 1), "float32")
    mesh = (1, 4, 1)
    error = {
        reduce_dtype: sum(distance(a, wanted[path]) for path, a in gradients(name, mesh, reduce_dtype).items())
        for reduce_dtype in ("bfloat16", "float32")
    }
    assert error["float32"] < error["bfloat16"]


def gradients(name, mesh, reduce_dtype):
    from tbjax.training.gradients import gradients_of

    over_devices, over_microbatches = reduction("mixed", reduce_dtype)

    def run(model, batch):
        return gradients_of(
            model,
            batch,
            dtype=jnp.bfloat16,
            remat="dots",
            microbatches=1,
            auxiliary=False,
            over_devices=over_devices,
            over_microbatches=over_microbatches,
        )[1]

    return jax.jit(run)(born(name, on(mesh)), batch(name))


@pytest.mark.slow
@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_on_gpus_gradients_travel_in_the_dtype_that_was_asked_for(strategy):
    cases = [{"strategy": strategy, "reduce_dtype": dtype} for dtype in (None, "float32")]
    narrow, wide = compiled("cuda", "h100:8", cases, mesh=(1, 8, 1))

    def summed(program, dtype):
        return sum(
            int(np.prod([int(n) for n in shape.split(",") if n]))
            for kind, of, shape in program.dtypes
            if kind in ("reduce-scatter", "all-reduce") and of == dtype
        )

    # Narrow are the weights of a layer at least; a lookup is summed in float32 before anything is sent.
    layer = 4 * CONFIG.embed**2 + 3 * CONFIG.embed * CONFIG.mlp
    assert summed(narrow, "bf16") >= layer
    assert summed(narrow, "f32") < 1.01 * CONFIG.vocab_size * CONFIG.embed
    assert summed(wide, "bf16") == 0
    assert summed(wide, "f32") >= summed(narrow, "bf16")
    # What is gathered is as narrow as before.
    assert sum(c["bytes"] for c in wide.collectives if c["kind"] == "all-gather") == pytest.approx(
        sum(c["bytes"] for c in narrow.collectives if c["kind"] == "all-gather"), rel=0.01
    )


def test_what_is_unknown_is_refused_by_name():
    model = born("llama", on((1, 1, 1)))
    rule = make_optimizer("sgd", model)
    with pytest.raises(ValueError, match="on_nonfinite='ignore' is unknown: tbjax knows 'keep', 'skip', 'stop'"):
        make_step(rule, on_nonfinite="ignore")
    with pytest.raises(ValueError, match="loss_scaling is for precision='float16': 'mixed' needs none"):
        init_state(model, rule, loss_scaling=LossScaling())
    with pytest.raises(ValueError, match="growth_interval=0"):
        LossScaling(growth_interval=0)


def poisoned(model, path, row):
    """The model with one row of a parameter beyond all numbers."""
    return with_values(model, path, lambda values: values.at[row].set(jnp.inf))


def with_values(model, path, change):
    values = by_path(model)
    [leaf] = [leaf for leaf in leaves(model) if leaf.path == path]
    changed = jax.jit(change, out_shardings=model.sharding.parameter(leaf.dims, leaf.variable.shape))(values[path])
    return with_arrays(model, {**values, path: changed})


def clean(whole):
    tokens = np.where(whole.tokens == POISON, POISON + 1, whole.tokens)
    assert (whole.tokens == POISON).any()
    return Batch(tokens, whole.targets)
