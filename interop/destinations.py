"""Where a parameter's shards are put together: in host memory that JAX adopts, or on the devices piece by piece.

On the CPU backend a shard is a numpy array that is filled in any order and then becomes the `jax.Array` without a copy.
On an accelerator a stack of layers is built where it will live: zeros, into which each layer is written as it arrives,
so that the host never holds more than the layers in flight. Each device is served by itself rather than by one program
over all: processes need not march in step, and a stack whose layers are spread over pipeline stages is nothing special.

Both hand out `Job`s, which any thread may run in any order, and at the end the array.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from interop.bindings import Binding, rectangles
from interop.copying import Move, aligned, blocks, fill, passing
from interop.readers.base import Index, SourceTensor

# What a type checker can be told of `jax.Device`, which is no class to it.
Device = Any

# Bytes of a source that one job copies: few enough that threads end together, enough that starting a job costs nothing.
JOB_BYTES = 8 << 20


class Job(NamedTuple):
    """A piece of work for one thread."""

    reads: int  # bytes of the checkpoint
    holds: int  # bytes of the budget, from before it starts until it is done
    prefetch: Callable[[], None]
    run: Callable[[], None]


class Shard(NamedTuple):
    """A part of an array, and the devices of this process that hold it."""

    bounds: tuple[tuple[int, int], ...]
    devices: tuple[Device, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)


class Destination(Protocol):
    """One parameter while it is loaded."""

    def jobs(self, binding: Binding, source: SourceTensor) -> Iterator[Job]:
        """What is to be done to fill the part that is bound to `source`."""
        ...

    def array(self) -> jax.Array:
        """The parameter, once all jobs are done. The destination is used up."""
        ...


def local_shards(shape: tuple[int, ...], sharding: Sharding) -> tuple[Shard, ...]:
    """What this process holds of an array, each part once, however many of its devices have it."""
    holders: dict[tuple[tuple[int, int], ...], list[Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    return tuple(Shard(bounds, tuple(devices)) for bounds, devices in holders.items())


class HostDestination:
    """Shards in host memory, filled in place and adopted."""

    def __init__(self, struct: jax.ShapeDtypeStruct, *, padded: bool) -> None:
        self._struct = struct
        self._shards = local_shards(struct.shape, struct.sharding)
        # Memory fresh from the system costs nothing until it is written, so all of it can be asked for at once.
        self._buffers = [aligned(shard.shape, np.dtype(struct.dtype), zeroed=padded) for shard in self._shards]

    def jobs(self, binding: Binding, source: SourceTensor) -> Iterator[Job]:
        moves = [
            _move(rectangle, buffer, binding)
            for shard, buffer in zip(self._shards, self._buffers, strict=True)
            for rectangle in rectangles(binding, shard.bounds)
        ]
        for part in blocks(moves, source.dtype.itemsize, JOB_BYTES):
            reads = _bytes(part, source)
            yield Job(reads, reads, functools.partial(_prefetch, source, part), functools.partial(fill, source, part))

    def array(self) -> jax.Array:
        # Several devices may adopt one buffer: JAX never writes to memory that it was lent, not even when donated.
        arrays = {
            device: jax.device_put(buffer, device)
            for shard, buffer in zip(self._shards, self._buffers, strict=True)
            for device in shard.devices
        }
        self._buffers.clear()
        return _assembled(self._struct, arrays)


class DeviceDestination:
    """Shards on their devices, written piece by piece through the host."""

    def __init__(self, struct: jax.ShapeDtypeStruct, *, budget: int) -> None:
        self._struct = struct
        self._budget = budget
        self._shards = local_shards(struct.shape, struct.sharding)
        self._arrays: dict[Device, jax.Array] = {}
        self._lock = threading.Lock()

    def jobs(self, binding: Binding, source: SourceTensor) -> Iterator[Job]:
        """One job for all shards, so that a row goes to all its devices in one pass; one each if that is too much."""
        parts = []
        for shard in self._shards:
            found = rectangles(binding, shard.bounds)
            if found:
                parts.append((shard, found))
        together = sum(self._piece_bytes(shard, binding) for shard, _ in parts) <= self._budget
        for group in [parts] if together and parts else [[part] for part in parts]:
            sources = [rectangle.source for _, found in group for rectangle in found]
            reads = _volume(sources) * source.nbytes // max(math.prod(source.shape), 1)
            yield Job(
                reads,
                sum(self._piece_bytes(shard, binding) for shard, _ in group),
                functools.partial(_prefetch_each, source, sources),
                functools.partial(self._run, binding, source, group),
            )

    def array(self) -> jax.Array:
        for shard in self._shards:
            for device in shard.devices:
                if device not in self._arrays:  # nothing but padding
                    self._arrays[device] = self._zeros(shard, device)
        return _assembled(self._struct, self._arrays)

    def _run(self, binding: Binding, source: SourceTensor, group: Sequence[tuple[Shard, list[Any]]]) -> None:
        lead = len(binding.part)
        moves, pieces = [], []
        for shard, found in group:
            piece = passing(shard.shape[lead:], np.dtype(self._struct.dtype))
            moves += [_move(rectangle._replace(target=rectangle.target[lead:]), piece, binding) for rectangle in found]
            pieces.append(piece)
        fill(source, moves)
        sent = {
            device: (shard, jax.device_put(piece, device))
            for (shard, _), piece in zip(group, pieces, strict=True)
            for device in shard.devices
        }
        del moves, pieces
        jax.block_until_ready([piece for _, piece in sent.values()])
        with self._lock:  # a stack is given to its update, so nobody else may hold it meanwhile
            for device, (shard, piece) in sent.items():
                if not lead:
                    self._arrays[device] = piece
                    continue
                index = tuple(np.int32(i - start) for i, (start, _) in zip(binding.part, shard.bounds, strict=False))
                stack = self._arrays.pop(device, None)
                stack = self._zeros(shard, device) if stack is None else stack
                self._arrays[device] = _write(stack, piece, index)
            del sent
            jax.block_until_ready(list(self._arrays.values()))

    def _zeros(self, shard: Shard, device: Device) -> jax.Array:
        return jnp.zeros(shard.shape, self._struct.dtype, device=device)

    def _piece_bytes(self, shard: Shard, binding: Binding) -> int:
        return math.prod(shard.shape[len(binding.part) :]) * np.dtype(self._struct.dtype).itemsize


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, piece: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """`stack` with `piece` at `index`, in place."""
    piece = piece.reshape((1,) * len(index) + piece.shape)
    return jax.lax.dynamic_update_slice(stack, piece, (*index, *(np.int32(0),) * (stack.ndim - len(index))))


def _assembled(struct: jax.ShapeDtypeStruct, arrays: dict[Device, jax.Array]) -> jax.Array:
    return jax.make_array_from_single_device_arrays(
        struct.shape, struct.sharding, list(arrays.values()), dtype=struct.dtype
    )


def _move(rectangle: Any, buffer: np.ndarray, binding: Binding) -> Move:
    target = buffer[rectangle.target]
    return Move(rectangle.source, target.T if binding.transpose else target)


def _bytes(moves: Sequence[Move], source: SourceTensor) -> int:
    """What the moves take from the file (less than the values' own bytes where they are stored quantised)."""
    return _volume([move.source for move in moves]) * source.nbytes // max(math.prod(source.shape), 1)


def _volume(indices: Sequence[Index]) -> int:
    return sum(math.prod(part.stop - part.start for part in index) for index in indices)


def _prefetch(source: SourceTensor, moves: Sequence[Move]) -> None:
    _prefetch_each(source, [move.source for move in moves])


def _prefetch_each(source: SourceTensor, indices: Sequence[Index]) -> None:
    # The rows are what can be read ahead; the shards of one row share them.
    for start, stop in sorted({(index[0].start, index[0].stop) for index in indices}):
        source.prefetch((slice(start, stop),))
