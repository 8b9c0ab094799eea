"""Gradients that are summed over `dp` by sending less than all of them.

    TopK(ratio)      the largest entries of each device's gradient, signs and places with them; what is not sent is kept
                     and added to the next gradient (error feedback), so that nothing is lost, only late
    RandomK(ratio)   entries drawn by lot, the same on all devices, so that no places travel; they are scaled up, and
                     the sum is right on average
    Int8()           all entries in eight bits, with a scale for every few of them, rounded up or down by lot so that
                     the sum is right on average

Written as text they are "top-k:0.01", "random-k:0.1" and "int8".

Each device has the whole gradient of its own rows of the batch (`tbjax.training.per_device`), or its part of that where
fsdp or tp cut the parameter. The parts are compressed where they lie: only dp is crossed. With `group` > 1 that many
neighbours along dp sum theirs uncompressed, each a share, and only what goes between the groups is compressed: for
links of two speeds, where dp crosses TPU slices or hosts.

Whatever is by lot is decided by the seed, the number of the step and the place in the tensor: a run that is resumed
draws as one that was never stopped. All devices decode the same messages in the same order, so replicas stay equal.

Top-k: Lin et al., Deep Gradient Compression (2018), and Karimireddy et al., Error Feedback Fixes SignSGD (2019).
Stochastic rounding: Alistarh et al., QSGD (2017).
"""

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.collectives import Algorithm, Peers, all_gather, all_reduce, reduce_scatter
from tbjax.model import Decoder
from tbjax.sharding import axes_of, leaves
from tbjax.training.optimizer import Parameters

AXIS = "dp"

