"""The ways to load a checkpoint that `benchmarks.load` compares. Each runs alone in a fresh process:

    python -m benchmarks.contenders tbjax /path/to/checkpoint --threads 2 --budget 268435456

and prints one line of JSON. Imports, and the start of JAX's devices, are not timed. The clock stops when every weight
has been touched: all bytes of all arrays are read once, in every contender by the same function.
"""

import argparse
import contextlib
import importlib
import json
import math
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.memory import AnonymousMemory

# Every matrix is cut in both directions: the hardest case for whoever has to copy rows.
MESH = (1, 4, 2)
DEVICES = math.prod(MESH)

# A piece of a file that one thread reads at a time; for the raw ways.
CHUNK = 8 << 20


class Task(NamedTuple):
    """What to load, and with what."""

    path: Path
    threads: int
    budget: int
    dtype: str | None


class Loaded(NamedTuple):
    """What a contender made."""

    arrays: Sequence[np.ndarray]  # views of all weights, each once
    owner: Any  # what keeps them alive


def tbjax(task: Task) -> Loaded:
    import tbjax as library

    model = library.load(task.path, mesh=MESH, dtype=task.dtype, budget=task.budget, trust_pickle=True, progress=False)
    return _jax_arrays(model)


def transformers(task: Task) -> Loaded:
    import torch
    import transformers as library

    torch.set_num_threads(task.threads)
    folder, options = task.path, {}
    if task.path.suffix == ".gguf":
        folder, options = task.path.parent, {"gguf_file": task.path.name}
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=task.dtype or "auto", **options)
    unique = {tensor.data_ptr(): tensor.detach() for tensor in model.parameters()}
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return Loaded([tensor.view(integers[tensor.itemsize]).numpy() for tensor in unique.values()], model)


def orbax(task: Task) -> Loaded:
    """Orbax's reader of safetensors: the tensors under their own names, cut like ours wherever two dimensions allow."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from orbax.checkpoint.experimental import v1 as library

    from interop.readers import open_checkpoint

    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(MESH[1:], ("fsdp", "tp"), axis_types=kinds)
    specs = {1: PartitionSpec(), 2: PartitionSpec("tp", "fsdp")}
    with open_checkpoint(task.path) as checkpoint:
        abstract = {
            name: jax.ShapeDtypeStruct(
                tensor.shape, tensor.dtype, sharding=NamedSharding(mesh, specs[len(tensor.shape)])
            )
            for name, tensor in checkpoint.items()
        }
    context = library.Context()
    context.checkpoint_layout = library.options.CheckpointLayout.SAFETENSORS
    with context:
        return _jax_arrays(library.load_pytree(task.path, abstract))


def raw_preadv(task: Task) -> Loaded:
    """The limit: chunks of the file read into one fresh array, each by the next free thread."""
    return _raw(task, _pread)


def raw_stretches(task: Task) -> Loaded:
    """The limit: as many stretches of the file as threads."""
    return _raw(task, _pread, stretches=True)


def raw_map(task: Task) -> Loaded:
    """The limit: chunks copied from a mapping of the file."""
    return _raw(task, _copy_mapped)


CONTENDERS: dict[str, Callable[[Task], Loaded]] = {
    function.__name__: function for function in (tbjax, transformers, orbax, raw_preadv, raw_stretches, raw_map)
}
LOADERS = ("tbjax", "transformers", "orbax")
LIMITS = ("raw_preadv", "raw_stretches", "raw_map")

# Loaded before the clock starts, so that it measures loading.
IMPORTS = {
    "tbjax": (
        "tbjax.api",
        "transformers.models.llama.configuration_llama",
        "interop.load",
        "interop.source",
        "gguf",
        "torch",
    ),
    "transformers": ("torch", "transformers", "transformers.models.llama.modeling_llama", "gguf", "accelerate"),
    "orbax": ("orbax.checkpoint.experimental.v1", "interop.readers"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--backed", type=int, default=0, help="bytes to write and let go before the clock starts")
    parser.add_argument("--settle", type=float, default=0, help="seconds to wait before the clock starts")
    arguments = parser.parse_args()
    task = Task(arguments.path, arguments.threads, arguments.budget, arguments.dtype)
    for name in IMPORTS.get(arguments.contender, ()):
        importlib.import_module(name)
    if arguments.contender in ("tbjax", "orbax"):
        import jax

        # A first array and a first program: the threads and pools that they start belong to no contender.
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.device_put(np.ones(8), jax.devices()[0])))
    time.sleep(arguments.settle)
    np.ones(arguments.backed, np.uint8)
    with AnonymousMemory() as memory:
        began = time.perf_counter()
        loaded = CONTENDERS[arguments.contender](task)
        touch(loaded.arrays, task.threads)
        seconds = time.perf_counter() - began
    weights = sum(array.nbytes for array in loaded.arrays)
    print(json.dumps({"seconds": seconds, "weight_bytes": weights, "peak_bytes": memory.peak - memory.before}))


def touch(arrays: Iterable[np.ndarray], threads: int) -> int:
    """Read all bytes of all arrays."""
    pieces = []
    for array in arrays:
        flat = array.reshape(-1).view(np.uint8)
        step = CHUNK
        pieces += [flat[start : start + step] for start in range(0, flat.size, step)]

    def read(piece: np.ndarray) -> int:
        words = piece[: piece.size // 8 * 8].view(np.uint64)
        return int(np.bitwise_xor.reduce(words)) ^ int(np.bitwise_xor.reduce(piece[words.nbytes :]))

    with ThreadPoolExecutor(threads) as pool:
        return math.prod(pool.map(read, pieces)) & 1


def _jax_arrays(tree: Any) -> Loaded:
    """Every distinct shard of every array, as numpy sees it."""
    import jax

    jax.block_until_ready(tree)
    shards = [
        np.asarray(shard.data)
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    return Loaded(shards, tree)


def _raw(task: Task, read: "Read", stretches: bool = False) -> Loaded:
    path = task.path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    arrays = []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(task.threads) as pool:
        futures = []
        for name in files:
            file = stack.enter_context(name.open("rb", buffering=0))
            array = np.empty(name.stat().st_size, np.uint8)
            step = -(-array.size // task.threads) if stretches else CHUNK
            futures += [pool.submit(read, file, array[at : at + step], at) for at in range(0, array.size, step)]
            arrays.append(array)
        for future in futures:
            future.result()
    return Loaded(arrays, None)


# Fills an array from a file, from a byte on.
Read = Callable[[FileIO, np.ndarray, int], None]


def _pread(file: FileIO, target: np.ndarray, start: int) -> None:
    done = 0
    while done < target.size:
        done += os.preadv(file.fileno(), [target[done:].data], start + done)


def _copy_mapped(file: FileIO, target: np.ndarray, start: int) -> None:
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        target.data[:] = memoryview(mapped)[start : start + target.size]


if __name__ == "__main__":
    main()
