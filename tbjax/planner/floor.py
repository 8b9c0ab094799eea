"""Where each device of a mesh lies: in which node of a GPU cluster, at which chip of a TPU torus.

A mesh numbers its devices with the innermost axis fastest. On GPUs those numbers run through the nodes, so that an axis
lies inside a node exactly if its size times the sizes further in do. On a torus every mesh axis is given whole
dimensions where it can be, and parts of dimensions where it cannot: the same rule by which `make_mesh` (through
`jax.experimental.mesh_utils`) lays real chips out. Only the smallest slices, of one host or two, are numbered otherwise
there, along a ring through all their chips.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tbjax.mesh import AXES
from tbjax.planner.hardware import Cluster

Sizes = Mapping[str, int]
Coordinates = Mapping[str, int]


class Reach(NamedTuple):
    """How far an axis reaches: `inside` devices that the fast fabric joins, in `across` groups of them."""

    inside: int
    across: int


def dimensions(cluster: Cluster) -> dict[str, int]:
    """The dimensions of TPU slices, outermost first: the slices, those of the torus, the devices that share a chip."""
    torus = dict(zip("xyz", cluster.topology or (), strict=False))
    return {"slice": cluster.slices, **torus, "core": cluster.hardware.devices_per_chip}


def coordinates(device: int, sizes: Sizes) -> dict[str, int]:
    """Where device number `device` lies on each mesh axis."""
    place = {}
    for axis in reversed(AXES):
        device, place[axis] = divmod(device, sizes[axis])
    return {axis: place[axis] for axis in AXES}


def box_devices(cluster: Cluster) -> int:
    """The devices drawn as one box: a node, or the whole domain where the fast fabric joins several nodes."""
    return min(cluster.devices, max(cluster.devices_per_host, cluster.fast_domain))


def reach(axis: str, sizes: Sizes, cluster: Cluster) -> Reach:
    """How much of an axis lies inside the fast fabric: a domain of GPUs, or a slice of TPU chips."""
    if cluster.topology:
        across = _over_slices(sizes, cluster.slices)[axis]
        return Reach(sizes[axis] // across, across)
    inner = math.prod(sizes[other] for other in AXES[AXES.index(axis) + 1 :])
    inside = math.gcd(sizes[axis], max(1, cluster.fast_domain // inner))
    return Reach(inside, sizes[axis] // inside)


def fold(sizes: Sizes, cluster: Cluster) -> dict[str, dict[str, int]]:
    """How much each mesh axis takes of each of the `dimensions`."""
    over_slices = _over_slices(sizes, cluster.slices)
    free = {name: size for name, size in dimensions(cluster).items() if name != "slice"}
    taken = shares(tuple(free.values()), tuple(sizes[axis] // over_slices[axis] for axis in reversed(AXES)))
    return {
        axis: {"slice": over_slices[axis], **dict(zip(free, parts, strict=True))}
        for axis, parts in zip(AXES, reversed(taken), strict=True)
    }


@functools.lru_cache(maxsize=1 << 16)
def shares(dimensions: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """How much each of some axes, innermost first, takes of each dimension of a slice.

    The innermost axis talks most, and chooses first: what it takes does not depend on those that follow.
    """
    if not sizes:
        return ()
    inner = shares(dimensions, sizes[:-1])
    taken = tuple(math.prod(parts) for parts in zip(*inner, strict=True)) or (1,) * len(dimensions)
    left = [size // used for size, used in zip(dimensions, taken, strict=True)]
    own = max(_factorings(sizes[-1], left), key=lambda parts: _preference(parts, dimensions, taken))
    return (*inner, own)


def chip_coordinates(chip: Mapping[str, int], folded: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Where the device at so much of each dimension (none is 0) lies on each mesh axis."""
    place = dict.fromkeys(AXES, 0)
    for dimension in folded[AXES[0]]:
        # Within a dimension the outer axes are the slower digits; over dimensions, the earlier ones are.
        position, digits = chip.get(dimension, 0), {}
        for axis in reversed(AXES):
            position, digits[axis] = divmod(position, folded[axis][dimension])
        for axis in AXES:
            place[axis] = place[axis] * folded[axis][dimension] + digits[axis]
    return place


def _over_slices(sizes: Sizes, slices: int) -> dict[str, int]:
    """Which part of each axis crosses from slice to slice: the outermost axes' do, since they talk least."""
    result = {}
    for axis in AXES:
        result[axis] = math.gcd(sizes[axis], slices)
        slices //= result[axis]
    return result


def _factorings(size: int, free: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as a product of divisors of `free`."""
    choices = ([n for n in range(1, dim + 1) if dim % n == 0 and size % n == 0] for dim in free)
    return (shares for shares in itertools.product(*choices) if math.prod(shares) == size)


def _preference(shares: Sequence[int], topology: Sequence[int], taken: Sequence[int]) -> tuple[object, ...]:
    """Whole dimensions first, and many of them; then dimensions that are begun; then the earlier ones."""
    whole = [share for share, size in zip(shares, topology, strict=True) if share == size]
    begun = math.prod(share for share, used in zip(shares, taken, strict=True) if used > 1)
    return math.prod(whole), sum(size > 1 for size in whole), begun, tuple(shares)