# Entries are chosen within blocks of this size at most: a place in one is written in 16 bits, and stacks of layers with
# more entries than 32 bits can count have no places of their own.
BLOCK = 2**16
# Entries that share a scale in eight bits: so few that one outlier coarsens few others, so many that scales add 1.6 %.
SCALED = 256
# The largest whole number on both sides of zero in eight bits.
LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Compression(abc.ABC):
    """A way to sum flat arrays over devices. `keeps` says whether what was not sent comes back, to be sent later."""

    keeps: ClassVar[bool] = False
    group: int = dataclasses.field(default=1, kw_only=True)  # neighbours along dp that sum uncompressed first

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(
                f"{type(self).__name__}.group={self.group}: it is how many neighbours along dp sum uncompressed; 1 "
                "compresses everything."
            )

    def __str__(self) -> str:
        fields = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        told = ", ".join(f"{name}={value!r}" for name, value, usual in fields if value != usual)
        return f"{type(self).__name__}({told})"

    @abc.abstractmethod
    def sum(self, value: jax.Array, peers: Peers, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The sum over `peers` of what each has sent of its float32 [n], and what this device has not sent.

        `key` is the same on all peers.
        """


@dataclasses.dataclass(frozen=True)
class TopK(Compression):
    """The largest `ratio` of the entries, with error feedback."""

    ratio: float
    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio(self)

    def sum(self, value: jax.Array, peers: Peers, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        blocks = _blocks(value)
        row = jnp.arange(blocks.shape[0])[:, None]
        _, places = jax.lax.top_k(jnp.abs(blocks), _chosen(self.ratio, blocks.shape[1]))
        kept = blocks.at[row, places].set(0, unique_indices=True)
        sent = jnp.take_along_axis(blocks, places, axis=1), places.astype(jnp.uint16)
        values, places = (jax.lax.all_gather(a, **peers.options) for a in sent)

        def add(device: jax.Array, total: jax.Array) -> jax.Array:
            # One device after the other: no place comes twice in one's message, so the order of a sum is fixed.
            return total.at[row, places[device].astype(jnp.int32)].add(values[device], unique_indices=True)

        total = jax.lax.fori_loop(0, peers.size, add, jnp.zeros_like(blocks))
        return _flat(total, value), _flat(kept, value)


@dataclasses.dataclass(frozen=True)
class RandomK(Compression):
    """A random `ratio` of the entries, one of every 1 / ratio neighbours, scaled up by as much as they were few.

    `algorithm` is that by which their values are summed.
    """

    ratio: float
    seed: int = dataclasses.field(default=0, kw_only=True)
    algorithm: Algorithm = dataclasses.field(default="compiler", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio(self)

    def sum(self, value: jax.Array, peers: Peers, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        blocks = _blocks(value)
        count, size = blocks.shape
        # A block is cut into as many runs as entries are sent, whose lengths differ by one at most; of each run one
        # entry is sent, and stands for all of it.
        chosen = _chosen(self.ratio, size)
        bounds = np.arange(chosen + 1) * size // chosen
        starts, lengths = bounds[:-1].astype(np.int32), np.diff(bounds).astype(np.int32)
        places = starts + jax.random.randint(jax.random.fold_in(key, self.seed), (count, chosen), 0, lengths)
        sent = jnp.take_along_axis(blocks, places, axis=1) * lengths
        found = all_reduce(sent, peers, self.algorithm)
        row = jnp.arange(count)[:, None]
        return _flat(jnp.zeros_like(blocks).at[row, places].set(found, unique_indices=True), value), None


@dataclasses.dataclass(frozen=True)
class Int8(Compression):
    """All entries in eight bits with stochastic rounding.

    The sum is taken as a ring would: every device gets one part from all others, sums it in float32, and sends it,
    rounded once more, to all others. So it costs two bytes an entry, whatever the number of devices.
    """

    seed: int = dataclasses.field(default=0, kw_only=True)

    def sum(self, value: jax.Array, peers: Peers, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        # Each device draws its own lots, or their errors would add up.
        key = jax.random.fold_in(jax.random.fold_in(key, self.seed), peers.place())
        there, back = jax.random.split(key)
        blocks = math.ceil(value.size / (SCALED * peers.size))
        parts = jnp.pad(value, (0, peers.size * blocks * SCALED - value.size)).reshape(peers.size, blocks, SCALED)
        mine = [jax.lax.all_to_all(a, split_axis=0, concat_axis=0, **peers.options) for a in _rounded(parts, there)]
        total = jnp.sum(_unrounded(*mine), axis=0)
        whole = [jax.lax.all_gather(a, **peers.options) for a in _rounded(total, back)]
        return _flat(_unrounded(*whole), value), None


def _rounded(values: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., SCALED] in eight bits, and the scale of each block. On average it is what it was."""
    scale = jnp.max(jnp.abs(values), axis=-1, keepdims=True) / LARGEST
    steps = values / jnp.where(scale == 0, 1, scale)
    whole = jnp.floor(steps + jax.random.uniform(key, values.shape, values.dtype))
    return jnp.clip(whole, -LARGEST, LARGEST).astype(jnp.int8), scale


def _unrounded(whole: jax.Array, scale: jax.Array) -> jax.Array:
    return whole.astype(scale.dtype) * scale


def _blocks(value: jax.Array) -> jax.Array:
    """[n] as equal blocks of at most BLOCK entries, the last ones padded with zeros."""
    count = max(1, math.ceil(value.size / BLOCK))
    size = math.ceil(value.size / count)
    return jnp.pad(value, (0, count * size - value.size)).reshape(count, size)


def _flat(blocks: jax.Array, like: jax.Array) -> jax.Array:
    return blocks.reshape(-1)[: like.size]


def _chosen(ratio: float, size: int) -> int:
    return min(size, math.ceil(ratio * size))


def _check_ratio(compression: TopK | RandomK) -> None:
    if not 0 < compression.ratio <= 1:
        raise ValueError(
            f"{type(compression).__name__}.ratio={compression.ratio}: it is the share of a gradient that is sent, "
            "above 0 and at most 1."
        )


# In words.

Asked: TypeAlias = Compression | str | None


def parse(asked: Asked, seed: int = 0) -> Compression | None:
    """A compression, or the one that a text names, which draws by `seed`."""
    if asked is None or isinstance(asked, Compression):
        return asked
    name, _, number = asked.partition(":")
    try:
        if name == "top-k" and number:
            return TopK(float(number))
        if name == "random-k" and number:
            return RandomK(float(number), seed=seed)
    except ValueError as error:
        raise ValueError(f"compression={asked!r}: {error}") from None
    if asked == "int8":
        return Int8(seed=seed)
    raise ValueError(f"compression={asked!r} is unknown: tbjax knows 'top-k:0.01' (any ratio), 'random-k:0.1', 'int8'.")


def check(compression: Compression | None, model: Decoder, offload: Iterable[str] = ()) -> None:
    """Raise for a mesh on which gradients cannot be compressed."""
    if compression is None:
        return
    sharding, name = model.sharding, f"compression={compression}"
    peers = sharding.size(AXIS)
    if sharding.size("pp") > 1:
        raise ValueError(
            f"{name} is not for pipelines, whose stages sum their gradients themselves, and the mesh has "
            f"pp={sharding.size('pp')}: give pp=1, or no compression."
        )
    if peers == 1:
        raise ValueError(
            f"{name} is for what goes over dp, and the mesh has dp=1: give the mesh a dp above one, or no compression."
        )
    if peers % compression.group or peers == compression.group:
        raise ValueError(
            f"{name}: groups of {compression.group} do not divide dp={peers} into two or more. Give a smaller divisor "
            f"of {peers}."
        )
    if "parameters" in offload:
        raise ValueError(
            f"{name}: gradients of parameters in the host's memory cannot be compressed. Offload 'optimizer' alone."
        )


def check_residual(compression: Compression | None, residual: Parameters | None) -> None:
    """Raise for a state that was made for another compression."""
    keeps = compression is not None and compression.keeps
    if keeps != (residual is not None):
        has = "does not have what compression keeps" if keeps else "has what another compression keeps"
        raise ValueError(
            f"compression={compression}, but the state {has}: give init_state and make_step the same compression."
        )


# Over a model's gradients.


class Reduced(NamedTuple):
    """What comes of a gradient's way over dp."""

    gradients: Parameters  # summed over dp, as far as they were sent
    residual: Parameters | None  # what was not, on each device, if it is kept
    finite: jax.Array  # whether every gradient was, of every device, sent or not


def reduced(
    compression: Compression, model: Decoder, per_device: Parameters, residual: Parameters | None, step: jax.Array
) -> Reduced:
    """The sum over dp of gradients [dp, ...] by path, each device's its own, with what was kept of earlier ones."""
    mesh = model.sharding.mesh
    whole = {path: where.spec for path, where in _places(model).items() if path in per_device}
    stacked = {path: PartitionSpec(AXIS, *spec) for path, spec in whole.items()}
    kept_specs = stacked if compression.keeps else None

    def on_device(per_device: Parameters, residual: Parameters | None, step: jax.Array) -> Any:
        found, kept, bad = {}, {}, jnp.int32(0)
        for number, (path, spec) in enumerate(whole.items()):
            gradient = per_device[path][0]
            bad += jnp.any(~jnp.isfinite(gradient)).astype(jnp.int32)
            # Devices with other parts of a tensor draw other lots, those with the same part the same.
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), number)
            for axis in (axis for entry in spec for axis in axes_of(entry)):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            before = None if residual is None else residual[path][0]
            found[path], left = _through(compression, gradient, before, key)
            if left is not None:
                kept[path] = left[None]
        finite = jax.lax.psum(bad, mesh.axis_names) == 0
        return found, kept if compression.keeps else None, finite

    shard_map: Any = jax.shard_map
    return Reduced(
        *shard_map(
            on_device,
            mesh=mesh,
            in_specs=(stacked, kept_specs, PartitionSpec()),
            out_specs=(whole, kept_specs, PartitionSpec()),
            check_vma=False,
        )(per_device, residual, step)
    )


