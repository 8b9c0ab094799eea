"""Small models and batches for tests of the training step, and what they are held against."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, leaves
from tbjax.training import IGNORED, Batch
from tests import tiny

ROWS, SEQUENCE = 8, 16


def config(name, layers=None):
    found = tiny.our_config(tiny.BY_NAME[name])
    if layers is not None:
        found = dataclasses.replace(found, layer_kinds=found.layer_kinds[:1] * layers)
    if found.moe:
        found = dataclasses.replace(found, moe=dataclasses.replace(found.moe, auxiliary_loss_weight=0.1))
    return found


def on(mesh, **options):
    sizes = list(mesh.values()) if isinstance(mesh, dict) else mesh
    return Sharding(make_mesh(mesh, jax.devices()[: int(np.prod(sizes))]), **options)


def born(name, sharding, dtype=jnp.float32, layers=None):
    """A model with weights that do not depend on the mesh."""
    make = lambda: Decoder(config(name, layers), sharding, dtype=dtype, key=jax.random.key(1))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


@functools.cache
def batch(name, rows=ROWS, sequence=SEQUENCE, seed=0):
    """Rows with different numbers of targets."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, config(name).vocab_size, (rows, sequence + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:] = IGNORED
    targets[rows // 2 + 1, :2] = IGNORED
    return Batch(tokens[:, :-1], targets)


def distance(ours, reference):
    """Of two arrays, relative to the second."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30)


def farthest(ours, reference):
    """The parameter that differs most between two models, and by how much."""
    return max(
        (distance(a, b), leaf.path)
        for leaf, a, b in zip(leaves(reference), jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    )


def same(ours, reference):
    """Whether two trees are equal bit for bit."""
    return all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    )
