"""Every strategy computes on every mesh what one device computes, in the memory and with the collectives it says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tbjax.planner import hlo
from tbjax.sharding import ShardingStrategy, leaves
from tbjax.training import abstract_batch, abstract_state, init_state, make_optimizer, make_step
from tbjax.training.gradients import gradients_of
from tests.training.cases import ROWS, SEQUENCE, batch, born, config, distance, on
from tests.training.compiling import CONFIG, compiled, installed

STEPS = 5
# AdamW divides a gradient by its own size. With the usual epsilon of 1e-8 a gradient that is nothing but rounding (a
# norm's, say, where it all but cancels) would move its weight as far as any other, and the comparison would measure
# that rounding. With an epsilon of the gradients' own size it is a gradient's size that moves a weight.
OPTIMIZER = optax.adamw(1e-2, eps=1e-3)

DP_TP = {"dp": 2, "fsdp": 2, "tp": 2}
CASES = [
    ("llama", "FULL_SHARD", DP_TP, True),
    ("llama", "OPTIMIZER", DP_TP, True),
    ("llama", "FULL_SHARD", {"pp": 2, "fsdp": 2, "tp": 2}, False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("llama", "NO_SHARD", DP_TP, True),
            ("llama", "SHARD_GRAD_OP", DP_TP, True),
            ("llama", "HYBRID_SHARD", DP_TP, True),
            ("llama", "NO_SHARD", {"dp": 8}, False),
            ("llama", "FULL_SHARD", {"fsdp": 8}, False),
            ("mixtral", "FULL_SHARD", {"fsdp": 2, "ep": 2, "tp": 2}, False),
            ("mixtral", "OPTIMIZER", {"dp": 2, "ep": 2, "tp": 2}, False),
        )
    ),
]
OFTEN = ("OPTIMIZER", "FULL_SHARD")
STRATEGIES = [s if s in OFTEN else pytest.param(s, marks=pytest.mark.slow) for s in ShardingStrategy]


@pytest.mark.parametrize(("name", "strategy", "mesh", "parallel"), CASES, ids=str)
def test_five_steps_are_the_five_steps_of_one_device(name, strategy, mesh, parallel):
    losses, model = run(name, on(mesh, strategy=strategy, sequence_parallel=parallel))
    wanted_losses, wanted = on_one_device(name)
    assert wanted_losses[-1] < wanted_losses[0] - 0.01  # it learns
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    for leaf, a, b in zip(leaves(wanted), jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True):
        assert distance(a, b) <= 1e-5, leaf.path


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_devices_hold_the_bytes_that_arithmetic_says(strategy):
    """Parameters and optimizer state by their live arrays, gradients by what the compiler gives out for them."""
    sharding = on(DP_TP, strategy=strategy)
    model = born("llama", sharding)
    state = init_state(model, make_optimizer("adamw", model))
    assert bytes_of(state.model) == {4 * share(strategy.cuts_parameters)}
    moments = {4 * 2 * share(strategy.cuts_optimizer) + 4}  # and the count of steps
    assert bytes_of(state.optimizer) == moments

    def gradients(model, batch):
        return gradients_of(model, batch, dtype=jnp.float32, remat="full", microbatches=1)[1]

    memory = jax.jit(gradients).lower(model, batch("llama")).compile().memory_analysis()
    # An output that is a tuple has a table of pointers to its parts.
    pointers = 8 * len(list(leaves(model)))
    assert memory.output_size_in_bytes == 4 * share(strategy.cuts_gradients) + pointers


def test_fsdp_gathers_a_layer_at_a_time_and_sums_its_gradient_at_once():
    """In the loop over layers, and nothing as large as a stack."""
    compiled, mesh = step_of("FULL_SHARD")
    program = compiled.as_text()
    sizes = stacked_bytes()
    found = [c for c in hlo.read(program, mesh).collectives if "fsdp" in c.axes]
    gathers = [c for c in found if c.kind == "all-gather"]
    # Each stack's layers are gathered forwards and, thrown away since, backwards.
    assert sum(c.bytes for c in gathers) >= 2 * sizes["all"]
    assert sum(c.count for c in gathers) >= 2 * config("llama").layers * 7  # matrices of a layer
    largest = max(int(np.prod(shape)) for shape in gathered_shapes(program))
    assert 4 * largest <= max(sizes["layer"], sizes["ends"])
    summed = sum(c.bytes for c in found if c.kind in ("all-reduce", "reduce-scatter", "all-to-all"))
    assert summed >= sizes["all"]
    rows = 2 * 4 * ROWS * SEQUENCE // 8  # tokens and targets
    state = 3 * 4 * share(True, tp=1, fsdp=8) + 2 * 4  # and two counts of steps
    assert compiled.memory_analysis().argument_size_in_bytes == state + rows


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP"])
def test_without_fsdp_no_layer_is_gathered_for_its_matmuls(strategy):
    compiled, mesh = step_of(strategy)
    found = [c for c in hlo.read(compiled.as_text(), mesh).collectives if "fsdp" in c.axes]
    gathered = sum(c.bytes for c in found if c.kind == "all-gather")
    everything = 4 * share(False, tp=1, fsdp=8)
    # Under ZeRO-1 and 2 the parameters are gathered once, after the optimizer has updated each part where its state is.
    assert gathered <= (0 if strategy == "NO_SHARD" else 1.01 * everything)
    assert gathered >= (0 if strategy == "NO_SHARD" else 0.95 * stacked_bytes()["all"])
    summed = sum(c.bytes for c in found if c.kind in ("all-reduce", "reduce-scatter", "all-to-all"))
    assert summed >= stacked_bytes()["all"]


@pytest.mark.slow
@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
def test_on_gpus_gradients_are_reduced_and_scattered_where_their_parts_belong():
    cases = [{"strategy": strategy} for strategy in ("NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "FULL_SHARD")]
    found = dict(zip((c["strategy"] for c in cases), compiled("cuda", "h100:8", cases, mesh=(1, 8, 1)), strict=True))

    def moved(strategy, kind):
        return sum(c["bytes"] for c in found[strategy].collectives if c["kind"] == kind)

    matrices = 2 * 12 * (4 * CONFIG.embed**2 + 3 * CONFIG.embed * CONFIG.mlp)  # bfloat16
    for strategy in ("SHARD_GRAD_OP", "FULL_SHARD"):
        assert moved(strategy, "reduce-scatter") >= matrices
        assert moved(strategy, "all-reduce") < 0.1 * matrices
    assert moved("NO_SHARD", "all-reduce") >= matrices
    assert moved("NO_SHARD", "reduce-scatter") == 0
    assert moved("FULL_SHARD", "all-gather") >= 2 * matrices
    totals = [found[c["strategy"]].total for c in cases]
    assert totals == sorted(totals, reverse=True)


def run(name, sharding):
    """The losses of five steps, and the model after them."""
    state, losses = init_state(born(name, sharding), OPTIMIZER), []
    pp = sharding.size("pp") > 1
    step = make_step(OPTIMIZER, precision="float32", microbatches=2 if pp else 1)
    for seed in range(STEPS):
        state, metrics = step(state, batch(name, seed=seed % 2))
        losses.append(float(metrics.loss))
    return losses, state.model


@functools.cache
def on_one_device(name):
    return run(name, on((1, 1, 1)))


def share(cut, tp=2, fsdp=2):
    """Parameters on one device, counted by hand: all matrices are cut by tp and, if `cut`, by fsdp."""
    c = config("llama")
    features = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = c.layers * (c.embed * (2 * features[0] + 2 * features[1]) + 3 * c.embed * c.mlp)
    tables = 2 * c.padded_vocab * c.embed
    norms = (2 * c.layers + 1) * c.embed  # whole everywhere
    return (matrices + tables) // (tp * fsdp if cut else tp) + norms


def stacked_bytes():
    """Of the float32 matrices: of all layers, of one stack's largest layer, of one of the ends."""
    c = config("llama")
    layer = 4 * max(c.embed * c.heads * c.head_dim, c.embed * c.mlp)
    each = c.embed * 2 * c.head_dim * (c.heads + c.kv_heads) + 3 * c.embed * c.mlp
    return {"all": 4 * c.layers * each, "layer": layer, "ends": 4 * c.padded_vocab * c.embed}


def bytes_of(tree):
    """Bytes of the live arrays on each device, as a set: one figure if all devices hold as much."""
    held = {}
    for array in jax.tree.leaves(tree):
        for part in array.addressable_shards:
            held[part.device] = held.get(part.device, 0) + part.data.nbytes
    return set(held.values())


@functools.cache
def step_of(strategy):
    """A compiled step on fsdp=8, and its mesh."""
    sharding = on({"fsdp": 8}, strategy=strategy)
    rule = lambda model: make_optimizer("adamw", model)  # noqa: E731
    state = abstract_state(config("llama"), sharding, rule, precision="float32")
    step = make_step(rule(state.model), precision="float32")
    return step.lower(state, abstract_batch(ROWS, SEQUENCE, sharding)).compile(), dict(sharding.mesh.shape)


def gathered_shapes(program):
    """The shapes of all that is gathered, whole."""
    for line in program.splitlines():
        if found := re.search(r"= f32\[([\d,]+)\]\S* all-gather\(", line):
            yield tuple(map(int, found[1].split(",")))
