"""Sums over devices as algorithms: ring, tree and hierarchical all-reduce, to be called inside a `shard_map`.

`jax.lax.psum` leaves the algorithm to whoever runs the program. Here it is chosen, and written in what every backend
has: permutations, and the collectives over groups of devices. What each sends, of n bytes over p devices:

    ring           2 (p - 1) n / p in 2 (p - 1) messages: the least there is, and the longest wait
    tree           n log2(p) in log2(p) messages (two more where p is no power of two): for what is small
    hierarchical   2 (g - 1) n / g inside groups of g neighbours, and between groups an all-reduce of n / g: for links
                   of two speeds, as between TPU slices or hosts

Every device ends with the same bits: a sum's order does not depend on who asks. All take any tree of arrays; what does
not divide is padded. `over` is a mesh axis, or `Peers`: some of the devices along one.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

Algorithm: TypeAlias = Literal["compiler", "ring", "tree"]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Peers:
    """Devices that sum among themselves: places on a mesh axis, in groups of one size."""

    axis: str
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def along(cls, over: "str | Peers") -> "Peers":
        """All devices along an axis; inside a shard_map alone, which knows how many there are."""
        return over if isinstance(over, Peers) else cls(over, (tuple(range(jax.lax.axis_size(over))),))

    @property
    def size(self) -> int:
        """Of one group."""
        return len(self.groups[0])

    def inside(self, group: int) -> Self:
        """Each group as groups of so many neighbours."""
        self._check(group)
        runs = (members[i : i + group] for members in self.groups for i in range(0, self.size, group))
        return dataclasses.replace(self, groups=tuple(runs))

    def across(self, group: int) -> Self:
        """Those who have the same place in their groups of neighbours."""
        self._check(group)
        return dataclasses.replace(
            self, groups=tuple(members[i::group] for members in self.groups for i in range(group))
        )

    def place(self) -> jax.Array:
        """Where this device stands in its group."""
        places = np.zeros(sum(map(len, self.groups)), np.int32)
        for members in self.groups:
            places[list(members)] = range(len(members))
        return jnp.asarray(places)[jax.lax.axis_index(self.axis)]

    def permute(self, array: jax.Array, pairs: Iterable[tuple[int, int]]) -> jax.Array:
        """What another device of the group has; zeros where nobody sends. `pairs` are places: from, to."""
        pairs = list(pairs)
        wanted = [(members[a], members[b]) for members in self.groups for a, b in pairs]
        return jax.lax.ppermute(array, self.axis, wanted)

    @property
    def options(self) -> dict[str, Any]:
        """How JAX's own collectives are told of the groups."""
        groups = [list(members) for members in self.groups]
        return {"axis_name": self.axis, "axis_index_groups": groups if len(groups) > 1 else None}

    def _check(self, group: int) -> None:
        if group < 1 or self.size % group:
            raise ValueError(
                f"{self.size} devices along mesh axis {self.axis!r} are not groups of {group}: give a divisor of "
                f"{self.size}."
            )


def all_reduce(tree: Tree, over: str | Peers, algorithm: Algorithm = "compiler") -> Tree:
    """The sum over the devices, by an algorithm or by the compiler's choice."""
    peers = Peers.along(over)
    match algorithm:
        case "compiler":
            return jax.tree.map(lambda a: jax.lax.psum(a, **peers.options), tree)
        case "ring":
            return ring_all_reduce(tree, peers)
        case "tree":
            return tree_all_reduce(tree, peers)
    known = ", ".join(map(repr, get_args(Algorithm)))
    raise ValueError(f"algorithm={algorithm!r} is unknown: tbjax knows {known}.")


def ring_all_reduce(tree: Tree, over: str | Peers) -> Tree:
    """Parts of the sum go round a ring, gathering a summand at each device, and then round again, finished."""
    peers = Peers.along(over)

    def reduce(array: jax.Array) -> jax.Array:
        return _joined(_ring_gather(_ring_scatter(_parts(array, peers.size), peers), peers), array)

    return _each(reduce, tree, peers)


