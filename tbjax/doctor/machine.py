"""What can be read about a machine without trying anything: versions, host, devices, memory."""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import jax

# Those that a report of a fault needs.
PACKAGES = (
    *("tbjax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch"),
    *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)

# What the runtime, the compiler and the network libraries read.
PREFIXES = ("JAX_", "XLA_", "NCCL_", "TPU_", "LIBTPU_", "CUDA_VISIBLE", "GLOO_", "MEGASCALE_")

# Where Linux lists what is on the PCI bus, Google's number there, and those of its TPUs from v3 to 7x (as JAX's own
# `jax._src.hardware_utils` has them): the network cards of its machines have others.
PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """One host and the devices that this process sees there."""

    versions: Mapping[str, str]
    python: str
    host: str
    processors: int
    memory: int  # bytes, of the host
    memory_available: int
    shared_memory: int | None  # bytes that are free in /dev/shm, through which processes of one host talk
    open_files: int  # at most
    platform: str  # of the devices: cpu, gpu, tpu
    device_kind: str
    devices: int
    local_devices: int
    processes: int
    device_memory: int | None  # bytes that a program may use on each; None where the platform does not say
    device_memory_used: int | None  # the most on one device
    gpus_of_the_host: int  # as the kernel's driver counts them
    tpus_of_the_host: int  # chips, as the PCI bus has them
    variables: Mapping[str, str]  # of the environment, that have a say in this


def examine() -> Machine:
    """What this process sees."""
    local = jax.local_devices()
    stats = [found for device in local if (found := device.memory_stats())]
    information = _memory_information()
    return Machine(
        versions=_versions(),
        python=platform.python_version(),
        host=socket.gethostname(),
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=information.get("MemTotal", 0),
        memory_available=information.get("MemAvailable", 0),
        shared_memory=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        platform=local[0].platform,
        device_kind=local[0].device_kind,
        devices=jax.device_count(),
        local_devices=len(local),
        processes=jax.process_count(),
        device_memory=min((found["bytes_limit"] for found in stats if "bytes_limit" in found), default=None),
        device_memory_used=max((found["bytes_in_use"] for found in stats if "bytes_in_use" in found), default=None),
        gpus_of_the_host=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        tpus_of_the_host=count_tpus(),
        variables={name: value for name, value in sorted(os.environ.items()) if _has_a_say(name)},
    )


def count_tpus(bus: Path = PCI) -> int:
    """TPU chips of this host, whether or not JAX can use them."""
    return sum(
        _number(device / "vendor") == GOOGLE and _number(device / "device") in TPUS
        for device in (bus.iterdir() if bus.is_dir() else ())
    )


def _number(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a device that is not to be read is none of ours
        return ""


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _memory_information() -> dict[str, int]:
    """Linux's own account, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _has_a_say(name: str) -> bool:
    return name.startswith(PREFIXES) or name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
