"""A pipeline computes what the model computes without one: loss, gradients, steps of training, hidden states."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.pipeline.execute import pipelined_hidden
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, ForwardOnly, GPipe, Interleaved1F1B, OneFOneB
from tbjax.planner import hlo
from tbjax.sharding import Sharding, leaves
from tbjax.training import IGNORED, Batch, init_state, make_optimizer, make_step
from tbjax.training.step import gradients_of

SEQUENCE = 16
DENSE = ModelConfig(
    family="llama",
    vocab_size=250,  # padded: not a multiple of 128
    embed=64,
    mlp=96,
    heads=8,
    kv_heads=4,
    head_dim=8,
    layer_kinds=(LayerKind(),) * 8,
    max_positions=64,
)
TIED = dataclasses.replace(DENSE, tie_embeddings=True, embed_scale=8.0, logits_softcap=20.0)
EXPERTS = dataclasses.replace(
    DENSE,
    layer_kinds=(LayerKind(sparse=True),) * 8,
    moe=MoE(experts=4, experts_per_token=2, mlp=32, auxiliary_loss_weight=0.1),
)
# Two kinds of layers in turn: four repeats of the pattern.
WINDOWS = dataclasses.replace(DENSE, layer_kinds=(LayerKind(window=5), LayerKind()) * 4)
MODELS = {"dense": DENSE, "tied": TIED, "experts": EXPERTS, "windows": WINDOWS}

INSIDE = {"pp": 2, "fsdp": 2, "tp": 2}
ALL = (GPipe(), OneFOneB(), Interleaved1F1B(2), ZBH1(), ZBH2(), ZBV())
CASES = [
    *(("dense", INSIDE, schedule, 4, "full") for schedule in ALL),
    *(("dense", {"pp": 2, "tp": 2}, schedule, 2, "none") for schedule in (OneFOneB(), ZBH1())),
    *(("dense", {"pp": 2, "tp": 2}, schedule, 2, "dots") for schedule in (OneFOneB(), ZBH1())),
    *(("dense", {"pp": 2, "dp": 2}, schedule, 4, "stage") for schedule in (GPipe(), ZBV())),
    *(("dense", {"pp": 4, "fsdp": 2}, schedule, 8, "full") for schedule in (OneFOneB(), ZBH2(), Interleaved1F1B(2))),
    ("dense", {"pp": 4, "tp": 2}, OneFOneB(), 1, "full"),  # fewer microbatches than stages
    ("dense", {"pp": 4}, ZBV(), 2, "stage"),
    ("dense", {"pp": 8}, OneFOneB(), 16, "full"),
    ("dense", {"pp": 8}, ZBH1(), 8, "full"),
    ("tied", INSIDE, OneFOneB(), 4, "full"),
    ("tied", {"pp": 4, "tp": 2}, ZBH1(), 4, "stage"),
    ("windows", {"pp": 4, "tp": 2}, OneFOneB(), 4, "full"),
    ("experts", {"pp": 2, "ep": 2, "tp": 2}, OneFOneB(), 4, "full"),
    ("experts", {"pp": 2, "ep": 2, "tp": 2}, ZBH1(), 4, "stage"),
    ("experts", {"pp": 4, "fsdp": 2}, Interleaved1F1B(2), 4, "none"),
]


def named(case):
    model, mesh, schedule, microbatches, remat = case
    return f"{model}-{'-'.join(f'{axis}{size}' for axis, size in mesh.items())}-{schedule.name}-m{microbatches}-{remat}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_loss_and_gradients_are_those_of_the_model_without_a_pipeline(case):
    name, mesh, schedule, microbatches, remat = case
    step = gradients(microbatches, schedule, remat)
    loss, found, targets = step(born(name, on(mesh)), batch())
    wanted_loss, wanted, wanted_targets = reference(name, microbatches)
    assert int(targets) == int(wanted_targets)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for path, gradient in found.items():
        assert gradient.dtype == wanted[path].dtype
        assert distance(gradient, wanted[path]) <= 1e-5, path


def test_padding_is_seen_by_every_stage():
    mask = np.arange(SEQUENCE)[None] >= np.arange(16)[:, None] % 5
    padded = batch()._replace(mask=mask.astype(np.int32))
    loss, found, _ = gradients(4, OneFOneB(), "full")(born("dense", on({"pp": 2, "tp": 2})), padded)
    wanted_loss, wanted, _ = gradients(4)(born("dense", on({"dp": 1})), padded)
    assert abs(wanted_loss - reference("dense", 4)[0]) > 1e-4
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for path, gradient in found.items():
        assert distance(gradient, wanted[path]) <= 1e-5, path


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_steps_of_training_are_the_same_steps(precision):
    losses, model = train(on(INSIDE), precision)
    wanted_losses, wanted = train(on({"dp": 1}), precision)
    tolerance = {"float32": 1e-5, "mixed": 2e-3}[precision]
    np.testing.assert_allclose(losses, wanted_losses, rtol=tolerance)
    assert wanted_losses[-1] < wanted_losses[0]  # it learns
    for leaf, a, b in zip(leaves(model), jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(model.sharding.parameter(leaf.dims, a.shape), a.ndim), leaf.path
        assert a.dtype == b.dtype == jnp.float32
        # AdamW divides gradients by their size: what bfloat16 rounds in a small one, it makes large.
        assert precision == "mixed" or distance(a, b) <= 1e-5, leaf.path


@pytest.mark.parametrize(
    ("name", "mesh", "schedule"),
    [
        ("dense", INSIDE, None),
        ("experts", {"pp": 2, "ep": 2}, None),
        ("tied", {"pp": 4}, ForwardOnly()),
    ],
)
def test_hidden_states_are_those_of_the_model_without_a_pipeline(name, mesh, schedule):
    run = jax.jit(lambda model, batch: pipelined_hidden(model, batch, schedule=schedule, microbatches=4))
    model = born(name, on(mesh))
    found, wanted = run(model, batch()), born(name, on({"dp": 1})).hidden(batch().tokens)
    assert distance(found.states, wanted.states) <= 1e-5
    if name == "experts":
        np.testing.assert_allclose(found.auxiliary_loss, wanted.auxiliary_loss, rtol=1e-5)
    assert distance(jax.jit(Decoder.logits)(model, found.states), born(name, on({"dp": 1}))(batch().tokens)) <= 1e-5


@pytest.mark.parametrize("schedule", [OneFOneB(), ZBH1()], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize(("name", "mesh"), [("dense", INSIDE), ("experts", {"pp": 2, "ep": 2, "tp": 2})])
def test_between_stages_there_are_permutes_and_one_sum_of_the_ends(name, mesh, schedule):
    sharding = on(mesh)
    compiled = gradients(4, schedule, "full").lower(born(name, sharding), batch()).compile()
    found = hlo.read(str(compiled.as_text()), {axis: sharding.mesh.shape[axis] for axis in sharding.mesh.axis_names})
    between = [c for c in found.collectives if "pp" in c.axes]
    assert {c.kind for c in between} == {"collective-permute", "all-reduce"}
    assert all(c.axes == ("pp",) for c in between)
    # Of the ends' gradients and the loss, after the loop: they are not many, nor more than the ends are large.
    [total] = [c for c in between if c.kind == "all-reduce"]
    ends = 4 * (2 * 256 * 64 + 64) + 4
    assert total.bytes <= ends
    # A permute within a stage would make other stages wait, which do something else.
    assert [c.axes for c in found.collectives if c.kind == "collective-permute"] == [("pp",)]


def test_what_cannot_be_cut_is_refused_with_what_would_do():
    run = gradients(4, OneFOneB(), "full")
    with pytest.raises(ValueError, match="'layers' of size 8 does not divide over pp=3"):
        born("dense", on({"pp": 3}))
    with pytest.raises(
        ValueError, match=r"pp=2 with 8 chunks a stage: 8 layers do not divide into 16 equal pieces; pp=1"
    ):
        gradients(4, Interleaved1F1B(8), "full")(born("dense", on({"pp": 2})), batch())
    with pytest.raises(ValueError, match="pp=2: the 8 layers of this model follow no single pattern, but 2 one after"):
        run(born("mixed", on({"pp": 2})), batch())
    with pytest.raises(ValueError, match="schedule='forward' only runs forward"):
        gradients(4, ForwardOnly(), "full")(born("dense", on({"pp": 2})), batch())
    with pytest.raises(ValueError, match="microbatches=2 is not a multiple of stages=4; 4 would do"):
        gradients(2, Interleaved1F1B(2), "full")(born("dense", on({"pp": 4})), batch())
    with pytest.raises(ValueError, match="does not divide over dp\\*fsdp\\*ep=2 devices in 3 microbatches"):
        gradients(3, OneFOneB(), "full")(born("dense", on({"pp": 2, "dp": 2})), batch())
    with pytest.raises(ValueError, match="remat='stage' keeps the input of a pipeline stage"):
        gradients(4, None, "stage")(born("dense", on({"dp": 1})), batch())
    with pytest.raises(ValueError, match="remat='some' is unknown"):
        gradients(4, OneFOneB(), "some")(born("dense", on({"pp": 2})), batch())


@functools.cache
def gradients(microbatches, schedule=None, remat: Any = "full"):
    return jax.jit(
        lambda model, batch: gradients_of(
            model, batch, dtype=jnp.float32, remat=remat, microbatches=microbatches, schedule=schedule
        )
    )


@functools.cache
def reference(name, microbatches):
    return gradients(microbatches)(born(name, on({"dp": 1})), batch())


@functools.cache
def born(name, sharding):
    config = MODELS.get(name) or dataclasses.replace(DENSE, layer_kinds=(LayerKind(window=5),) * 6 + (LayerKind(),) * 2)

    def make():
        model = Decoder(config, sharding, key=jax.random.key(1))
        # Routers of random models are near ties, which rounding would decide.
        grow = {leaf.path: 30.0 if "router" in leaf.path else 1.0 for leaf in leaves(model)}
        scaled = [a * grow[leaf.path] for leaf, a in zip(leaves(model), jax.tree.leaves(model), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(model), scaled)

    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


@functools.cache
def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(0, DENSE.vocab_size, (16, SEQUENCE + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:] = IGNORED  # so the microbatches have different numbers of targets
    targets[5, :2] = IGNORED
    return Batch(tokens[:, :-1], targets)


def train(sharding, precision):
    """The losses of three steps, and the model after them."""
    # The state takes the model's memory, so it gets a model of its own.
    model = jax.tree.map(jnp.copy, born("dense", sharding))
    rule = make_optimizer("adamw", model, learning_rate=1e-2)
    step = make_step(rule, precision=precision, microbatches=4)
    state, losses = init_state(model, rule), []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    return losses, state.model


@functools.cache
def _on(axes):
    return Sharding(make_mesh(dict(axes), jax.devices()[: math.prod(size for _, size in axes)]))


def on(mesh):
    return _on(tuple(mesh.items()))


def distance(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30)
