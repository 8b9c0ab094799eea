"""One kind of device, as the planner and the compilers need to know it.

A `Hardware` says what one device computes, holds and sends, and how devices stand together: behind a switch (NVLink,
PCIe) or on a torus (TPU). Everything in it is per device as JAX counts devices: a chip with two cores that JAX shows as
two devices has half the chip's memory, FLOP/s and links in its record. Bandwidths are bytes per second in one
direction. The records of what can be bought or rented stand in `catalogue`; a record of one's own is made the same way:

    mine = dataclasses.replace(hardware("h100"), name="mine", title="One with less memory", memory=64 * 2**30)
    plan(config, workload, Cluster(hardware=mine, hosts=2, devices_per_host=8))
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

Vendor: TypeAlias = Literal["nvidia", "google", "cpu"]
Shape: TypeAlias = tuple[int, ...]

MiB, GiB = 1 << 20, 1 << 30
GB, TB = 10**9, 10**12
TFLOPS = 10**12
MICROSECOND = 1e-6

# Rates without which nothing can be priced; others (float16, float8, int8, ...) are there where the device has them.
NEEDED_RATES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device. Mappings take no part in the hash, so that a record can be a key of a cache."""

    name: str  # as in a spec: "h100" in "h100:16x8"
    title: str
    vendor: Vendor
    memory: int  # bytes
    memory_bandwidth: float  # bytes/s
    # Dense FLOP/s of matmuls by dtype. "float32" is what JAX does with float32 operands at its default precision:
    # TensorFloat-32 on NVIDIA from Ampere on, one bfloat16 pass on TPU.
    flops: Mapping[str, float] = dataclasses.field(hash=False)
    domain: int  # devices that the fast fabric can join: an NVLink domain, the largest slice of a TPU
    devices_per_host: int
    link_bandwidth: float  # behind a switch: of one device into it; on a torus: of one link of one device
    torus: int = 0  # dimensions of the torus; 0 where a switch joins the domain
    network_bandwidth: float  # of one device's share of its host's network, to other hosts or (TPU) other slices
    host_link: float  # of one device to its host's memory
    host_memory: int  # bytes of a full host
    link_latency: float  # seconds, of one message (torus: of one hop)
    network_latency: float
    clock: float = 0.0  # Hz of the cores; 0: not known. Where compilers count in cycles (TPU)
    reserved: int = 0  # bytes of `memory` that the runtime keeps for itself
    devices_per_chip: int = 1
    shapes: tuple[Shape, ...] = ()  # TPU: the slices below a full cube (3-D), or all slices (2-D), in chips
    device_kinds: tuple[str, ...] = ()  # what JAX calls it, in `device_kind`
    # What the compiler for the device must be told: the fields of XLA's GpuDeviceInfoProto for NVIDIA, arguments of
    # `jax.experimental.topologies.get_topology_desc` for TPU.
    target: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)  # figure -> where it stands

    def __post_init__(self) -> None:
        if not self.name or any(mark in self.name for mark in ":* "):
            raise ValueError(f"Hardware.name={self.name!r} cannot stand in a spec: no ':', '*' or space, not empty.")
        if self.vendor not in get_args(Vendor):
            known = ", ".join(map(repr, get_args(Vendor)))
            raise ValueError(f"Hardware.vendor={self.vendor!r} is unknown: tbjax knows {known}.")
        if self.torus not in (0, 2, 3):
            raise ValueError(f"Hardware.torus={self.torus!r} must be 0 (a switch), 2 or 3 dimensions.")
        for name in ("memory", "domain", "devices_per_host", "host_memory", "devices_per_chip"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Hardware.{name} must be a positive integer, not {value!r}.")
        for name in ("memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_link"):
            if not _finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"Hardware.{name} must be positive bytes per second, not {getattr(self, name)!r}.")
        for name in ("link_latency", "network_latency"):
            if not _finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"Hardware.{name} must be seconds, not {getattr(self, name)!r}.")
        if not 0 <= self.reserved < self.memory:
            raise ValueError(f"Hardware.reserved={self.reserved!r} must lie below memory={self.memory}.")
        missing = [dtype for dtype in NEEDED_RATES if dtype not in self.flops]
        if missing or any(not _finite(rate) or rate <= 0 for rate in self.flops.values()):
            raise ValueError(
                f"Hardware.flops={dict(self.flops)!r} must give positive FLOP/s for {' and '.join(NEEDED_RATES)} at "
                "least."
            )

    @property
    def usable(self) -> int:
        """Bytes that a program may hold."""
        return self.memory - self.reserved

    @property
    def host_memory_per_device(self) -> int:
        """Bytes of the host's memory that are one device's share."""
        return self.host_memory // self.devices_per_host

    def has_slice(self, shape: Shape) -> bool:
        """Whether a TPU slice of this shape, in chips, can be had; dimensions in any order."""
        if not self.torus or len(shape) != self.torus or min(shape) < 1:
            return False
        if tuple(sorted(shape)) in {tuple(sorted(known)) for known in self.shapes}:
            return True
        cubes = self.torus == 3 and all(size % CUBE == 0 for size in shape)
        return cubes and math.prod(shape) * self.devices_per_chip <= self.domain

    def wraps(self, shape: Shape) -> tuple[bool, ...]:
        """Which dimensions of a slice close into rings.

        Optical switches close the faces of full cubes, so a 3-D slice wraps in all dimensions or in none; a 2-D one
        wraps where it spans the whole pod.
        """
        if self.torus == 3:
            return (all(size % CUBE == 0 for size in shape),) * 3
        return tuple(size == PLANE for size in shape)


# The unit of the reconfigurable pods (v4, v5p, TPU7x) is a cube of 4 x 4 x 4 chips; the pods of v5e and v6e are planes
# of 16 x 16. https://jax-ml.github.io/scaling-book/tpus, "TPU Networking".
CUBE = 4
PLANE = 16


def gigabits(rate: float) -> float:
    """Bytes per second of a network port sold as `rate` Gb/s."""
    return rate * GB / 8


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
