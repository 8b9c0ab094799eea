"""Whatever rows a pipeline's stages have for the layers, what is on disk has them in order."""

import jax
import numpy as np
import pytest

import tbjax
from tbjax import checkpoint, rows
from tbjax.cut import cut
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.pipeline.schedule import ZBV
from tbjax.sharding import Sharding, leaves
from tests import tiny

LAYERS = 5
CONFIG = tiny.our_config(tiny.Case("five", "llama", {"num_hidden_layers": LAYERS}))


def sharding(mesh, laid=None):
    count = int(np.prod([*mesh.values()]))
    return Sharding(make_mesh(mesh, jax.devices()[:count]), cut=laid)


LAID = {
    "three stages": sharding({"pp": 3}),
    "a short stage in the middle": sharding({"pp": 3, "tp": 2}, cut(LAYERS, 3, counts=(2, 1, 2))),
    "down and up": sharding({"pp": 2, "fsdp": 2, "tp": 2}, cut(LAYERS, 2, ZBV())),
}


def born(layout):
    return jax.jit(lambda: Decoder(CONFIG, layout, key=jax.random.key(2)))()


def abstract(layout):
    return layout.place(jax.eval_shape(lambda: Decoder(CONFIG, layout)))


def equal(left, right):
    """Whether models have the same layers and the same ends."""
    left, right = (rows.in_order(by_path(model), model) for model in (left, right))
    return left.keys() == right.keys() and all(np.array_equal(left[path], right[path]) for path in left)


def by_path(model):
    return dict(zip((leaf.path for leaf in leaves(model)), jax.tree.leaves(model), strict=True))


@pytest.fixture(scope="module")
def plain():
    return born(sharding({"dp": 1}))


@pytest.mark.parametrize("name", LAID)
def test_a_model_has_the_same_layers_wherever_they_lie(name, plain):
    layout = LAID[name]
    moved = rows.moved(plain, layout)
    assert equal(moved, plain)
    assert equal(rows.moved(moved, LAID["three stages"]), plain)
    for leaf, array in zip(leaves(moved), jax.tree.leaves(moved), strict=True):
        assert array.sharding.is_equivalent_to(layout.parameter(leaf.dims, array.shape), array.ndim), leaf.path
    order = np.asarray(layout.stack(LAYERS).order)
    query = np.asarray(moved.stacks[0][0].attention.query.weight)
    assert not query[order < 0].any()
    for number, layer in enumerate(moved.layers):
        assert np.array_equal(layer.attention.query.weight, plain.stacks[0][0].attention.query.weight[number])


def test_checkpoints_know_nothing_of_rows(tmp_path, plain):
    first, *others = LAID.values()
    checkpoint.save(rows.moved(plain, first), tmp_path / "saved")
    stored = checkpoint.read_about(tmp_path / "saved").parameters
    assert stored["stacks.0.0.attention.query.weight"].shape[0] == LAYERS
    for layout in (*others, plain.sharding):
        assert equal(checkpoint.restore(abstract(layout), tmp_path / "saved"), plain)


def test_safetensors_know_nothing_of_rows(tmp_path):
    case = tiny.Case("five", "llama", {"num_hidden_layers": LAYERS})
    tiny.save(case, tmp_path / "hub")
    loaded = tbjax.load(tmp_path / "hub", make_mesh({"pp": 3, "tp": 2}, jax.devices()[:6]), progress=False)
    assert loaded.stacks[0][0].attention.query.weight.shape[0] == 6
    loaded.save_pretrained(tmp_path / "out")
    one = make_mesh({"dp": 1}, jax.devices()[:1])
    original, again = (tbjax.load(tmp_path / name, one, progress=False) for name in ("hub", "out"))
    assert equal(loaded, original)
    assert equal(again, original)
