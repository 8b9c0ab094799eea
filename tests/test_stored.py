"""Arrays in a folder: they come back in whatever shape of pieces, and say so when they do not fit."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbjax import stored
from tbjax.mesh import make_mesh

SPECS = {
    "stacks.0.weight": PartitionSpec(None, "fsdp", "tp"),
    "bias": PartitionSpec("tp"),
    "count": PartitionSpec(),
    "half": PartitionSpec(("fsdp", "tp"), None),
    "zeros": PartitionSpec(),
    "whole": PartitionSpec(None, None),
}


def arrays():
    draw = np.random.default_rng(0)
    return {
        "stacks.0.weight": draw.standard_normal((3, 8, 16)).astype(np.float32),
        "bias": draw.integers(0, 99, 8),
        "count": np.int32(7),
        "half": draw.standard_normal((8, 4)).astype(jnp.bfloat16),
        "zeros": np.zeros(5, np.float32),
        "whole": draw.standard_normal((64, 64)).astype(np.float32),
    }


def placed(mesh):
    return {path: jax.device_put(array, NamedSharding(mesh, SPECS[path])) for path, array in arrays().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays")
    stored.start(path, placed(make_mesh((1, 4, 2))))()
    stored.finish(path)
    return path


@pytest.mark.parametrize("mesh", [(1, 4, 2), (1, 2, 4), (1, 1, 8), (8, 1, 1)])
def test_every_number_comes_back_on_every_mesh(folder, mesh):
    wanted = placed(make_mesh(mesh))
    found = stored.read(folder, wanted)
    assert list(found) == list(wanted)
    for path, array in found.items():
        assert array.sharding == wanted[path].sharding
        for shard, meant in zip(array.addressable_shards, wanted[path].addressable_shards, strict=True):
            assert np.array_equal(shard.data, meant.data), path


def test_parts_are_the_steps_own_to_take(folder):
    """On a CPU, JAX would take over memory of ours, which a step that is given it cannot use for what comes out."""
    found = stored.read(folder, placed(make_mesh((1, 4, 2))))["whole"]
    pointers = {shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards}
    after = jax.jit(lambda array: array + 1, donate_argnums=0)(found)
    assert {shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards} == pointers


def test_what_is_not_there_or_of_another_shape_is_named(folder):
    wanted = placed(make_mesh((1, 4, 2)))
    with pytest.raises(ValueError, match=r"bias has shape \[8\], wanted is \[5\]"):
        stored.read(folder, {"bias": wanted["zeros"]})
    with pytest.raises(ValueError, match="nothing"):
        stored.read(folder, {"nothing": wanted["zeros"]})


def test_a_write_that_fails_is_told_of_once(caplog, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: heard.append(str(told)))
    with stored.hushed():
        logging.getLogger("absl").error("[process=0] _SignalingThread.run() raised an exception: no space")
        logging.getLogger("absl").error("anything else")
        sys.unraisablehook(type("Told", (), {"exc_value": RuntimeError("Event loop is closed")}))
        sys.unraisablehook(type("Told", (), {"exc_value": 1, "__str__": lambda self: "other"})())
    logging.getLogger("absl").error("_SignalingThread.run() raised an exception: afterwards")
    assert [record.getMessage().split()[0] for record in caplog.records] == ["anything", "_SignalingThread.run()"]
    assert heard == ["other"]
