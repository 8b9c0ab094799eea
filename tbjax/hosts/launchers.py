"""Who this process is, by what started it: read from the environment alone, so that any environment can be tried.

Each launcher says it in variables of its own:

    torchrun           RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK
    Open MPI, PMIx     OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_MCA_orte_hnp_uri (up to 4), PMIX_NAMESPACE (5)
    SLURM              SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NODELIST, SLURM_LOCALID (set by srun, not by sbatch)
    TPU on Kubernetes  TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, MEGASCALE_* (several slices)
    Kubernetes Job     JOB_COMPLETION_INDEX, KUBERNETES_SERVICE_HOST; a JobSet's manifest adds JAX's own
    JAX's own          JAX_PROCESS_ID, JAX_NUM_PROCESSES, JAX_COORDINATOR_ADDRESS
    TPU VM             nothing in the environment: JAX asks the machine's metadata server

One may run inside another (torchrun under srun, say): the innermost, first in this list, speaks for the process. JAX's
own variables may add what a launcher leaves open; where they say otherwise, that is an error and not a choice.
"""

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

# Ports from here on belong to nobody (RFC 6335 has 49152 to 65535); the last 4096 are where JAX too puts coordinators.
_FIRST_PORT, _PORTS = 61440, 4096

# Where a manifest names a host without a port.
_USUAL_PORT = 8476

# Ways of JAX to find out what the environment does not say, by the name that `cluster_detection_method` takes.
BY_KUBERNETES, BY_MPI4PY, BY_METADATA = "k8s", "mpi4py", "gcetpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A process's place among those that were started together."""

    launcher: str
    process: int | None = None  # None, as everything below: for JAX to find out, by `detection`
    processes: int | None = None
    coordinator: str | None = None  # host:port, where process 0 can be met
    store: str | None = None  # torchrun's key-value store, host:port: there the coordinator's address is agreed upon
    detection: str | None = None
    local_process: int | None = None  # among the processes of its host
    local_processes: int | None = None
    run: str = ""  # what tells this job from others of the same machine

    @property
    def alone(self) -> bool:
        return self.processes == 1


SINGLE = Job(launcher="single process", process=0, processes=1, local_process=0, local_processes=1)


class Contradiction(ValueError):
    """The environment says two things about one."""


def this_job() -> Job:
    """The job that this process is of."""
    return recognise(os.environ, tpu_vm=on_tpu_vm())


def recognise(environment: Mapping[str, str], *, tpu_vm: bool = False) -> Job:
    """The job that `environment` speaks of; `SINGLE` where it speaks of none.

    `tpu_vm` says that this machine is a TPU VM: on one whose environment says nothing more, JAX asks its metadata.
    """
    said = {name: value for name, value in environment.items() if value != ""}
    found = next((job for read in _LAUNCHERS if (job := read(said)) is not None), None)
    if found is None:
        named = [name for name in _OWN if name in said]
        if named:
            lacking = [name for name in _OWN if name not in said]
            raise Contradiction(
                f"{' and '.join(named)} {'is' if len(named) == 1 else 'are'} set, {' and '.join(lacking)} "
                f"{'is' if len(lacking) == 1 else 'are'} not, and no launcher is recognised: set all three, or none."
            )
        return Job(launcher="TPU VM", detection=BY_METADATA) if tpu_vm else SINGLE
    return _checked(_completed(found, said))


def on_tpu_vm() -> bool:
    """Whether this is a TPU's host: its chips are devices of the kernel. (A machine without may have libtpu too.)"""
    if os.environ.get("TPU_SKIP_MDS_QUERY") or os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return False
    return Path("/dev/accel0").exists() or any(Path(f"/dev/vfio/{index}").exists() for index in range(8))


def explicit(coordinator: str | None, processes: int | None, process: int | None) -> Job:
    """The job that a caller describes."""
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    lacking = [name for name, value in given.items() if value is None]
    if lacking and processes != 1:
        raise ValueError(
            f"initialize() was given {', '.join(name for name in given if name not in lacking)} but not "
            f"{' and '.join(lacking)}: give all three, or none where a launcher says them."
        )
    job = Job(launcher="arguments", process=process or 0, processes=processes, coordinator=coordinator)
    return _checked(job)


