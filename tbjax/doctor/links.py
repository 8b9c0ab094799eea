"""Collectives along each axis of a mesh: are they right, and how fast?

A figure is the bandwidth of the busiest link, as NVIDIA's nccl-tests count it ("bus bandwidth",
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): what a collective over p devices must send of n
bytes, by the time it took. So figures of different collectives and of different p compare with one another, and with
what the links are sold as.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tbjax.mesh import crossing_axes

# The first call compiles, the second may still set connections up.
_WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What a collective did along an axis; or a copy between host and device, whose axis is "host"."""

    axis: str
    devices: int
    collective: str
    nbytes: int  # on each device
    seconds: float  # the median
    gb_per_second: float
    crosses_hosts: bool
    right: bool  # whether the result was what it must be


def measure(mesh: Mesh, *, nbytes: int, repeats: int) -> list[Link]:
    """Every collective along every axis of `mesh` that has more than one device, on `nbytes` in each device."""
    crossing = crossing_axes(mesh)
    links = _host_links(mesh, nbytes, repeats)
    for axis, size in mesh.shape.items():
        if size > 1:
            for collective in _COLLECTIVES:
                links.append(_time(mesh, axis, collective, nbytes, repeats, axis in crossing))
    return links


# What of its bytes each device must send, over p devices.
_SENT: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda p: 2 * (p - 1) / p,
    "all-gather": lambda p: (p - 1) / p,
    "reduce-scatter": lambda p: (p - 1) / p,
    "ring": lambda p: 1.0,
}


def _all_reduce(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum(x, axis)


def _all_gather(x: jax.Array, axis: str) -> jax.Array:
    # A share of what the others are given whole: the result is what n counts.
    share = x[: len(x) // jax.lax.axis_size(axis)]
    return jax.lax.all_gather(share, axis, tiled=True)


def _reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum_scatter(x, axis, tiled=True)


def _ring(x: jax.Array, axis: str) -> jax.Array:
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(index, (index + 1) % size) for index in range(size)])


_COLLECTIVES: Mapping[str, Callable[[jax.Array, str], jax.Array]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "ring": _ring,
}


def _expected(collective: str, size: int, own: int) -> np.ndarray | float:
    """What the device at `own` must end with where each began with its own place on the axis, plus one."""
    if collective in ("all-reduce", "reduce-scatter"):
        return size * (size + 1) / 2
    if collective == "ring":
        return float((own - 1) % size + 1)
    return np.arange(1, size + 1, dtype=np.float32)


def _time(mesh: Mesh, axis: str, collective: str, nbytes: int, repeats: int, crosses: bool) -> Link:
    size = mesh.shape[axis]
    count = max(1, nbytes // 4 // size) * size
    along = PartitionSpec(mesh.axis_names)
    where = NamedSharding(mesh, along)
    place = np.indices(mesh.devices.shape)[mesh.axis_names.index(axis)]

    def local(index: Any) -> np.ndarray:
        device = index[0].indices(mesh.size * count)[0] // count
        return np.full(count, place.flat[device] + 1, np.float32)

    data = jax.make_array_from_callback((mesh.size * count,), where, local)
    mapped = jax.shard_map(
        lambda x: _COLLECTIVES[collective](x, axis),
        mesh=mesh,
        in_specs=along,
        out_specs=along,
        check_vma=False,
    )
    run = jax.jit(mapped)
    result = jax.block_until_ready(run(data))
    right = True
    for shard in result.addressable_shards:
        length = shard.data.shape[0]
        own = int(place.flat[shard.index[0].indices(result.shape[0])[0] // length])
        wanted = _expected(collective, size, own)
        rows = np.asarray(shard.data).reshape(np.size(wanted), -1)
        right &= bool((rows == np.reshape(wanted, (-1, 1))).all())
    seconds = _median(lambda: jax.block_until_ready(run(data)), repeats)
    return Link(
        axis=axis,
        devices=size,
        collective=collective,
        nbytes=count * 4,
        seconds=seconds,
        gb_per_second=_SENT[collective](size) * count * 4 / seconds / 1e9,
        crosses_hosts=crosses,
        right=right,
    )


def _host_links(mesh: Mesh, nbytes: int, repeats: int) -> list[Link]:
    """Between the host's memory and one device's."""
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    there = np.arange(max(1, nbytes // 4), dtype=np.float32)
    here = jax.block_until_ready(jax.device_put(there, device))
    # A copy of an array on the host is kept beside it: a new one is needed each time.
    fresh = iter([jax.block_until_ready(here + jnp.float32(turn)) for turn in range(repeats + _WARM_UP)])
    right = bool((np.asarray(here) == there).all())
    timed = {
        "to device": _median(lambda: jax.block_until_ready(jax.device_put(there, device)), repeats),
        "to host": _median(lambda: np.asarray(next(fresh)).sum(), repeats),
    }
    return [
        Link(
            axis="host",
            devices=1,
            collective=direction,
            nbytes=there.nbytes,
            seconds=seconds,
            gb_per_second=there.nbytes / seconds / 1e9,
            crosses_hosts=False,
            right=right,
        )
        for direction, seconds in timed.items()
    ]


def _median(act: Callable[[], object], repeats: int) -> float:
    for _ in range(_WARM_UP):
        act()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
