"""Which links the axes of a mesh cross: tp stays where they are fast, whatever the machine."""

import json
import logging
import subprocess
import sys

import pytest

from tbjax.mesh import crossing_axes, make_mesh
from tbjax.planner import compilers
from tests import processes


class Device:
    """What laying out a mesh asks of a device: a GPU's slice is its host, as JAX has it."""

    device_kind = "test"

    def __init__(self, number, host, platform="gpu"):
        self.id, self.platform = number, platform
        self.process_index = number if platform == "gpu" else host  # one process for each GPU, the hardest case
        self.slice_index = host if platform == "gpu" else None

    def __repr__(self):
        return f"{self.process_index}:{self.id}"


def machine(hosts, each, platform="gpu"):
    return [Device(host * each + index, host, platform) for host in range(hosts) for index in range(each)]


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize(
    ("hosts", "each", "sizes", "crossing"),
    [
        (2, 8, {"fsdp": 2, "tp": 8}, ("fsdp",)),
        (2, 8, {"pp": 2, "fsdp": 4, "tp": 2}, ("pp",)),
        (4, 8, {"dp": 2, "fsdp": 8, "tp": 2}, ("dp", "fsdp")),
        (3, 8, {"fsdp": 6, "tp": 4}, ("fsdp",)),
        (8, 8, {"pp": 2, "dp": 8, "tp": 4}, ("pp", "dp")),  # the machine of a seed's drawing
        (1, 8, {"tp": 8}, ()),
        (16, 8, {"dp": 4, "fsdp": 4, "cp": 2, "tp": 4}, ("dp", "fsdp")),
    ],
)
def test_outer_axes_cross_hosts_and_tp_does_not(platform, hosts, each, sizes, crossing, caplog):
    with caplog.at_level(logging.WARNING, logger="tbjax"):
        mesh = make_mesh(sizes, machine(hosts, each, platform))
    assert crossing_axes(mesh) == crossing
    assert not caplog.records
    # Every device once, and each host's devices in one block: a process's share of a batch is contiguous.
    assert sorted(device.id for device in mesh.devices.flat) == list(range(hosts * each))


def test_a_tp_that_cannot_stay_inside_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="tbjax"):
        mesh = make_mesh((1, 1, 16), machine(2, 8))
    assert crossing_axes(mesh) == ("tp",)
    assert "mesh (1, 1, 16): tp=16 crosses from host to host" in caplog.text
    assert "divides the 8 devices" in caplog.text


def test_hosts_of_different_sizes_follow_one_another():
    """As they may be when some of an elastic run are gone."""
    devices = [*machine(1, 4), *(Device(4 + index, 1) for index in range(2))]
    mesh = make_mesh((1, 3, 2), devices[::-1])
    assert [device.id for device in mesh.devices.flat] == list(range(6))
    assert crossing_axes(mesh) == ("fsdp",)


SCRIPT = """
import json, sys
import jax
jax.devices()
from tbjax.mesh import crossing_axes, make_mesh
from tbjax.planner.compile import devices
from tbjax.planner.hardware import cluster
found = []
for compiler, hardware, sizes in json.loads(sys.argv[1]):
    mesh = make_mesh(sizes, devices(cluster(hardware), compiler))
    spread = 0
    for group in mesh.devices.reshape(-1, mesh.shape["tp"]):
        extent = [len(set(along)) for along in zip(*(device.coords for device in group))]
        spread = max(spread, extent[0] * extent[1] * extent[2])
    found.append([crossing_axes(mesh), spread])
print(json.dumps(found))
"""


@pytest.mark.skipif(not compilers.installed("tpu"), reason="needs libtpu")
def test_the_topologies_of_real_machines():
    """As libtpu knows them, without the machines."""
    cases = [
        ["tpu", "v5p:2*2x2x4", {"dp": 2, "fsdp": 4, "tp": 4}],
        ["tpu", "v5p:2*2x2x4", {"pp": 2, "fsdp": 2, "tp": 8}],
        ["tpu", "v5p:4*2x2x2", {"dp": 2, "fsdp": 4, "tp": 4}],
        ["tpu", "v5e:4x4", {"fsdp": 4, "tp": 4}],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        env=compilers.environment("tpu", 1),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=processes.LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [crossing for crossing, _ in found] == [["dp"], ["pp"], ["dp", "fsdp"], []]
    # Within a slice the torus is as fast from host to host as inside one: a group of tp fills a block of it.
    assert [spread for _, spread in found] == [4, 8, 4, 4]
