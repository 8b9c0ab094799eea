"""What the figures say about failures that are common, and where to look when a run has failed."""

from collections.abc import Iterator, Mapping, Sequence

from tbjax.doctor.links import Link
from tbjax.doctor.machine import Machine
from tbjax.planner.hardware import recognise

# By symptom, what to look at first.
WHEN_A_RUN_FAILS: Mapping[str, str] = {
    "processes do not meet": (
        "the error names those that are missing: have they started, and does the coordinator's port pass the firewall? "
        "Images may take longer to fetch than --meeting-timeout"
    ),
    "timeout, heartbeat lost": (
        "a process or its network is gone: its own log comes first. Where hosts stall and recover, give a longer "
        "--heartbeat-timeout (NCCL_TIMEOUT is PyTorch's and does nothing here)"
    ),
    "hang": (
        "all processes must run the same steps on the same shapes. After --step-timeout each writes the stacks of its "
        "threads: the one that stands elsewhere is the cause"
    ),
    "out of memory, forward": (
        "--remat full, a smaller --device-batch, cp for long sequences; tbjax plan says what fits"
    ),
    "out of memory, backward": (
        "a smaller --device-batch or more --microbatches, --offload optimizer, a larger fsdp or tp; tbjax verify counts"
    ),
    "slow on several hosts": (
        "tp inside a host, fsdp where links are fast and dp across (HYBRID_SHARD); compare the GB/s of the axes above"
    ),
}

# Below this part of what a link is sold as, something is wrong with it: a collective reaches 80 % and more.
_SLOW = 0.5

# NCCL takes some 10 MB for each pair of GPUs and channel; Docker's default of 64 MB is known to be too little.
_SHARED_MEMORY = 1 << 30

# A coordinator holds a connection for each process, and a loader a file for each shard.
_OPEN_FILES = 4096


def hints(machine: Machine, links: Sequence[Link]) -> list[str]:
    """What should be looked into, the worst first."""
    return [*_broken(links), *_about(machine), *_slow(machine, links)]


def _broken(links: Sequence[Link]) -> Iterator[str]:
    for link in links:
        if not link.right:
            yield (
                f"{link.collective} along {link.axis} gave a wrong result: a device, its memory or a link is broken. "
                "Take its host out."
            )


def _about(machine: Machine) -> Iterator[str]:
    variables = machine.variables
    if machine.gpus_of_the_host and machine.platform == "cpu":
        yield (
            f"the host has {machine.gpus_of_the_host} NVIDIA GPUs, but JAX runs on the CPU: pip install 'tbjax[cuda12]'"
            + (", and unset JAX_PLATFORMS." if "JAX_PLATFORMS" in variables else ".")
        )
    if machine.tpus_of_the_host and machine.platform == "cpu":
        yield f"the host has {machine.tpus_of_the_host} TPU chips, but JAX runs on the CPU: " + (
            "is another process using them, or JAX_PLATFORMS set?"
            if "libtpu" in machine.versions
            else "pip install 'tbjax[tpu]', which brings libtpu."
        )
    if machine.platform == "cpu" and "JAX_PLATFORMS" not in variables:
        yield from _idle_plugins(machine)
    proxies = [name for name in variables if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
    if proxies and machine.processes > 1:
        yield f"{', '.join(proxies)}: processes may look for each other through the proxy and hang: unset before a run."
    if "NCCL_TIMEOUT" in variables:
        yield "NCCL_TIMEOUT is read by PyTorch alone: --step-timeout and --heartbeat-timeout are what ends a run here."
    if variables.get("NCCL_P2P_DISABLE") == "1":
        yield "NCCL_P2P_DISABLE=1: GPUs of one host talk through its memory, several times slower than NVLink."
    if variables.get("NCCL_IB_DISABLE") == "1" and machine.processes > 1:
        yield "NCCL_IB_DISABLE=1: hosts talk over TCP although they may have InfiniBand."
    memory, used = machine.device_memory, machine.device_memory_used
    if memory and used and used > memory / 10:
        yield f"{used / 1e9:.1f} of {memory / 1e9:.1f} GB of a device are taken before anything runs: by what?"
    fraction = variables.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if fraction is not None:
        yield f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction}: the rest of each GPU's memory is never used (default 0.75)."
    if machine.platform == "gpu" and machine.shared_memory is not None and machine.shared_memory < _SHARED_MEMORY:
        yield (
            f"/dev/shm has {machine.shared_memory / 1e6:.0f} MB: NCCL fails or is slow with so little. Give the "
            "container more (docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory)."
        )
    if machine.open_files < _OPEN_FILES:
        yield f"only {machine.open_files} files may be open at once: raise it (ulimit -n {16 * _OPEN_FILES})."
    if machine.memory and machine.memory_available < machine.memory / 10:
        yield (
            f"{machine.memory_available / 1e9:.1f} of {machine.memory / 1e9:.1f} GB of the host's memory are left: "
            "loading and saving may be ended by the kernel."
        )


def _idle_plugins(machine: Machine) -> Iterator[str]:
    """What is installed for devices that are not there: JAX tries it at each start, and complains at length."""
    quiet = "On purpose? JAX_PLATFORMS=cpu stops JAX's complaints as it starts."
    cuda = next((name for name in machine.versions if name.startswith("jax-cuda")), None)
    if cuda and not machine.gpus_of_the_host:
        yield (
            f"{cuda} is installed, but the host shows no NVIDIA GPU, so JAX runs on the CPU: is its driver there "
            f"(nvidia-smi), or was the container started without --gpus all? {quiet}"
        )
    if "libtpu" in machine.versions and not machine.tpus_of_the_host:
        yield f"libtpu is installed, but the host shows no TPU, so JAX runs on the CPU. {quiet}"


def _slow(machine: Machine, links: Sequence[Link]) -> Iterator[str]:
    if any(link.axis == "tp" and link.crosses_hosts for link in links):
        yield "tp crosses hosts: every layer waits for the network. Let tp divide the devices of a host."
    if machine.platform == "cpu":
        return  # its links are memory, which nobody sells by the gigabyte a second
    try:
        record = recognise(machine.device_kind)
    except ValueError:
        return  # of devices that are not in the catalogue nothing is expected
    for link in links:
        if link.collective != "all-reduce":
            continue
        sold = (record.network_bandwidth if link.crosses_hosts else record.link_bandwidth) / 1e9
        if link.gb_per_second < _SLOW * sold:
            yield (
                f"all-reduce along {link.axis} reaches {link.gb_per_second:.0f} GB/s where the links have {sold:.0f}: "
                + (
                    "is RDMA on, and one network card for each GPU? NCCL_DEBUG=INFO says what it uses."
                    if link.crosses_hosts
                    else "are all links up (nvidia-smi nvlink --status), and nothing else running?"
                )
            )
