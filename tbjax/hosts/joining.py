"""`tbjax.initialize()`: make this process one of those that were started together.

The launcher is one that the user has: see `tbjax.hosts.launchers` for those that are recognised. Then the processes
meet (`tbjax.hosts.meeting`), and `jax.distributed`, which does all the rest, starts where they did.

A process that fails must not leave the others waiting. JAX says goodbye to them at exit, which takes as long as they
take to come to their own end; a process that an error ends would so hang among hanging ones. Once initialised, it
therefore leaves at once: its end is noticed, by the launcher first, and the whole job is ended or started anew.
"""

import dataclasses
import datetime
import glob
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from rich.console import Console

from tbjax.hosts import meeting
from tbjax.hosts.launchers import BY_METADATA, SINGLE, Job, explicit, on_tpu_vm, this_job

log = logging.getLogger("tbjax")

# How long to wait for all processes: hosts of one job may start minutes apart, where images have to be fetched first.
MEETING_SECONDS = 300.0

# JAX's own figure: a process that was not heard of for so long is taken for dead, and the job ends.
HEARTBEAT_SECONDS = 100

# What torchrun's store has the coordinator's address under.
_KEY = "tbjax/coordinator"

# What would do where JAX did not find out who this process is.
_REMEDIES = {
    "gcetpu": "The hosts of a TPU slice must all run this program.",
    "k8s": "Let the manifest set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES (examples/multi_node/jobset.yaml).",
    "mpi4py": (
        "Open MPI does not say where process 0 runs: start with `mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT`, or "
        "install mpi4py."
    ),
}

# JAX's meeting comes after ours, when all are there: it takes moments.
_LEAST_SECONDS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """What `initialize` found: this process among those of its job."""

    launcher: str
    process: int
    processes: int
    coordinator: str | None  # None in a single process
    names: tuple[str, ...]  # of the hosts, each once, in the order of their first process
    local_devices: int
    devices: int
    device_kind: str

    def __str__(self) -> str:
        if self.processes == 1:
            return f"one process ({self.launcher}) with {_devices(self.devices, self.device_kind)}"
        names = self.names if len(self.names) <= 4 else (*self.names[:3], "...")
        where = f" on {len(self.names)} host{'s' * (len(self.names) > 1)} ({', '.join(names)})" if names else ""
        return (
            f"process {self.process} of {self.processes} ({self.launcher}){where} with {self.local_devices} of "
            f"{_devices(self.devices, self.device_kind)}, coordinator {self.coordinator}"
        )


# `jax.distributed` is initialised once in the life of a process, so what came of it is the process's too.
_done: list[Hosts] = []


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = MEETING_SECONDS,
    heartbeat_timeout: int = HEARTBEAT_SECONDS,
    quiet: bool = False,
) -> Hosts:
    """Join the processes that were started with this one; in a single process, do nothing.

    Call it before anything else of JAX. Without arguments the launcher's word counts: torchrun's, SLURM's, Open MPI's,
    Kubernetes', a TPU pod's, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Says in
    one line on standard error who met, unless `quiet`. Calling it again is harmless.

    Where processes have not come after `timeout` seconds, `NotMet` names them in all that have. A process that has not
    been heard of for `heartbeat_timeout` seconds later on ends the job.
    """
    arguments = (coordinator_address, num_processes, process_id)
    given = any(argument is not None for argument in arguments)
    if _done:
        return _the_same(_done[0], num_processes, process_id)
    job = explicit(*arguments) if given else this_job()
    found = _met(job, timeout, heartbeat_timeout)
    _done.append(found)
    if not quiet:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"tbjax: {found}")
    return found


def leave(code: int) -> None:
    """End this process at once, without JAX's goodbye, if others would wait for it; otherwise do nothing."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _met(job: Job, timeout: float, heartbeat_timeout: int) -> Hosts:
    names: tuple[str, ...] = ()
    if not job.alone:
        if jax.distributed.is_initialized():
            raise RuntimeError(
                "jax.distributed is initialised already, not by tbjax.initialize(): leave one of the two out."
            )
        if hasattr(jax.config, "jax_enable_preemption_service"):
            # Its handler would swallow the SIGTERM that ends a process while it loads or compiles; a training run has
            # its own way of agreeing on where to stop.
            jax.config.update("jax_enable_preemption_service", False)
        if job.detection is None:
            job, names = _joined(job, timeout, heartbeat_timeout)
        else:
            job = _found_by_jax(job, timeout, heartbeat_timeout)
        # An interactive interpreter calls the hook too, and goes on.
        if not hasattr(sys, "ps1"):
            sys.excepthook = _leaving(sys.excepthook)
    local = jax.local_devices()
    return Hosts(
        launcher=job.launcher,
        process=jax.process_index(),
        processes=jax.process_count(),
        coordinator=job.coordinator,
        names=names,
        local_devices=len(local),
        devices=jax.device_count(),
        device_kind=local[0].device_kind,
    )


def _joined(job: Job, timeout: float, heartbeat_timeout: int) -> tuple[Job, tuple[str, ...]]:
    """The job, with its coordinator's address, and the names of its hosts."""
    began = time.monotonic()
    coordinator, members = _meet(job, timeout)
    left = timeout - (time.monotonic() - began)
    jax.distributed.initialize(
        coordinator,
        job.processes,
        job.process,
        local_device_ids=own_devices(job, on_tpu_vm()),
        initialization_timeout=int(max(_LEAST_SECONDS, left)),
        heartbeat_timeout_seconds=heartbeat_timeout,
        cluster_detection_method="deactivate",
    )
    return dataclasses.replace(job, coordinator=coordinator), tuple(dict.fromkeys(member.host for member in members))