def _completed(job: Job, said: Mapping[str, str]) -> Job:
    """With what JAX's own variables add."""
    address, count, index = (said.get(name) for name in _OWN)
    for name, own, launchers in (
        ("JAX_NUM_PROCESSES", count, job.processes),
        ("JAX_PROCESS_ID", index, job.process),
    ):
        if own is not None and launchers is not None and _number(said, name) != launchers:
            raise Contradiction(
                f"{name}={own}, but {job.launcher} says {launchers}: unset {name}, or start the job without "
                f"{job.launcher}."
            )
    added = {
        "processes": job.processes if count is None else _number(said, "JAX_NUM_PROCESSES"),
        "process": job.process if index is None else _number(said, "JAX_PROCESS_ID"),
        "coordinator": job.coordinator if address is None else _with_port(address),
        "store": job.store if address is None else None,
    }
    known = None not in (added["processes"], added["process"]) and (added["coordinator"] or added["store"])
    return dataclasses.replace(job, **added, detection=None if known else job.detection)


def _checked(job: Job) -> Job:
    if job.processes is not None and job.processes < 1:
        raise Contradiction(f"{job.launcher} says that there are {job.processes} processes: one is the least.")
    if job.processes is not None and job.process is not None and not 0 <= job.process < job.processes:
        raise Contradiction(
            f"{job.launcher} says that this is process {job.process} of {job.processes}: they count from 0 to "
            f"{job.processes - 1}."
        )
    if job.coordinator is not None:
        _with_port(job.coordinator, needed=True)
    return job


def _torchrun(said: Mapping[str, str]) -> Job | None:
    if "RANK" not in said or "WORLD_SIZE" not in said:
        return None
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in said]
    if lacking and _number(said, "WORLD_SIZE") > 1:
        raise Contradiction(
            f"RANK={said['RANK']} and WORLD_SIZE={said['WORLD_SIZE']} are set, as torchrun does, but "
            f"{' and '.join(lacking)} not: processes cannot find each other. Set {' and '.join(lacking)}, or start "
            "them with torchrun."
        )
    address = f"{said['MASTER_ADDR']}:{_number(said, 'MASTER_PORT')}" if not lacking else None
    # torchrun's agent listens on MASTER_PORT itself; others that set the same variables leave it to process 0.
    taken = said.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    return Job(
        launcher="torchrun",
        process=_number(said, "RANK"),
        processes=_number(said, "WORLD_SIZE"),
        coordinator=None if taken else address,
        store=address if taken else None,
        local_process=_optional(said, "LOCAL_RANK"),
        local_processes=_optional(said, "LOCAL_WORLD_SIZE"),
        # After an elastic restart there may be more or fewer. (TORCHELASTIC_RESTART_COUNT would not tell: each agent
        # counts its own.)
        run=f"{said.get('TORCHELASTIC_RUN_ID', '')}/{said['WORLD_SIZE']}",
    )


