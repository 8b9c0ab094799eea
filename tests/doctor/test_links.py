"""Collectives along every axis of a mesh: each is checked, and timed."""

import pytest

from tbjax.doctor.links import measure
from tbjax.mesh import make_mesh


@pytest.fixture(scope="module")
def links():
    return measure(make_mesh({"dp": 2, "tp": 4}), nbytes=8192, repeats=2)


def test_every_axis_has_every_collective_and_the_host_both_ways(links):
    of_axis = ["all-reduce", "all-gather", "reduce-scatter", "ring"]
    expected = [("host", "to device"), ("host", "to host")]
    expected += [(axis, collective) for axis in ("dp", "tp") for collective in of_axis]
    assert [(link.axis, link.collective) for link in links] == expected
    assert all(link.right and link.seconds > 0 and link.nbytes == 8192 for link in links)
    assert not any(link.crosses_hosts for link in links)


def test_the_figure_is_what_the_busiest_link_carries(links):
    for link in links:
        sent = {"all-reduce": 2 * (link.devices - 1) / link.devices, "ring": 1.0}.get(link.collective)
        if link.axis != "host" and sent is not None:
            assert link.gb_per_second == pytest.approx(sent * link.nbytes / link.seconds / 1e9)
    gathered, scattered = (
        next(link for link in links if link.axis == "tp" and link.collective == name)
        for name in ("all-gather", "reduce-scatter")
    )
    assert gathered.gb_per_second * gathered.seconds == pytest.approx(scattered.gb_per_second * scattered.seconds)