def abstract_residual(compression: Compression | None, model: Decoder, paths: Iterable[str]) -> Parameters | None:
    """Shapes and places of what is kept of gradients: a gradient for each dp device, cut as the optimizer's state."""
    if compression is None or not compression.keeps:
        return None
    places, peers = _places(model), model.sharding.size(AXIS)
    shapes = {leaf.path: leaf.variable.shape for leaf in leaves(model)}
    return {
        path: jax.ShapeDtypeStruct(
            (peers, *shapes[path]),
            jnp.float32,
            sharding=NamedSharding(places[path].mesh, PartitionSpec(AXIS, *places[path].spec)),
        )
        for path in paths
    }


def first_residual(compression: Compression | None, model: Decoder, paths: Iterable[str]) -> Parameters | None:
    """Nothing is kept yet."""
    placed = abstract_residual(compression, model, paths)
    if placed is None:
        return None
    make = jax.jit(
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), placed),
        out_shardings=jax.tree.map(lambda a: a.sharding, placed),
    )
    return make()


def _through(
    compression: Compression, gradient: jax.Array, residual: jax.Array | None, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """One device's gradient and residual, of one shape: the sum, and the next residual."""
    peers, value = Peers.along(AXIS), gradient.astype(jnp.float32).reshape(-1)
    if compression.group == 1:
        total, kept = compression.sum(value if residual is None else value + residual.reshape(-1), peers, key)
        return total.reshape(gradient.shape), None if kept is None else kept.reshape(gradient.shape)
    # In two levels: a device compresses the part that is its own, and what it keeps is of that part, in its place.
    inside, across = peers.inside(compression.group), peers.across(compression.group)
    # Of what was kept every device's counts, wherever in it something stands: a run may go on with another dp.
    part = reduce_scatter(value if residual is None else value + residual.reshape(-1), inside)
    total, kept = compression.sum(part, across, jax.random.fold_in(key, inside.place()))
    if kept is not None:
        parts = jnp.zeros((inside.size, kept.size), kept.dtype).at[inside.place()].set(kept)
        kept = parts.reshape(-1)[: value.size].reshape(gradient.shape)
    return all_gather(total, inside, gradient), kept


def _places(model: Decoder) -> dict[str, NamedSharding]:
    """Where gradients lie when they are compressed: as the optimizer takes them."""
    sharding = model.sharding
    cut = sharding.strategy.cuts_optimizer
    return {leaf.path: sharding.parameter(leaf.dims, leaf.variable.shape, leaf.path, cut=cut) for leaf in leaves(model)}
