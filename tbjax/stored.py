"""Arrays in a folder, by path, in Orbax's format: each process writes and reads what its devices hold.

Writing comes in three parts. `start` copies to the host what this process is to write, after which the arrays may
change; what it returns waits, in whatever thread, until that lies on the disk; and `finish`, in the first process when
all others have waited, joins the parts.

    wait = start(folder, {"stacks.0.0.mlp.up.weight": array})
    wait()
    finish(folder)

The numbers are written as they are: zstd, which Orbax would put them through, takes a tenth off float32 weights and
three quarters of the speed. A stack is cut into its layers, so that a stage of a pipeline, or an export that goes
through a model layer after layer, reads the bytes of its own layers alone. What is read comes by TensorStore, which
is what Orbax reads with, straight into a buffer that is used again, and from there to a device.
"""

import asyncio
import contextlib
import logging
import math
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

# What may be on its way between disk and devices at any time, where no single shard is larger.
BUDGET = 256 << 20

# Of parts at a time: where one waits for the disk, another is copied. More are no faster on a local disk.
READERS = 4

# For the index of a folder, which would otherwise be read anew for every part. Orbax allows it as much.
INDEX_BYTES = 100_000_000


def start(folder: Path, arrays: Mapping[str, jax.Array], *, background: bool = True) -> Callable[[], None]:
    """Copy to the host what this process has to write to `folder`, and begin; the result waits for the end of it.

    Unless in the `background`, no more is copied at a time than `BUDGET`, and all is written when this returns.
    """
    limit: Any = None if background else _limit(arrays)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, save_device_host_concurrent_gb=limit)
    tree, options = _nested(arrays), _nested({path: _options(path, array) for path, array in arrays.items()})
    place = epath.Path(folder)
    futures = _run(handler.async_save(place, args=ocp.args.PyTreeSave(tree, save_args=options))) or []

    def wait() -> None:
        errors = list(filter(None, map(_error, futures)))  # of all: when this returns, nothing more is written
        handler.close()
        if errors:
            raise errors[0]

    if not background:
        wait()
        return lambda: None
    return wait


