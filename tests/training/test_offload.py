"""What lies in the host's memory changes no number, and leaves the device's."""

import jax
import jax.numpy as jnp
import optax
import pytest

from tbjax.sharding import by_path
from tbjax.training import (
    Layerwise,
    TrainConfig,
    abstract_state,
    clip_by_norm,
    init_state,
    make_optimizer,
    make_step,
)
from tbjax.training.optimizer import OnlyLayerwise
from tbjax.training.update import Update, apply
from tests.training.cases import batch, born, config, farthest, on
from tests.training.compiling import CONFIG, compiled, installed

STEPS = 2


@pytest.mark.parametrize(
    ("optimizer", "mesh", "strategy", "offload"),
    [
        ("adamw", (1, 2, 1), "FULL_SHARD", ("optimizer",)),
        ("adamw", (1, 2, 1), "FULL_SHARD", ("optimizer", "parameters")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("muon", (2, 2, 2), "OPTIMIZER", ("optimizer",)),
                ("adamw", {"pp": 2, "fsdp": 2, "tp": 2}, "FULL_SHARD", ("optimizer",)),
                ("adamw", (2, 2, 2), "FULL_SHARD", ("optimizer", "parameters")),
            )
        ),
    ],
)
def test_offloading_changes_where_things_lie_and_nothing_else(optimizer, mesh, strategy, offload):
    sharding = on(mesh, strategy=strategy)
    losses, state = run(optimizer, sharding, offload)
    wanted_losses, wanted = run(optimizer, sharding, ())
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    assert farthest(state.model, wanted.model)[0] <= 1e-6
    for part, tree in (("optimizer", state.optimizer), ("parameters", state.model)):
        kinds = {array.sharding.memory_kind for array in jax.tree.leaves(tree) if array.ndim > 1}
        assert kinds == ({"pinned_host"} if part in offload else {wanted.step.sharding.memory_kind})
    abstract = abstract_state(
        config("llama"), sharding, lambda m: make_optimizer(optimizer, m), precision="float32", offload=offload
    )
    for array, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert array.sharding.memory_kind == expected.sharding.memory_kind
        assert array.sharding.is_equivalent_to(expected.sharding, array.ndim)


def test_a_transformation_of_ones_own_must_promise_to_treat_layers_apart():
    model = born("llama", on((1, 1, 1)))
    own = optax.chain(clip_by_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-3))
    for optimizer in (own, make_optimizer("adafactor", model)):
        with pytest.raises(ValueError, match=r"does not promise to treat layers apart"):
            make_step(optimizer, offload=("optimizer",))
    whole = init_state(model, own)
    parts = init_state(born("llama", on((1, 1, 1))), Layerwise(*own), offload=("optimizer",))
    whole, _ = make_step(own, precision="float32")(whole, batch("llama"))
    parts, _ = make_step(Layerwise(*own), precision="float32", offload=("optimizer",))(parts, batch("llama"))
    assert farthest(parts.model, whole.model)[0] <= 1e-6
    with pytest.raises(ValueError, match="offload='gradients' is unknown: tbjax knows 'optimizer', 'parameters'"):
        make_step(own, offload=("gradients",))


def test_layer_by_layer_muon_is_muon():
    """`OnlyLayerwise` against the same transformation run on whole stacks."""
    model = born("llama", on((1, 2, 1)))
    rule = make_optimizer("muon", model)
    at_once = optax.GradientTransformationExtraArgs(*rule)
    states = [
        make_step(r, precision="float32")(init_state(clone(model), r), batch("llama"))[0] for r in (rule, at_once)
    ]
    assert farthest(states[0].model, states[1].model)[0] <= 1e-6


def test_layer_by_layer_no_stack_is_copied():
    """On a CPU, XLA would copy all of both moments for every row, if it saw where the rows come from."""
    sharding = on((1, 1, 1))
    settings = TrainConfig(steps=1, precision="float32").with_plan(None)
    state = abstract_state(config("llama", layers=16), sharding, settings.make_optimizer, precision="float32")
    optimizer = settings.make_optimizer(state.model)
    assert isinstance(optimizer, OnlyLayerwise)

    def update(values, gradients, optimizer_state):
        whole = Update(optimizer, state.model, jnp.float32(1), None)
        return apply(whole, gradients, optimizer_state, values, layerwise=False)

    values = by_path(state.model)
    program = jax.jit(update, donate_argnums=(0, 2)).lower(values, values, state.optimizer).compile()
    stacks = sum(a.size * 4 for path, a in values.items() if path.startswith("stacks."))
    # A layer's values, gradients and moments, old and new, and the ends', which are taken whole.
    assert program.memory_analysis().temp_size_in_bytes <= stacks / 2


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "spec"), [("cuda", "h100:8"), ("tpu", "v5p:2x2x2")])
def test_device_bytes_fall_by_what_the_host_holds(compiler, spec):
    if not installed(compiler):
        pytest.skip(f"the {compiler} compiler is not installed: tbjax[verify]")
    cases = [{"offload": offload} for offload in ([], ["optimizer"], ["optimizer", "parameters"])]
    here, optimizer, everything = compiled(compiler, spec, cases, mesh=(1, 8, 1))
    parameters = 4 * (12 * (4 * CONFIG.embed**2 + 3 * CONFIG.embed * CONFIG.mlp) + 2 * 2048 * CONFIG.embed) / 8
    for name, found in (("device", here), ("optimizer", optimizer), ("everything", everything)):
        print(f"{compiler} {name}: {found.total / 2**20:.1f} MiB on a device, {found.host / 2**20:.1f} on the host")
    # All but a layer's moments leave the device, and the ends', which come one after the other.
    assert here.total - optimizer.total >= 0.75 * 2 * parameters
    assert optimizer.host >= 0.99 * 2 * parameters
    assert optimizer.total - everything.total >= 0.6 * parameters
    assert everything.host >= 0.99 * 3 * parameters


@pytest.mark.slow
@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
def test_muon_takes_memory_for_one_layer():
    adamw, muon = compiled("cuda", "h100:8", [{"optimizer": name} for name in ("adamw", "muon")], mesh=(1, 8, 1))
    layer = 4 * CONFIG.embed * CONFIG.mlp
    print(f"temp: adamw {adamw.temp / 2**20:.1f} MiB, muon {muon.temp / 2**20:.1f} MiB")
    # Newton-Schulz holds a few matrices of one layer, some of them gathered.
    assert muon.temp - adamw.temp <= 8 * layer


def run(optimizer, sharding, offload):
    model = born("llama", sharding)
    rule = make_optimizer(optimizer, model, learning_rate=1e-3)
    state = init_state(model, rule, offload=offload)
    step = make_step(rule, precision="float32", offload=offload, microbatches=2 if sharding.size("pp") > 1 else 1)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch("llama"))
        losses.append(float(metrics.loss))
    return losses, state


def clone(model):
    return jax.tree.map(lambda a: a.copy(), model)
