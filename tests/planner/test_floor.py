"""Where devices lie: against what JAX itself does with them, and as arithmetic."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from tbjax.mesh import AXES
from tbjax.planner import floor
from tbjax.planner.hardware import cluster
from tbjax.planner.workload import Layout


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as JAX asks for when it lays out a mesh."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"  # v5p
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def chips(topology: tuple[int, int, int]) -> list[Chip]:
    # JAX numbers them with x fastest.
    places = [place[::-1] for place in itertools.product(*(range(size) for size in topology[::-1]))]
    return [Chip(number, place) for number, place in enumerate(places)]


@pytest.mark.parametrize(
    ("topology", "layout"),
    [
        ("4x4x4", Layout(fsdp=16, tp=4)),
        ("4x4x4", Layout(fsdp=8, tp=8)),
        ("4x4x4", Layout(dp=4, fsdp=4, tp=4)),
        ("4x4x4", Layout(dp=2, fsdp=16, cp=2)),
        ("4x4x8", Layout(fsdp=16, tp=8)),
        ("4x4x8", Layout(pp=2, fsdp=32, tp=2)),
        ("4x8x8", Layout(fsdp=64, tp=4)),
        ("8x8x16", Layout(pp=4, fsdp=64, tp=4)),
        ("8x8x16", Layout(dp=2, fsdp=16, ep=8, tp=4)),
    ],
)
def test_a_torus_is_laid_out_as_jax_lays_out_its_chips(topology, layout):
    where = cluster(f"v5p:{topology}")
    grid = mesh_utils.create_device_mesh(
        tuple(layout.mesh.values()), chips(where.topology), allow_split_physical_axes=True
    )
    folded = floor.fold(layout.mesh, where)
    for index, chip in np.ndenumerate(grid):
        place = floor.chip_coordinates(dict(zip("xyz", chip.coords, strict=True)), folded)
        assert tuple(place.values()) == index


@given(st.data())
def test_a_fold_fills_every_dimension_and_every_axis(data):
    where = cluster(data.draw(st.sampled_from(["v5p:2*4x4x8", "v5e:16x16", "v4:4x4x4", "tpu7x:4x4x4"])))
    left, sizes = where.devices, {}
    for axis in AXES[:-1]:
        sizes[axis] = data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        left //= sizes[axis]
    layout = Layout(**sizes, tp=left)
    folded = floor.fold(layout.mesh, where)
    assert {axis: math.prod(shares.values()) for axis, shares in folded.items()} == dict(layout.mesh)
    for dimension, size in floor.dimensions(where).items():
        assert math.prod(folded[axis][dimension] for axis in AXES) == size


@pytest.mark.parametrize("spec", ["v5p:2*4x4x4", "v5e:4x8", "tpu7x:2x2x2"])
def test_no_two_chips_have_one_place(spec):
    where = cluster(spec)
    dimensions = floor.dimensions(where)
    folded = floor.fold(Layout(dp=2, fsdp=where.devices // 8, tp=4).mesh, where)
    places = [
        tuple(floor.chip_coordinates(dict(zip(dimensions, chip, strict=True)), folded).values())
        for chip in itertools.product(*(range(size) for size in dimensions.values()))
    ]
    assert len(set(places)) == where.devices


@given(st.integers(0, 2 * 3 * 4 * 5 - 1))
def test_devices_are_numbered_with_the_innermost_axis_fastest(device):
    sizes = Layout(pp=2, dp=3, cp=4, tp=5).mesh
    place = floor.coordinates(device, sizes)
    assert np.ravel_multi_index(tuple(place.values()), tuple(sizes.values())) == device


@pytest.mark.parametrize(
    ("spec", "layout", "axis", "expected"),
    [
        ("h100:8x8", Layout(fsdp=8, tp=8), "tp", (8, 1)),
        ("h100:8x8", Layout(fsdp=8, tp=8), "fsdp", (1, 8)),
        ("h100:8x8", Layout(fsdp=32, tp=2), "fsdp", (4, 8)),
        ("h100:8x8", Layout(fsdp=4, tp=16), "tp", (8, 2)),
        ("gb200:18x4", Layout(fsdp=9, tp=8), "fsdp", (9, 1)),
        ("v5p:2*4x4x4", Layout(dp=2, fsdp=64), "dp", (1, 2)),
        ("v5p:2*4x4x4", Layout(fsdp=128), "fsdp", (64, 2)),
        ("v5p:4x4x4", Layout(fsdp=16, tp=4), "fsdp", (16, 1)),
    ],
)
def test_an_axis_reaches_as_far_as_the_fast_fabric_and_then_across(spec, layout, axis, expected):
    assert floor.reach(axis, layout.mesh, cluster(spec)) == expected


def test_a_box_is_a_node_or_the_domain_that_joins_several():
    assert floor.box_devices(cluster("h100:4x8")) == 8
    assert floor.box_devices(cluster("gb200:18x4")) == 72
    assert floor.box_devices(cluster("h100:2")) == 2
