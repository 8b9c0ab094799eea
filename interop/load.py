"""Stream a checkpoint into sharded arrays: each byte read once, by the process that needs it, straight to its place.

The work is planned from the target. A parameter's sharding says which part of it each device holds; the family's table
(`bindings`) says which rectangle of which tensor that part is. Renaming, stacking layers, splitting fused
projections, transposing experts and converting dtypes are then all one thing: copying rectangles. There is no stage in
which a whole tensor, or a whole layer, exists in some intermediate form.

The plan is a list of jobs in the order of the files. They run in a few threads; the files' pages are asked for ahead of
the threads, as far as a byte budget allows. Whatever a job holds on the host beyond the final arrays counts against
that budget until it is done, so peak host memory beyond the arrays is at most the budget or, if that is larger, the
largest single slice (one layer's part of one weight).

The order of checks is that of cost: names, shapes and dtypes of the whole checkpoint are compared with the model
before a byte of a weight is read.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from interop.bindings import Binding, bindings, check_checkpoint, source_shapes
from interop.copying import BLOCK_BYTES, UNSIGNED
from interop.destinations import Destination, DeviceDestination, HostDestination, Job
from interop.families import Family
from interop.quantized import readers
from interop.readers.base import Checkpoint, CheckpointError, SourceTensor
from tbjax.config import ModelConfig
from tbjax.quantize.convert import weights as quantized_weights
from tbjax.quantize.rules import Encoding
from tbjax.sharding import leaves

# Enough to keep many reads in flight on slow storage, little beside what a host with accelerators has.
DEFAULT_BUDGET = 2 << 30

# More threads than this wait for memory, not for each other's arithmetic.
MOST_THREADS = 16

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one process did to load its part of a model."""

    bytes_read: int  # of the checkpoint's tensors
    seconds: float


def load_parameters(
    abstract: Model,
    config: ModelConfig,
    family: Family,
    checkpoint: Checkpoint,
    *,
    budget: int = DEFAULT_BUDGET,
    threads: int | None = None,
    progress: bool | None = None,
    staged: bool | None = None,
    report: Callable[[Statistics], None] | None = None,
) -> Model:
    """`abstract`, whose leaves are shapes with shardings, filled from the checkpoint.

    `budget` bounds the bytes in flight on the host. `threads` defaults to the cores this process may use. `progress`
    shows a bar, on a terminal and in the first process only. `staged` says whether shards are built on their devices
    (the way of accelerators) or in host memory (the way of the CPU backend); None decides by the platform. `report` is
    called at the end with what this process did.
    """
    if not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget={budget!r}: a positive number of bytes is needed.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads!r}: at least one is needed.")
    began = time.perf_counter()
    bound = bindings(abstract, config, family)
    copies = check_checkpoint(source_shapes(bound), checkpoint, config, family)
    destinations = _destinations(abstract, config, staged, budget)
    place = {name: number for number, name in enumerate(checkpoint)}
    in_file_order = sorted(bound, key=lambda binding: place[binding.source])
    jobs = [job for copy, original in copies for job in _comparisons(checkpoint[copy], checkpoint[original])]
    encodings = {path: weight.encoding for path, weight in quantized_weights(abstract).items()}
    jobs += [job for binding in in_file_order for job in _jobs(binding, destinations, checkpoint, encodings)]
    total = sum(job.reads for job in jobs)
    with _bar(total, wanted=progress is not False) as advance:
        _run(jobs, threads or _usable_cores(), budget, advance)
    # Popped one by one: what a destination held on the host is let go before the next hands over.
    arrays = [destinations.pop(leaf.path).array() for leaf in leaves(abstract)]
    if report is not None:
        report(Statistics(total, time.perf_counter() - began))
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