def finish(folder: Path) -> None:
    """Join what the processes have written."""
    handler = ocp.PyTreeCheckpointHandler()
    handler.finalize(epath.Path(folder))
    handler.close()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Leave it to the error that a write raises to say what went wrong.

    Orbax logs it too, with a traceback for every thread that it passes through, and Python what TensorStore still has
    to say to an event loop that has ended by then.
    """
    orbax, before = logging.getLogger("absl"), sys.unraisablehook

    def unheard(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in record.getMessage()

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    orbax.addFilter(unheard)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        orbax.removeFilter(unheard)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def shapes(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """What lies in `folder`: shapes and dtypes, by path."""
    found: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
    flat = jax.tree_util.tree_flatten_with_path(found.tree)[0]
    return {
        jax.tree_util.keystr(key, simple=True, separator="."): jax.ShapeDtypeStruct(array.shape, array.dtype)
        for key, array in flat
    }


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays that are `wanted`, in the shapes, dtypes and places that are given (of arrays, or their abstractions).

    Others may lie in `folder`; they are not read.
    """
    opened, scratch = _Opened(folder), threading.local()
    largest = max((_shard_bytes(array) for array in wanted.values()), default=0)
    with ThreadPoolExecutor(max(1, min(READERS, BUDGET // max(largest, 1))), "restore") as pool:
        reading = {
            path: [
                pool.submit(_read_shard, opened.array(path, array.shape), array, index, devices, scratch)
                for index, devices in _shards(array)
            ]
            for path, array in wanted.items()
        }
        return {
            path: jax.make_array_from_single_device_arrays(
                array.shape,
                array.sharding,
                [shard for future in reading[path] for shard in future.result()],
                dtype=array.dtype,
            )
            for path, array in wanted.items()
        }


class Slices:
    """The arrays of a folder, of which parts are read as numpy arrays, without a device."""

    def __init__(self, folder: Path) -> None:
        self._opened = _Opened(folder)

    def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The array at `path`, or what stands in it at an index of its first dimensions."""
        return self._opened.array(path)[index or ...].read().result()


class _Opened:
    """The arrays of a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        import tensorstore

        self._folder = Path(folder).absolute()
        self._context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": INDEX_BYTES}})
        self._arrays: dict[str, Any] = {}

    def array(self, path: str, shape: tuple[int, ...] | None = None) -> Any:
        """The array at `path`, which must have this shape, if one is given."""
        import tensorstore

        if path not in self._arrays:
            base = f"file://{self._folder}/"
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{path}/", "cache_pool": "cache_pool#index"},
                "recheck_cached_data": False,  # a checkpoint in its place does not change
                "recheck_cached_metadata": False,
                "fill_missing_data_reads": False,  # what is not there is an error, not zeros
            }
            self._arrays[path] = tensorstore.open(spec, open=True, read=True, context=self._context).result()
        found = self._arrays[path]
        if shape is not None and tuple(found.shape) != tuple(shape):
            raise ValueError(f"{self._folder}: {path} has shape {list(found.shape)}, wanted is {list(shape)}.")
        return found


def _shards(array: Any) -> Iterator[tuple[tuple[slice, ...], list[Any]]]:
    """What the devices of this process are to hold of an array: each part once, with those that hold it."""
    devices: dict[Any, list[Any]] = {}
    for device, index in array.sharding.addressable_devices_indices_map(tuple(array.shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    for bounds, holders in devices.items():
        yield tuple(slice(*bound) for bound in bounds), holders


def _read_shard(
    stored: Any, wanted: Any, index: tuple[slice, ...], devices: Sequence[Any], scratch: threading.local
) -> list[jax.Array]:
    """A part of an array on each of these devices.

    It comes by way of a buffer that its thread uses again and again: new memory costs as much as what is read into it.
    """
    import tensorstore

    part = stored[index]
    dtype = part.dtype.numpy_dtype
    size = math.prod(part.shape) * dtype.itemsize
    if getattr(scratch, "room", _NO_ROOM).nbytes < size:
        scratch.room = _room(size)
    here = scratch.room[:size].view(dtype).reshape(part.shape)
    tensorstore.array(here)[tensorstore.d[:].translate_to[part.domain.origin]].write(part).result()
    with np.errstate(over="ignore"):  # whoever asks for a narrower dtype looks at what has come of it
        converted = here.astype(wanted.dtype, copy=False)
    memory = wanted.sharding.memory_kind
    places = [SingleDeviceSharding(device, memory_kind=memory) for device in devices]
    placed = jax.block_until_ready([jax.device_put(converted, place) for place in places])
    if devices[0].platform == "cpu" and any(one.unsafe_buffer_pointer() == converted.ctypes.data for one in placed):
        scratch.room = _NO_ROOM  # JAX has taken it over after all
    return placed


_NO_ROOM = np.empty(0, np.uint8)


def _room(size: int) -> np.ndarray:
    """A buffer that JAX copies from.

    On a CPU it takes over what begins at a multiple of 64 bytes, and a training step could not have that memory.
    """
    room = np.empty(size + 128, np.uint8)
    begin = -room.ctypes.data % 64 + 16
    return room[begin : begin + size]


def _error(future: Any) -> Exception | None:
    """What came of a future, if that is an error."""
    try:
        future.result()
    except Exception as error:  # noqa: BLE001 - raised by the caller, when all have come to an end
        return error
    return None


def _options(path: str, array: jax.Array) -> ocp.SaveArgs:
    return ocp.SaveArgs(shard_axes=(0,) if "stacks." in path and array.ndim > 1 else ())


def _limit(arrays: Mapping[str, Any]) -> float:
    """The budget in Orbax's 10^9 bytes; it must be more than any one shard."""
    return max(BUDGET, max(map(_shard_bytes, arrays.values()), default=0) + 1) / 1e9


def _shard_bytes(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(tuple(array.shape))) * array.dtype.itemsize


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(arrays), sep=".")


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, also where an event loop is running already, as in a notebook."""
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, name="checkpoint")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
