"""A model over stages gives the logits and writes the tokens that it gives and writes on one device."""

import dataclasses

import jax
import numpy as np
import pytest

import tbjax
from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.cut import cut
from tbjax.generate import Rows, decode, generate, prefill
from tbjax.mesh import make_mesh
from tbjax.pipeline.schedule import Interleaved1F1B
from tbjax.planner import hlo
from tbjax.sharding import Sharding, leaves

CONFIG = ModelConfig(
    family="llama",
    vocab_size=257,
    embed=32,
    mlp=64,
    heads=6,
    kv_heads=3,
    head_dim=16,
    layer_kinds=(LayerKind(),) * 5,
    max_positions=128,
)
WINDOWS = dataclasses.replace(CONFIG, layer_kinds=(LayerKind(window=5), LayerKind()) * 4, tie_embeddings=True)
EXPERTS = dataclasses.replace(
    CONFIG, layer_kinds=(LayerKind(sparse=True),) * 4, moe=MoE(experts=4, experts_per_token=2, mlp=32)
)
PROMPTS = ([5, 9, 200, 31], [7], [250, 3, 3, 8, 100, 41, 12, 13, 14, 15, 16, 17])
NEW = 10


def model(config, mesh, laid=None, times=12):
    """Random weights, large enough as they are that the likeliest token is no near tie."""
    count = int(np.prod([*mesh.values()]))
    sharding = Sharding(make_mesh(mesh, jax.devices()[:count]), cut=laid)

    def make():
        made = tbjax.CausalLM(config, sharding, key=jax.random.key(3))
        for leaf in leaves(made):
            if leaf.path.endswith("weight") and len(leaf.variable.shape) > 1:
                leaf.variable[...] = leaf.variable[...] * times
        return made

    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


@pytest.fixture(scope="module", params=[CONFIG, pytest.param(WINDOWS, marks=pytest.mark.slow),
                                        pytest.param(EXPERTS, marks=pytest.mark.slow)],
                ids=["dense", "windows", "experts"])  # fmt: skip
def alone(request):
    """A config, and what its model writes on one device."""
    made = model(request.param, {"dp": 1})
    return request.param, made, generate(made, PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize(
    "mesh",
    [{"pp": 2}, {"pp": 2, "tp": 2}, {"pp": 4}, pytest.param({"pp": 2, "fsdp": 2, "tp": 2}, marks=pytest.mark.slow)],
    ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()),
)
def test_tokens_are_those_of_one_device(alone, mesh):
    config, _, expected = alone
    assert generate(model(config, mesh), PROMPTS, max_new_tokens=NEW) == expected


def test_an_end_token_ends_its_row_only_and_one_token_is_enough(alone):
    config, _, expected = alone
    made = model(config, {"pp": 2, "tp": 2})
    eos = expected[0][4]
    for row, whole in zip(generate(made, PROMPTS, max_new_tokens=NEW, eos_tokens=[eos]), expected, strict=True):
        assert row == (whole[: whole.index(eos)] if eos in whole else whole)
    assert generate(made, PROMPTS, max_new_tokens=1) == [row[:1] for row in expected]
    assert generate(made, PROMPTS[1:2], max_new_tokens=NEW) == expected[1:2]  # fewer rows than stages


@pytest.mark.slow
def test_layers_that_lie_for_another_schedule_are_found(alone):
    config, _, expected = alone
    repeats = config.groups[0].repeats
    made = model(config, {"pp": 2}, cut(repeats, 2, Interleaved1F1B(2)))
    assert generate(made, PROMPTS, max_new_tokens=NEW) == expected


@pytest.mark.parametrize(
    "mesh",
    [pytest.param({"pp": 4}, marks=pytest.mark.slow), {"pp": 2, "dp": 2, "tp": 2}],
    ids=["pp4", "pp2-dp2-tp2"],
)
def test_logits_are_those_of_one_device(alone, mesh):
    config, *_ = alone
    # Half as large, so that layers do not multiply what is rounded: over tp alone it is then 2e-6, and 8e-6 otherwise.
    reference, made = model(config, {"dp": 1}, times=6), model(config, mesh, times=6)
    tokens = np.random.default_rng(0).integers(0, 257, (3, 12)).astype(np.int32)
    mask = (np.arange(12)[None] >= np.array([0, 2, 5])[:, None]).astype(np.int32)
    found, wanted = (np.asarray(m(tokens, mask))[mask.astype(bool)] for m in (made, reference))
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_every_stage_holds_the_keys_and_values_of_its_own_layers_and_sends_nothing_but_states():
    made = model(CONFIG, {"pp": 2, "tp": 2})
    tokens = np.ones((2, 32), np.int32)
    rows, eos = Rows(written=np.zeros(2, np.int32), least=np.zeros(2, np.int32)), np.asarray([-1], np.int32)
    _, state = prefill(made, tokens, tokens, {}, rows, eos, np.zeros(2, bool), capacity=64)
    for array in jax.tree.leaves(state.cache.layers):
        assert array.shape == (6, 2, 1, 4, 64, 16)  # three heads over two devices are four; five layers six rows
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2, 1, 2, 64, 16)}
    compiled = decode.lower(made, state, {}, eos, np.int32(8), room=32).compile()
    found = hlo.read(str(compiled.as_text()), {axis: made.mesh.shape[axis] for axis in made.mesh.axis_names})
    between = [c for c in found.collectives if "pp" in c.axes]
    # The residual stream of one group, and in a circle and at the end what all must know.
    assert {c.kind for c in between} <= {"collective-permute", "all-reduce"}
    assert [c.bytes // c.count for c in between if c.kind == "collective-permute"] == [4 * CONFIG.embed]
