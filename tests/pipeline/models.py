"""The models and meshes that pipelines are tested with, and what the tests compute of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax import rows
from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, leaves
from tbjax.training import IGNORED, Batch
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
# tp=2 divides them only with one head more.
ODD_HEADS = dataclasses.replace(DENSE, heads=6, kv_heads=3, head_dim=16)
# Two patterns one after the other.
MIXED = dataclasses.replace(DENSE, layer_kinds=(LayerKind(window=5),) * 6 + (LayerKind(),) * 2)
MODELS = {
    "dense": DENSE,
    "tied": TIED,
    "experts": EXPERTS,
    "windows": WINDOWS,
    "odd heads": ODD_HEADS,
    "mixed": MIXED,
}

INSIDE = {"pp": 2, "fsdp": 2, "tp": 2}


@functools.cache
def gradients(microbatches, schedule=None, remat: Any = "full"):
    return jax.jit(
        lambda model, batch: gradients_of(
            model, batch, dtype=jnp.float32, remat=remat, microbatches=microbatches, schedule=schedule
        )
    )


def assert_same_gradients(
    name, mesh, schedule, microbatches, remat: Any = "full", *, layers=8, cut=None, batch_rows=16, padded=False
):
    """Loss, gradients and targets are those of the model without a pipeline."""
    model = born(name, dataclasses.replace(on(mesh), cut=cut), layers)
    loss, found, targets = gradients(microbatches, schedule, remat)(model, batch(batch_rows, padded))
    wanted_loss, wanted, wanted_targets = reference(name, microbatches, layers, batch_rows, padded)
    assert int(targets) == int(wanted_targets)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    # A stage with layers to spare has rows of zeros; what is left is in the layers' order.
    ordered = rows.in_order(found, model)
    assert sum(map(size, found.values())) == pytest.approx(sum(map(size, ordered.values())), rel=1e-4)
    assert ordered.keys() == wanted.keys()
    for path, gradient in ordered.items():
        assert gradient.dtype == wanted[path].dtype
        assert distance(gradient, wanted[path]) <= 1e-5, path


@functools.cache
def reference(name, microbatches, layers=8, batch_rows=16, padded=False):
    return gradients(microbatches)(born(name, on({"dp": 1}), layers), batch(batch_rows, padded))


@functools.cache
def born(name, sharding, layers=8):
    """A model, with the same weights on every mesh: made on one device, once, and moved from there."""
    if sharding is on({"dp": 1}):
        return jax.jit(maker(name, sharding, layers))()
    return rows.moved(born(name, on({"dp": 1}), layers), sharding)


def abstract(name, sharding, layers=8):
    return sharding.place(jax.eval_shape(maker(name, sharding, layers)))


def maker(name, sharding, layers):
    config = MODELS[name]
    if layers != config.layers:
        width = len(config.groups[0].pattern)
        config = dataclasses.replace(config, layer_kinds=config.layer_kinds[:width] * (layers // width))

    def make():
        model = Decoder(config, sharding, key=jax.random.key(1))
        # Routers of random models are near ties, which rounding would decide.
        grow = {leaf.path: 30.0 if "router" in leaf.path else 1.0 for leaf in leaves(model)}
        scaled = [a * grow[leaf.path] for leaf, a in zip(leaves(model), jax.tree.leaves(model), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(model), scaled)

    return make


@functools.cache
def batch(batch_rows=16, padded=False):
    random = np.random.default_rng(0)
    tokens = random.integers(0, DENSE.vocab_size, (batch_rows, SEQUENCE + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:] = IGNORED  # so the microbatches have different numbers of targets
    targets[5, :2] = IGNORED
    mask = np.arange(SEQUENCE)[None] >= np.arange(batch_rows)[:, None] % 5
    return Batch(tokens[:, :-1], targets, mask.astype(np.int32) if padded else None)


@functools.cache
def _on(axes):
    return Sharding(make_mesh(dict(axes), jax.devices()[: math.prod(size for _, size in axes)]))


def on(mesh):
    return _on(tuple(mesh.items()))


def size(array):
    return np.sum(np.abs(np.asarray(array, np.float64)))


def distance(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30)
