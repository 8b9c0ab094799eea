"""Larger clusters of the same devices, smallest first: where to look when nothing fits.

A host is filled before there is a second one. Then hosts are counted singly as far as that is quick, and beyond in
steps of an eighth, since nobody rents 1,013 hosts. TPU slices grow through the shapes that exist, then in number.
"""

import functools
import math
from collections.abc import Iterator

from tbjax.planner.device import CUBE, Hardware, Shape
from tbjax.planner.hardware import Cluster

# Beyond any that has been built for one job; where that is not enough, the work is not for these devices.
MOST_DEVICES = 1 << 17

# Up to here every number of hosts is tried.
COUNTED = 64


def larger(cluster: Cluster) -> Iterator[Cluster]:
    """Clusters with more devices than `cluster`, in ascending order."""
    for other in _sizes(cluster.hardware):
        if cluster.devices < other.devices <= MOST_DEVICES:
            yield other


def _sizes(kind: Hardware) -> Iterator[Cluster]:
    if kind.torus:
        yield from _slices(kind)
        return
    for devices in range(1, kind.devices_per_host):
        if kind.devices_per_host % devices == 0:
            yield Cluster(hardware=kind, devices_per_host=devices)
    hosts = 1
    while hosts * kind.devices_per_host <= MOST_DEVICES:
        yield Cluster(hardware=kind, hosts=hosts, devices_per_host=kind.devices_per_host)
        hosts += 1 if hosts < COUNTED else 1 << (hosts.bit_length() - 4)


def _slices(kind: Hardware) -> Iterator[Cluster]:
    shapes = _shapes(kind)
    for shape in shapes:
        yield _cluster(kind, 1, shape)
    whole = math.prod(shapes[-1]) * kind.devices_per_chip
    for slices in range(2, MOST_DEVICES // whole + 1):
        yield _cluster(kind, slices, shapes[-1])


def _cluster(kind: Hardware, slices: int, shape: Shape) -> Cluster:
    devices = math.prod(shape) * kind.devices_per_chip
    hosts = -(-devices // kind.devices_per_host)
    return Cluster(hardware=kind, slices=slices, hosts=hosts, devices_per_host=devices // hosts, topology=shape)


@functools.lru_cache
def _shapes(kind: Hardware) -> tuple[Shape, ...]:
    """For each number of chips that a slice can have, the shape that is nearest to a cube."""
    cubes: list[Shape] = []
    if kind.torus == 3:
        most = kind.domain // kind.devices_per_chip // CUBE**3
        cubes = [
            (CUBE * a, CUBE * b, CUBE * c)
            for a in range(1, most + 1)
            for b in range(a, most // a + 1)
            for c in range(b, most // (a * b) + 1)
        ]
    best: dict[int, Shape] = {}
    for shape in sorted([*kind.shapes, *cubes], key=max):
        best.setdefault(math.prod(shape), shape)
    return tuple(best[chips] for chips in sorted(best))
