"""`torch.distributed`, as far as one need know it: who this process is, among how many, and that all have come.

    from tbjax.compat import distributed as dist

    dist.init_process_group("nccl")
    print(f"Rank: {dist.get_rank()}/{dist.get_world_size()}")

A rank there is a process with one device. Here it is a process too, but one that may drive many: on a single machine
rank 0 of 1 drives all of them.
"""

from datetime import timedelta

from jax.experimental import multihost_utils

from tbjax.compat.devices import backend as backend_here
from tbjax.compat.devices import check_backend
from tbjax.hosts import Hosts, initialize
from tbjax.hosts.joining import MEETING_SECONDS

# Whether the group is there is the process's to know, as it is PyTorch's.
_group: list[Hosts] = []


def init_process_group(
    backend: str | None = None,
    *,
    init_method: str | None = None,
    world_size: int = -1,
    rank: int = -1,
    timeout: timedelta | None = None,
) -> None:
    """Join the processes of this job, by `tbjax.initialize`. What is said of them must be so.

    Without a launcher, `init_method="tcp://host:port"`, `world_size` and `rank` together say what it would have said.
    """
    if init_method not in (None, "env://") and not str(init_method).startswith("tcp://"):
        raise ValueError(f"init_method={init_method!r}: processes meet by 'env://' or at 'tcp://host:port'.")
    seconds = MEETING_SECONDS if timeout is None else timeout.total_seconds()
    if init_method is not None and init_method.startswith("tcp://"):
        if world_size < 1 or rank < 0:
            raise ValueError(f"init_method={init_method!r} needs world_size and rank.")
        found = initialize(init_method.removeprefix("tcp://"), world_size, rank, timeout=seconds, quiet=True)
    else:
        found = initialize(timeout=seconds, quiet=True)
    check_backend(backend, "backend")
    for name, said, so in (("world_size", world_size, found.processes), ("rank", rank, found.process)):
        if said not in (-1, so):
            raise ValueError(f"{name}={said}, but this is process {found.process} of {found.processes}: leave it out.")
    _group[:] = [found]


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return bool(_group)


def get_rank() -> int:
    """This process's number among those of the job."""
    return _found().process


def get_world_size() -> int:
    """How many processes the job has."""
    return _found().processes


def get_backend() -> str:
    """What the devices talk by: "nccl", "gloo" or "xla"."""
    _found()
    return backend_here()


def barrier() -> None:
    """Wait for all processes of the job."""
    if _found().processes > 1:
        multihost_utils.sync_global_devices("tbjax.compat.distributed.barrier")


def destroy_process_group() -> None:
    """Forget the group. JAX's processes part when they end."""
    _found()
    _group.clear()


def _found() -> Hosts:
    if not _group:
        raise RuntimeError("there is no process group yet: call init_process_group first.")
    return _group[0]
