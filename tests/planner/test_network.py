"""Collectives against closed forms worked out by hand, on the clusters that the catalogue describes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.mesh import AXES
from tbjax.planner import floor
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.network import Fabric, Group, Link, group, ring, tree
from tbjax.planner.workload import Layout

IDEAL = Fabric()
NEAR, FAR = Link(100e9, 1e-6), Link(10e9, 10e-6)
MB = 1e6


def exact(spec: str, stride: int, size: int) -> Group:
    return group(cluster(spec), (stride,), (size,), IDEAL)


def test_ring_passes_n_minus_one_shares():
    assert ring(8 * MB, 8, NEAR) == pytest.approx(7 * (1e-6 + MB / 100e9))


def test_tree_goes_up_and_down_once():
    assert tree(8 * MB, 8, NEAR) == pytest.approx(2 * (3 * 1e-6 + 8 * MB / 100e9))


def test_all_reduce_within_a_domain_is_two_rings_for_much_data():
    joined = Group(8, 1, NEAR, FAR, near_steps=7)
    assert joined.all_reduce(1e9) == pytest.approx(2 * ring(1e9, 8, NEAR))


def test_all_reduce_of_little_data_among_many_is_a_tree():
    joined = Group(1, 128, NEAR, FAR)
    assert joined.all_reduce(1000) == pytest.approx(tree(1000, 128, FAR))
    assert joined.all_reduce(1000) < 2 * ring(1000, 128, FAR)


def test_all_reduce_over_hosts_sends_each_devices_share_over_the_network():
    joined = Group(8, 4, NEAR, FAR, near_steps=7)
    near, far = ring(1e9, 8, NEAR), ring(1e9 / 8, 4, FAR)
    assert joined.all_reduce(1e9) == pytest.approx(2 * near + 2 * far)


def test_gathering_and_scattering_are_each_half_of_an_all_reduce():
    joined = Group(8, 4, NEAR, FAR, near_steps=7)
    assert joined.all_gather(1e9) + joined.reduce_scatter(1e9) == pytest.approx(joined.all_reduce(1e9))


def test_all_to_all_keeps_both_fabrics_busy():
    joined = Group(8, 4, NEAR, FAR, turn=7 / 8)
    outside = 1e9 * 24 / 32 / 10e9
    assert joined.all_to_all(1e9) == pytest.approx(10e-6 + outside)


def test_every_collective_has_a_start_and_a_lone_device_none():
    joined, alone = Group(8, 1, NEAR, FAR, near_steps=7, start=1.0), Group(1, 1, NEAR, FAR, start=1.0)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"):
        assert getattr(joined, name)(0.0) >= 1.0
        assert getattr(alone, name)(1e9) == 0.0


@pytest.mark.parametrize(
    ("spec", "stride", "size", "near", "far"),
    [
        ("h100:4x8", 1, 8, 8, 1),  # tp fills a host
        ("h100:4x8", 1, 16, 8, 2),  # tp crosses hosts
        ("h100:4x8", 8, 4, 1, 4),  # beside tp=8, everything else is across the network
        ("h100:4x8", 2, 16, 4, 4),  # beside tp=2, four of the next axis share a host
        ("h100:4x8", 1, 6, 2, 3),  # a size that hosts do not hold whole: in pairs, at worst
        ("gb200:18x4", 1, 72, 72, 1),  # NVLink reaches beyond a host
        ("gb200:36x4", 8, 18, 9, 2),
        ("v5p:2*4x4x4", 1, 64, 64, 1),
        ("v5p:2*4x4x4", 64, 2, 1, 2),  # two slices, joined by the data-centre network
    ],
)
def test_an_axis_lies_where_its_stride_and_size_put_it(spec, stride, size, near, far):
    found = exact(spec, stride, size)
    assert (found.near, found.far) == (near, far)


def test_links_are_the_catalogues_less_what_programs_do_not_reach():
    machine = cluster("h100:4x8")
    found = group(machine, (), (16,), Fabric(link=0.5, network=0.25, start=3.0))
    assert found.near_link.bandwidth == machine.hardware.link_bandwidth / 2
    assert found.far_link.bandwidth == machine.hardware.network_bandwidth / 4
    assert found.start == 3.0


class TestTorus:
    """v5p: three dimensions, closed into rings where the slice is made of whole cubes."""

    link = cluster("v5p:4x4x4").hardware.link_bandwidth
    hop = cluster("v5p:4x4x4").hardware.link_latency

    @pytest.mark.parametrize(
        ("spec", "stride", "size", "links"),
        [
            ("v5p:4x4x4", 1, 4, 2),  # one ring, both ways
            ("v5p:4x4x4", 1, 2, 1),  # half of a ring is a line
            ("v5p:4x4x4", 4, 16, 4),  # two rings
            ("v5p:4x4x4", 1, 64, 6),  # three
            ("v5p:4x4x4", 2, 8, 3),  # the other half of one, and the next
            ("v5p:2x2x4", 1, 16, 3),  # below a cube nothing closes
            ("v5e:16x16", 1, 16, 2),
            ("v5e:8x8", 1, 8, 1),  # only the whole pod closes
        ],
    )
    def test_bandwidth_is_that_of_the_rings_an_axis_fills(self, spec, stride, size, links):
        found = exact(spec, stride, size)
        assert found.near_link.bandwidth == links * cluster(spec).hardware.link_bandwidth

    def test_all_gather_around_one_ring(self):
        # Each of four devices receives three quarters, over two links; the last comes from two hops away.
        assert exact("v5p:4x4x4", 1, 4).all_gather(1e9) == pytest.approx(2 * self.hop + 0.75e9 / (2 * self.link))

    def test_all_reduce_is_scatter_and_gather_and_never_a_tree(self):
        found = exact("v5p:4x4x4", 1, 4)
        assert found.all_reduce(8) == pytest.approx(2 * found.all_gather(8))

    def test_all_to_all_around_one_ring(self):
        # From each of four devices a quarter goes one hop each way and a quarter two hops: 4/4 of what it holds is
        # carried over 2 links, so each link carries half: an eighth of the ring's length.
        assert exact("v5p:4x4x4", 1, 4).all_to_all(1e9) == pytest.approx(self.hop + 0.5e9 / self.link)


@given(
    size=st.floats(1, 1e11),
    more=st.floats(1, 10),
    near=st.sampled_from([1, 2, 8]),
    far=st.sampled_from([1, 2, 16]),
)
def test_more_bytes_never_take_less_time(size, more, near, far):
    joined = Group(near, far, NEAR, FAR, near_steps=near - 1, turn=(near - 1) / near)
    for collective in (joined.all_reduce, joined.all_gather, joined.all_to_all, joined.send):
        assert collective(size * more) >= collective(size)


def test_a_faster_network_helps_only_what_crosses_it():
    machine = cluster("h100:4x8")
    faster = Cluster(
        hardware=dataclasses.replace(machine.hardware, network_bandwidth=1e12), hosts=4, devices_per_host=8
    )
    assert group(faster, (), (8,), IDEAL).all_reduce(1e9) == group(machine, (), (8,), IDEAL).all_reduce(1e9)
    assert group(faster, (8,), (4,), IDEAL).all_reduce(1e9) < group(machine, (8,), (4,), IDEAL).all_reduce(1e9)


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        ("v5p:8x8x16", Layout(dp=2, fsdp=16, ep=8, tp=4)),
        ("v5p:4x4x8", Layout(pp=2, fsdp=32, tp=2)),
        ("v5p:2*4x4x4", Layout(fsdp=32, tp=4)),
        ("v5e:4x8", Layout(dp=4, tp=8)),
        ("tpu7x:2x2x2", Layout(fsdp=8, tp=2)),
    ],
)
def test_an_axis_has_the_links_of_the_dimensions_that_pictures_show_it_in(spec, layout):
    where = cluster(spec)
    folded, wraps = floor.fold(layout.mesh, where), dict(zip("xyz", where.wraps, strict=False))
    within: tuple[int, ...] = ()
    for axis in reversed(AXES):
        taken = {name: share for name, share in folded[axis].items() if name != "slice" and share > 1}
        links = sum(
            2 if wraps.get(name) and share == floor.dimensions(where)[name] else 1 for name, share in taken.items()
        )
        found = group(where, within, (layout.mesh[axis],), IDEAL)
        assert found.near_link.bandwidth == max(links, 1) * where.hardware.link_bandwidth, axis
        assert found.far == folded[axis]["slice"], axis
        within = (*within, layout.mesh[axis])
