"""Whatever rows a pipeline's stages have for the layers, what is on disk has them in order."""

import functools

import jax
import numpy as np
import pytest

import tbjax
from tbjax import checkpoint, rows
from tbjax.cut import cut
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.pipeline.schedule import ZBV, Interleaved1F1B
from tbjax.sharding import Sharding, leaves
from tests import tiny

LAYERS = 5


@functools.cache
def config(layers):
    return tiny.our_config(tiny.Case(f"{layers} layers", "llama", {"num_hidden_layers": layers}))


def sharding(mesh, laid=None):
    count = int(np.prod([*mesh.values()]))
    return Sharding(make_mesh(mesh, jax.devices()[:count]), cut=laid)


LAID = {
    "three stages": sharding({"pp": 3}),
    "a short stage in the middle": sharding({"pp": 3, "tp": 2}, cut(LAYERS, 3, counts=(2, 1, 2))),
    "down and up": sharding({"pp": 2, "fsdp": 2, "tp": 2}, cut(LAYERS, 2, ZBV())),
}

# Layers that divide: there is no hole, and the shape of a stack does not tell that it is in another order.
EVEN = 4
LAID_EVENLY = {
    "down and up": sharding({"pp": 2, "tp": 2}, cut(EVEN, 2, ZBV())),
    "round and round": sharding({"pp": 2}, cut(EVEN, 2, Interleaved1F1B(2))),
}


def born(layout, layers=LAYERS):
    return jax.jit(lambda: Decoder(config(layers), layout, key=jax.random.key(2)))()


def abstract(layout, layers=LAYERS):
    return layout.place(jax.eval_shape(lambda: Decoder(config(layers), layout)))


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


@pytest.mark.parametrize("name", LAID_EVENLY)
def test_an_order_without_holes_is_an_order_too(name, tmp_path):
    layout, plain = LAID_EVENLY[name], born(sharding({"dp": 1}), EVEN)
    moved = rows.moved(plain, layout)
    there, original = (model.stacks[0][0].attention.query.weight[...] for model in (moved, plain))
    assert np.array_equal(there, np.asarray(original)[list(layout.stack(EVEN).order)])
    assert there.sharding.spec[0] == "pp"
    assert equal(rows.moved(moved, plain.sharding), plain)
    checkpoint.save(plain, tmp_path / "saved")
    assert equal(checkpoint.restore(abstract(layout, EVEN), tmp_path / "saved"), moved)
    assert np.array_equal(
        checkpoint.restore(abstract(layout, EVEN), tmp_path / "saved").stacks[0][0].attention.query.weight, there
    )


@pytest.mark.parametrize("layout", [LAID["down and up"], LAID_EVENLY["down and up"]])
def test_what_lies_in_the_host_s_memory_is_put_in_order_and_back(layout):
    model = rows.moved(born(sharding({"dp": 1}), LAYERS if layout is LAID["down and up"] else EVEN), layout)
    path = "stacks.0.0.attention.query.weight"
    there = {path: by_path(model)[path]}
    hosted = jax.device_put(there[path], there[path].sharding.with_memory_kind("pinned_host"))
    in_order = rows.in_order({path: hosted}, model)
    assert np.array_equal(in_order[path], rows.in_order(there, model)[path])
    again = rows.on_stages(in_order, {path: hosted}, model)[path]
    assert np.array_equal(again, hosted)
    assert again.sharding.memory_kind == "pinned_host"


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
