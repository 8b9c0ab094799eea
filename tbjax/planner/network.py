"""How long collectives take: an alpha-beta model over where the devices of a mesh axis really lie.

A mesh is laid over the devices in order, its innermost axis over neighbours. An axis so has a stride (the product of
the axes within it) and a size, and its `Group` of devices lies inside one fast domain (`near`: an NVLink domain, a TPU
slice), in domains of its own across the network (`far`), or both: `near` devices in each of `far` domains. What spans
both is done in steps, and over the network goes only the share that each device has after the near step. Which
dimensions of a torus an axis fills is `floor`'s to say, as for the pictures.

    ring          (n - 1) steps of 1/n of the data            all-gather, reduce-scatter; twice for an all-reduce
    tree          2 log2(n) steps, pipelined                  all-reduce, where latency counts
    hierarchical  reduce-scatter near, all-reduce far, all-gather near
    torus         rings in both directions along every dimension that the axis fills; half as much where an axis fills
                  only a part of a dimension, or the dimension does not close into a ring

A step costs a latency (alpha), a byte the reciprocal of a bandwidth (beta), and every collective a start (kernel
launch, protocol, waiting for the last device).
"""

import dataclasses
import math
from typing import NamedTuple, TypeAlias

from tbjax.planner import floor
from tbjax.planner.hardware import Cluster

Sizes: TypeAlias = tuple[int, ...]


class Link(NamedTuple):
    """What joins the devices of a group."""

    bandwidth: float  # bytes/s out of one device and, at once, into it
    latency: float  # seconds a step


class Group(NamedTuple):
    """The devices of one mesh axis: `near` of them in each of `far` fast domains."""

    near: int
    far: int
    near_link: Link
    far_link: Link
    near_steps: float = 0.0  # latencies of an all-gather within a domain
    turn: float = 1.0  # of what a device holds, how much passes through its links in an all-to-all within a domain
    tree: bool = True  # whether a tree can be laid over the fast domain: not over a torus
    start: float = 0.0  # seconds

    @property
    def size(self) -> int:
        return self.near * self.far

    def all_gather(self, whole: float) -> float:
        """Seconds until every device has all of `whole` bytes, of which each began with a share."""
        if self.size == 1:
            return 0.0
        return self.start + self._near_gather(whole) + ring(whole / self.near, self.far, self.far_link)

    def reduce_scatter(self, whole: float) -> float:
        """Seconds until every device has its share of the sum of everyone's `whole` bytes."""
        return self.all_gather(whole)  # the same messages, backwards

    def all_reduce(self, whole: float) -> float:
        """Seconds until every device has the sum of everyone's `whole` bytes."""
        if self.size == 1:
            return 0.0
        within = 2 * self._near_gather(whole)
        if self.tree:
            within = min(within, tree(whole, self.near, self.near_link))
        if self.far == 1:
            return self.start + within
        # Between the two near steps the network carries each device's share, by whichever way is quicker.
        share = whole / self.near
        across = min(2 * ring(share, self.far, self.far_link), tree(share, self.far, self.far_link))
        return self.start + 2 * self._near_gather(whole) + across

    def all_to_all(self, held: float) -> float:
        """Seconds until every device has sent an equal part of its `held` bytes to every other."""
        if self.size == 1:
            return 0.0
        inside = self.turn * held * self.near / self.size / self.near_link.bandwidth
        outside = held * (self.size - self.near) / self.size / self.far_link.bandwidth
        # Both fabrics are busy at once.
        latency = max(self.near_link.latency * (self.near > 1), self.far_link.latency * (self.far > 1))
        return self.start + latency + max(inside, outside)

    def send(self, size: float) -> float:
        """Seconds for one message of `size` bytes to the next device along the axis, the slowest of them."""
        if self.size == 1:
            return 0.0
        link = self.far_link if self.far > 1 else self.near_link
        return self.start + link.latency + size / link.bandwidth

    def _near_gather(self, whole: float) -> float:
        if self.near == 1:
            return 0.0
        share = (self.near - 1) / self.near
        return self.near_steps * self.near_link.latency + share * whole / self.near_link.bandwidth


def ring(whole: float, members: int, link: Link) -> float:
    """An all-gather or a reduce-scatter around a ring: every device passes on n - 1 shares."""
    return (members - 1) * (link.latency + whole / members / link.bandwidth)


def tree(whole: float, members: int, link: Link) -> float:
    """An all-reduce up and down a tree, in small pieces that follow each other: two passes of all the data."""
    if members == 1:
        return 0.0
    return 2 * (math.ceil(math.log2(members)) * link.latency + whole / link.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fabric:
    """What of a cluster's links is left to a program."""

    link: float = 1.0  # share of the fast domain's bandwidth
    network: float = 1.0  # share of the network's
    start: float = 0.0  # seconds that every collective takes besides its steps


def group(cluster: Cluster, within: Sizes, sizes: Sizes, fabric: Fabric) -> Group:
    """The devices of neighbouring mesh axes of `sizes`, innermost first, with axes of sizes `within` further in."""
    hardware, domain = cluster.hardware, cluster.fast_domain
    stride, size = math.prod(within), math.prod(sizes)
    near = _near(domain, stride, size)
    far_link = Link(hardware.network_bandwidth * fabric.network, hardware.network_latency)
    if not hardware.torus:
        near_link = Link(hardware.link_bandwidth * fabric.link, hardware.link_latency)
        turn = (near - 1) / near
        return Group(near, size // near, near_link, far_link, near_steps=near - 1, turn=turn, start=fabric.start)
    extents = _extents(cluster, within, sizes)
    links = sum(2 if ring else 1 for _, ring in extents) or 1
    # Once around a closed ring in both directions is half its length; a line is as long as it is.
    steps = sum(extent / 2 if ring else extent - 1 for extent, ring in extents)
    return Group(
        near,
        size // near,
        Link(links * hardware.link_bandwidth * fabric.link, hardware.link_latency),
        far_link,
        near_steps=steps,
        # An all-to-all goes a quarter of the way round a ring on average, over two links: an eighth of its length is
        # what each link carries. On a line the link in the middle carries all that half of it sends to the other half.
        turn=links * max((extent / (8 if ring else 4) for extent, ring in extents), default=0.0),
        tree=False,
        start=fabric.start,
    )


def _near(domain: int, stride: int, size: int) -> int:
    """How many of `size` devices, `stride` apart, share a fast domain."""
    return math.gcd(size, max(domain // stride, 1)) if stride < domain else 1


def _extents(cluster: Cluster, within: Sizes, sizes: Sizes) -> list[tuple[int, bool]]:
    """How far axes reach along each dimension of the torus, and whether they go all the way round a ring."""
    inside, stride = [], 1
    for size in (*within, *sizes):
        inside.append(_near(cluster.fast_domain, stride, size))
        stride *= size
    lengths = {name: length for name, length in floor.dimensions(cluster).items() if name != "slice"}
    wraps = (*cluster.wraps, False)  # the devices of a chip are no ring
    taken = floor.shares(tuple(lengths.values()), tuple(inside))[len(within) :]
    reach = [math.prod(parts) for parts in zip(*taken, strict=True)]
    return [
        (extent, wraps and extent == length)
        for extent, length, wraps in zip(reach, lengths.values(), wraps, strict=True)
        if extent > 1
    ]