class Budget:
    """Bytes that may be held at one time. What exceeds it alone is let in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    def acquire(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _destinations(abstract: Any, config: ModelConfig, staged: bool | None, budget: int) -> dict[str, Destination]:
    found: dict[str, Destination] = {}
    for (path, dims, _), struct in zip(leaves(abstract), jax.tree.leaves(abstract), strict=True):
        if getattr(struct, "sharding", None) is None:
            raise ValueError(f"{path} has no sharding: place the abstract model on a mesh first (Sharding.place).")
        padded = "vocab" in dims and config.vocab_size != config.padded_vocab
        if dims[:1] == ("layers",):  # a pipeline's stages may have rows to spare
            padded |= struct.shape[0] != config.groups[int(path.split(".")[1])].repeats
        on_device = any(d.platform != "cpu" for d in struct.sharding.device_set) if staged is None else staged
        # What is narrower on a device than numpy can have it is not put together in the host's memory.
        on_device |= struct.dtype == jnp.int4
        if on_device:
            found[path] = DeviceDestination(struct, budget=budget)
        else:
            found[path] = HostDestination(struct, padded=padded)
    return found


def _jobs(
    binding: Binding,
    destinations: dict[str, Destination],
    checkpoint: Checkpoint,
    encodings: Mapping[str, Encoding],
) -> Iterator[Job]:
    source, encoding = checkpoint[binding.source], encodings.get(binding.path)
    if encoding is None:
        yield from destinations[binding.path].jobs(binding, source)
        return
    for part, of_part, reader in readers(binding, source, encoding):
        yield from destinations[f"{binding.path}.{part}"].jobs(of_part, reader)


def _run(jobs: Iterable[Job], threads: int, budget: int, advance: Callable[[int], None]) -> None:
    """All jobs, in `threads` threads; the first error ends it and is raised."""
    window = Budget(budget)
    stopped = threading.Event()

    def work(job: Job) -> None:
        finished = False
        try:
            if not stopped.is_set():
                job.run()
                advance(job.reads)
            finished = True
        finally:
            if not finished:
                stopped.set()
            window.release(job.holds)

    with ThreadPoolExecutor(threads, thread_name_prefix="tbjax-load") as pool:
        submitted = []
        try:
            for job in jobs:
                window.acquire(job.holds)
                if stopped.is_set():
                    break
                job.prefetch()
                submitted.append(pool.submit(work, job))
            for future in submitted:
                future.result()
        finally:
            stopped.set()  # also when the wait was interrupted: what has not begun does nothing


def _comparisons(copy: SourceTensor, original: SourceTensor) -> Iterator[Job]:
    """Jobs that raise unless the two tensors are equal bit for bit; the processes share the rows between them."""
    if copy.dtype != original.dtype:
        _untied(copy, original)
    rows, count = copy.shape[0], jax.process_count()
    first, last = (rows * (jax.process_index() + i) // count for i in (0, 1))
    step = max(1, BLOCK_BYTES * rows // max(copy.nbytes, 1))

    def compare(index: tuple[slice, ...]) -> None:
        unsigned = UNSIGNED[copy.dtype.itemsize]
        if not np.array_equal(copy.read(index).view(unsigned), original.read(index).view(unsigned)):
            _untied(copy, original)

    for start in range(first, last, step):
        stop = min(start + step, last)
        reads = (stop - start) * (copy.nbytes + original.nbytes) // rows
        held = 3 * BLOCK_BYTES  # both blocks where they must be decoded, and the comparison
        yield Job(reads, held, lambda: None, lambda index=(slice(start, stop),): compare(index))


def _untied(copy: SourceTensor, original: SourceTensor) -> NoReturn:
    raise CheckpointError(
        f"{copy.file}: config.json says tie_word_embeddings, but {copy.name!r} differs from {original.name!r}. One of "
        "them is wrong; if the model has a head of its own, set tie_word_embeddings to false."
    )


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


@contextlib.contextmanager
def _bar(total: int, *, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes and rate on stderr, or nothing; yields what to call with the bytes done, from any thread."""
    if not wanted or jax.process_index() != 0 or not sys.stderr.isatty():
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda size: bar.advance(task, size)
