"""Larger clusters come in ascending order, and each of them exists."""

import itertools

import pytest

from tbjax.planner.growth import COUNTED, MOST_DEVICES, larger
from tbjax.planner.hardware import cluster


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("h100:1", ["h100:2", "h100:4", "h100:8", "h100:2x8", "h100:3x8"]),
        ("h100:5", ["h100:8", "h100:2x8"]),
        ("h100:2x4", ["h100:2x8", "h100:3x8"]),
        ("v5p:2x2x1", ["v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8"]),
        ("v5e:8x16", ["v5e:16x16", "v5e:2*16x16", "v5e:3*16x16"]),
    ],
)
def test_the_next_larger_come_first(spec, first):
    assert [str(found) for found in itertools.islice(larger(cluster(spec)), len(first))] == first


@pytest.mark.parametrize("spec", ["a100-80:1", "gb200:4", "v4:2x2x1", "v6e:1x1", "tpu7x:2x2x1", "cpu:8"])
def test_they_ascend_to_the_most_there_are_and_can_be_spelled(spec):
    found = list(larger(cluster(spec)))
    devices = [each.devices for each in found]
    assert devices == sorted(set(devices))
    assert cluster(spec).devices < devices[0]
    assert 0.8 * MOST_DEVICES < devices[-1] <= MOST_DEVICES
    assert all(cluster(str(each)) == each for each in found)


def test_hosts_are_counted_singly_and_then_in_steps_of_an_eighth_at_most():
    hosts = [each.hosts for each in larger(cluster("h100:2x8"))]
    assert hosts[: COUNTED - 2] == list(range(3, COUNTED + 1))
    assert all(after - before <= before / 8 for before, after in itertools.pairwise(hosts[COUNTED:]))