def _open_mpi(said: Mapping[str, str]) -> Job | None:
    if "OMPI_COMM_WORLD_RANK" not in said or "OMPI_COMM_WORLD_SIZE" not in said:
        return None
    processes, here = _number(said, "OMPI_COMM_WORLD_SIZE"), _optional(said, "OMPI_COMM_WORLD_LOCAL_SIZE")
    coordinator = None
    run = said.get("PMIX_NAMESPACE", "")
    if uri := said.get("OMPI_MCA_orte_hnp_uri"):
        # Such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, of mpirun's own host, where process 0 runs too.
        where = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
        if where is None:
            raise Contradiction(f"OMPI_MCA_orte_hnp_uri={uri!r} holds no address: set JAX_COORDINATOR_ADDRESS.")
        # Open MPI's job numbers are multiples of 4096.
        number = int(re.match(r"\d*", uri)[0] or 0) // 4096  # pyright: ignore[reportOptionalSubscript]
        host = where[1] or f"[{where[2]}]"
        coordinator = f"{host}:{_FIRST_PORT + number % _PORTS}"
    elif here == processes:
        # All on one host. A checksum rather than hash(), which differs from process to process.
        coordinator = f"localhost:{_FIRST_PORT + zlib.crc32(run.encode()) % _PORTS}"
    return Job(
        launcher="Open MPI",
        process=_number(said, "OMPI_COMM_WORLD_RANK"),
        processes=processes,
        coordinator=coordinator,
        detection=None if coordinator else BY_MPI4PY,
        local_process=_optional(said, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_processes=here,
        run=run,
    )


def _slurm(said: Mapping[str, str]) -> Job | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in said for name in needed):
        return None  # within sbatch or salloc, but not started by srun: one process, whatever was allocated
    processes = _optional(said, "SLURM_STEP_NUM_TASKS") or _number(said, "SLURM_NTASKS")
    job, step = _number(said, "SLURM_JOB_ID"), _optional(said, "SLURM_STEP_ID") or 0
    return Job(
        launcher="SLURM",
        process=_number(said, "SLURM_PROCID"),
        processes=processes,
        coordinator=f"{first_host(said['SLURM_STEP_NODELIST'])}:{_FIRST_PORT + (job + step) % _PORTS}",
        local_process=_optional(said, "SLURM_LOCALID"),
        local_processes=_tasks_here(said),
        run=f"{job}.{step}",
    )


def first_host(nodes: str) -> str:
    """`node[007-015,3],other` as `node007`: the first of SLURM's list, where it puts task 0."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise Contradiction(f"SLURM_STEP_NODELIST={nodes!r} names no host.")
    suffix = re.match(r"\[[^\]]*\]([^,\[]*)", nodes[match.end(1) :])
    return match[1] + (match[2] or "") + (suffix[1] if suffix else "")


def _tasks_here(said: Mapping[str, str]) -> int | None:
    """Of `SLURM_STEP_TASKS_PER_NODE`, such as `8(x2),4`, the number that is this node's."""
    counts: list[int] = []
    for part in said.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = _optional(said, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else None


def _tpu_on_kubernetes(said: Mapping[str, str]) -> Job | None:
    names = said.get("TPU_PROCESS_ADDRESSES") or said.get("TPU_WORKER_HOSTNAMES")
    if names is None or "TPU_WORKER_ID" not in said:
        return None
    workers = [name.strip() for name in names.split(",")]
    slices, this = _optional(said, "MEGASCALE_NUM_SLICES") or 1, _optional(said, "MEGASCALE_SLICE_ID") or 0
    host = said.get("MEGASCALE_COORDINATOR_ADDRESS", workers[0]).split(":")[0]
    return Job(
        launcher="TPU",
        process=this * len(workers) + _number(said, "TPU_WORKER_ID"),
        processes=slices * len(workers),
        coordinator=f"{host}:{_USUAL_PORT}",
    )


def _kubernetes(said: Mapping[str, str]) -> Job | None:
    if "KUBERNETES_SERVICE_HOST" not in said or "JOB_COMPLETION_INDEX" not in said:
        return None
    return Job(launcher="Kubernetes", process=_number(said, "JOB_COMPLETION_INDEX"), detection=BY_KUBERNETES)


def _own(said: Mapping[str, str]) -> Job | None:
    if any(name not in said for name in _OWN):
        return None
    return Job(launcher="JAX variables")


_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_LAUNCHERS: tuple[Callable[[Mapping[str, str]], Job | None], ...] = (
    _torchrun,
    _open_mpi,
    _slurm,
    _tpu_on_kubernetes,
    _kubernetes,
    _own,
)


def _number(said: Mapping[str, str], name: str) -> int:
    try:
        return int(said[name])
    except ValueError:
        raise Contradiction(f"{name}={said[name]!r} is not a number.") from None


def _optional(said: Mapping[str, str], name: str) -> int | None:
    return _number(said, name) if name in said else None


def _with_port(address: str, *, needed: bool = False) -> str:
    host, colon, port = address.rpartition(":")
    if colon and host and port.isdigit() and not (host.count(":") and not host.endswith("]")):
        return address
    if needed:
        raise ValueError(f"coordinator address {address!r}: host:port is needed, such as node0:8476.")
    return f"{address}:{_USUAL_PORT}"
