"""Sums over devices by ring, by tree and in two levels: right, the same everywhere, and of the traffic they promise."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tbjax import collectives
from tbjax.collectives import Peers, all_reduce, hierarchical_all_reduce, ring_all_reduce, tree_all_reduce
from tbjax.planner import hlo

# Odd sizes, a scalar, nothing at all, several dtypes.
SHAPES = {"matrix": (5, 7), "long": (3, 11, 2), "scalar": (), "empty": (0, 4)}
RING, TREE = ring_all_reduce, tree_all_reduce


def on(size, function):
    """`function(tree, "x")` on each of `size` devices, jitted; arguments and results have the devices in front."""
    mesh = jax.make_mesh((size,), ("x",), devices=jax.devices()[:size], axis_types=(jax.sharding.AxisType.Auto,))

    def one(tree):
        return jax.tree.map(lambda a: a[None], function(jax.tree.map(lambda a: a[0], tree), "x"))

    spec = PartitionSpec("x")
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def values(size, integers=True):
    """Small whole numbers, whose sums are exact in any order, or any numbers."""
    random = np.random.default_rng(size)
    make = (lambda s: random.integers(-50, 50, s)) if integers else random.standard_normal
    tree = {name: np.asarray(make((size, *shape)), np.float32) for name, shape in SHAPES.items()}
    return tree | {"counts": random.integers(-50, 50, (size, 9)).astype(np.int32)}


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("algorithm", [RING, TREE])
def test_the_sum_is_exact_on_any_number_of_devices(algorithm, size):
    given = values(size)
    for name, found in on(size, algorithm)(given).items():
        assert found.dtype == given[name].dtype
        np.testing.assert_array_equal(found, np.broadcast_to(given[name].sum(0), given[name].shape), name)


@pytest.mark.parametrize(("size", "group"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (6, 2)])
@pytest.mark.parametrize("algorithm", ["compiler", "ring", "tree"])
def test_in_two_levels_too(algorithm, size, group):
    given = values(size)
    found = on(size, functools.partial(hierarchical_all_reduce, group=group, algorithm=algorithm))(given)
    for name in given:
        np.testing.assert_array_equal(found[name], np.broadcast_to(given[name].sum(0), given[name].shape), name)


@pytest.mark.parametrize("size", [5, 8])
@pytest.mark.parametrize("algorithm", [RING, TREE, functools.partial(hierarchical_all_reduce, group=1)])
def test_every_device_has_the_same_bits(algorithm, size):
    """Replicas that round differently drift apart."""
    given = values(size, integers=False)
    for name, found in on(size, algorithm)(given).items():
        np.testing.assert_allclose(found[0], given[name].sum(0), rtol=1e-5, atol=1e-5)
        assert all(np.array_equal(found[0], other) for other in found), name


def test_groups_sum_apart():
    def sums(tree, axis):
        peers = Peers.along(axis)
        return [all_reduce(tree, some, way) for some in (peers.inside(4), peers.across(4)) for way in ("ring", "tree")]

    given = np.arange(8, dtype=np.float32)[:, None]
    ring, tree, ring_across, tree_across = (a[:, 0].tolist() for a in on(8, sums)(given))
    assert ring == tree == [6] * 4 + [22] * 4
    assert ring_across == tree_across == [4, 6, 8, 10, 4, 6, 8, 10]


def test_parts_come_together_again():
    def there_and_back(tree, axis):
        return collectives.all_gather(collectives.reduce_scatter(tree, axis), axis, tree)

    given = values(4)["matrix"]
    for whole in on(4, there_and_back)(given):
        np.testing.assert_array_equal(whole, given.sum(0))


def collectives_of(size, algorithm, elements):
    program = on(size, algorithm).lower(jax.ShapeDtypeStruct((size, elements), jnp.float32)).compile()
    return {c.kind: c for c in hlo.read(str(program.as_text()), {"x": size}).collectives}


def test_a_ring_sends_each_byte_twice_and_a_tree_once_a_level():
    elements = 8 * 100
    ring = collectives_of(8, RING, elements)["collective-permute"]
    assert (ring.count, ring.bytes) == (2 * 7, 2 * 7 * 4 * elements // 8)
    tree = collectives_of(8, TREE, elements)["collective-permute"]
    assert (tree.count, tree.bytes) == (3, 3 * 4 * elements)
    odd = collectives_of(6, TREE, elements)["collective-permute"]
    assert odd.count == int(math.log2(4)) + 2


def test_between_groups_goes_only_a_part():
    found = collectives_of(8, functools.partial(hierarchical_all_reduce, group=4), 800)
    assert found["reduce-scatter"].bytes == found["all-gather"].bytes == 4 * 800
    assert found["all-reduce"].bytes == 4 * 800 // 4


@pytest.mark.parametrize("group", [0, 3])
def test_groups_that_do_not_divide_are_named(group):
    with pytest.raises(ValueError, match=f"8 devices along mesh axis 'x' are not groups of {group}"):
        on(8, functools.partial(hierarchical_all_reduce, group=group))(values(8))


def test_an_unknown_algorithm_is_named():
    star: Any = "star"
    with pytest.raises(ValueError, match="algorithm='star' is unknown: tbjax knows 'compiler', 'ring', 'tree'"):
        on(2, functools.partial(all_reduce, algorithm=star))(values(2))