def tree_all_reduce(tree: Tree, over: str | Peers) -> Tree:
    """Recursive doubling: sums of pairs, then of pairs of pairs, and so on, on all devices at once.

    Where their number is no power of two, those beyond one hand theirs to others first, and get the result at the end.
    """
    peers = Peers.along(over)
    power = 1 << (peers.size.bit_length() - 1)
    beyond = [(place, place - power) for place in range(power, peers.size)]

    def reduce(array: jax.Array) -> jax.Array:
        if beyond:
            array += peers.permute(array, beyond)
        for level in range(power.bit_length() - 1):
            array += peers.permute(array, ((place, place ^ (1 << level)) for place in range(power)))
        if beyond:
            array = jnp.where(peers.place() < power, array, peers.permute(array, ((b, a) for a, b in beyond)))
        return array

    return _each(reduce, tree, peers)


def hierarchical_all_reduce(tree: Tree, over: str | Peers, group: int, algorithm: Algorithm = "compiler") -> Tree:
    """Summed inside groups of `group` neighbours, of which each keeps a part; then each part across the groups."""
    peers = Peers.along(over)
    inside, across = peers.inside(group), peers.across(group)

    def reduce(array: jax.Array) -> jax.Array:
        return all_gather(all_reduce(reduce_scatter(array, inside), across, algorithm), inside, array)

    return _each(reduce, tree, peers)


def reduce_scatter(array: jax.Array, over: str | Peers) -> jax.Array:
    """This device's part of the sum, flat: the n-th of n equal parts for the n-th device, the last ones padded."""
    peers = Peers.along(over)
    return jax.lax.psum_scatter(_parts(array, peers.size), scatter_dimension=0, **peers.options)


def all_gather(part: jax.Array, over: str | Peers, like: jax.Array) -> jax.Array:
    """All devices' flat parts as the whole that they are parts of, in the shape of `like`."""
    return _joined(jax.lax.all_gather(part, **Peers.along(over).options), like)


def _each(reduce: Callable[[jax.Array], jax.Array], tree: Tree, peers: Peers) -> Tree:
    return tree if peers.size == 1 else jax.tree.map(lambda a: reduce(jnp.asarray(a)), tree)


def _parts(array: jax.Array, count: int) -> jax.Array:
    """An array as so many equal parts [count, n]."""
    flat = array.reshape(-1)
    length = math.ceil(flat.size / count)
    return jnp.pad(flat, (0, count * length - flat.size)).reshape(count, length)


def _joined(parts: jax.Array, like: jax.Array) -> jax.Array:
    return parts.reshape(-1)[: like.size].reshape(like.shape)


def _ring_scatter(parts: jax.Array, peers: Peers) -> jax.Array:
    """The sum of this device's part: what arrives has the summands of those before it on the ring."""
    place = peers.place()

    def part(step: Any) -> jax.Array:
        # What starts at a device is the part of the one before it, which it reaches last.
        return parts[(place - 1 - step) % peers.size]

    def turn(step: Any, moving: jax.Array) -> jax.Array:
        return peers.permute(moving, _onwards(peers)) + part(step)

    return jax.lax.fori_loop(1, peers.size, turn, part(0))


def _ring_gather(part: jax.Array, peers: Peers) -> jax.Array:
    """Everybody's parts [p, n]."""
    place = peers.place()

    def turn(step: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, moving = carry
        moving = peers.permute(moving, _onwards(peers))
        return found.at[(place - step) % peers.size].set(moving), moving

    found = jnp.zeros((peers.size, *part.shape), part.dtype).at[place].set(part)
    return jax.lax.fori_loop(1, peers.size, turn, (found, part))[0]


def _onwards(peers: Peers) -> list[tuple[int, int]]:
    return [(place, (place + 1) % peers.size) for place in range(peers.size)]