def _found_by_jax(job: Job, timeout: float, heartbeat_timeout: int) -> Job:
    """The job, of which JAX finds out what the environment does not say."""
    try:
        jax.distributed.initialize(
            cluster_detection_method=job.detection,
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if job.detection == BY_METADATA and isinstance(error, ValueError | OSError):
            # Without its metadata a TPU knows of no other hosts either.
            log.warning("this TPU's host has no metadata server, so it is taken to be the only one: %s", error)
            return SINGLE
        raise meeting.NotMet(f"{error} {_REMEDIES[job.detection or '']}") from error
    return dataclasses.replace(job, coordinator="found by JAX")


def _meet(job: Job, timeout: float) -> tuple[str, list[meeting.Member]]:
    """Where the coordinator is to listen, and who is there."""
    process, processes = job.process or 0, job.processes or 1
    me = meeting.this_process(process, jax.__version__)
    store = _Store(job.store, timeout) if job.store else None
    if process == 0:
        server = meeting.listen(job.coordinator, timeout=timeout)
        coordinator = job.coordinator or f"{_own_address(job.store or '')}:{server.getsockname()[1]}"
        if store is not None:
            store.write(coordinator)
        return coordinator, meeting.call(server, me, processes, run=job.run, timeout=timeout)

    def find() -> str | None:
        return store.read() if store is not None else job.coordinator

    return meeting.answer(find, me, processes, run=job.run, timeout=timeout)


class _Store:
    """torchrun's key-value store, which its agent keeps and every worker reaches."""

    def __init__(self, address: str, timeout: float) -> None:
        try:
            from torch.distributed import (
                DistError,
                TCPStore,  # pyright: ignore[reportPrivateImportUsage] (public, says its documentation)
            )
        except ImportError as error:
            raise ImportError(
                "torchrun's store speaks PyTorch's own protocol: pip install 'tbjax[interop]' here too."
            ) from error
        host, _, port = address.rpartition(":")
        try:
            self._store = TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=timeout))
        except DistError as error:
            raise meeting.NotMet(
                f"torchrun's store at {address} was not reached in {timeout:.0f} s: {error}"
            ) from error

    def write(self, address: str) -> None:
        self._store.set(_KEY, address)

    def read(self) -> str | None:
        """The address, which may still be the one of before a restart: whoever finds no one there asks again."""
        return self._store.get(_KEY).decode() if self._store.check([_KEY]) else None


def _own_address(towards: str) -> str:
    """This host's address, as those see it who reach `towards` (host:port)."""
    host, _, port = towards.rpartition(":")
    # Connecting a datagram socket sends nothing: it only asks the routing table.
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        own = probe.getsockname()[0]
    if own.startswith("127.") or own == "::1":
        return host  # it is this host's own name, by which the others know it
    return f"[{own}]" if ":" in own else own


def own_devices(job: Job, tpu_vm: bool = False) -> list[int] | None:
    """The GPUs of this host that are this process's, where it shares them with others; None: all that it sees.

    JAX's own rule for SLURM and Open MPI is one GPU for each process, the only process of a host with eight included.
    """
    here, index = job.local_processes, job.local_process
    if tpu_vm or here is None or index is None or here == 1:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    if count < here:
        return None  # none, or the launcher has given each process its own already
    share = count // here
    return list(range(index * share, (index + 1) * share))


def _the_same(done: Hosts, num_processes: int | None, process_id: int | None) -> Hosts:
    for name, asked, found in (
        ("num_processes", num_processes, done.processes),
        ("process_id", process_id, done.process),
    ):
        if asked not in (None, found):
            raise ValueError(f"initialize({name}={asked}): this process is initialised already, with {found}.")
    return done


def _leaving(before: Callable[..., Any]) -> Callable[..., Any]:
    """An exception hook that ends the process after the one of `before` has said what it was."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        leave(1)

    return hook


def _devices(count: int, kind: str) -> str:
    return f"{count} device{'s' * (count > 1)} ({kind})"
