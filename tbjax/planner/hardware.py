"""What a plan is for: so many devices of one kind, and how they are joined.

    cluster("h100:8")          # one host with 8 GPUs
    cluster("h100:16x8")       # hosts x GPUs of each
    cluster("gb200:18x4")      # an NVL72: its NVLink domain crosses hosts
    cluster("v5p:4x4x4")       # one TPU slice, by its topology in chips
    cluster("v5p:2*4x4x4")     # two such slices, joined by the data-centre network
    cluster("cpu:8")           # virtual devices, to try things on
    cluster("h100")            # one device
    cluster("auto")            # the machine at hand, as jax.devices() shows it

A name is one of `catalogue.RECORDS`, an alias of one, or what `register` was given. What cannot exist raises, and the
error says what can.
"""

import collections
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from tbjax.planner.catalogue import ALIASES, RECORDS
from tbjax.planner.device import CUBE, Hardware, Shape

__all__ = ["Cluster", "Hardware", "cluster", "hardware", "names", "recognise", "register"]

_SPEC = re.compile(r"(?P<name>[^:]+)(?::(?:(?P<slices>[^*]+)\*)?(?P<counts>[^*]+))?")

# Google Cloud's names of slices, which count TensorCores where a chip has two (v4, v5p) and chips elsewhere:
# https://cloud.google.com/tpu/docs/v5p and /v5e. They do not say the topology.
_ACCELERATOR = re.compile(r"(?P<name>v4|v5p|v5litepod|v6e)-(?P<count>[1-9]\d*)")
_CORES_OF_CHIP = {"v4": 2, "v5p": 2}

_registered: dict[str, Hardware] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind: `slices` groups of `hosts` hosts with `devices_per_host` devices each.

    A TPU slice has a topology, in chips, from which hosts and devices follow. Everything else has one slice.
    """

    hardware: Hardware
    slices: int = 1
    hosts: int = 1  # of each slice
    devices_per_host: int = 1
    topology: Shape | None = None

    def __post_init__(self) -> None:
        for name in ("slices", "hosts", "devices_per_host"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Cluster.{name} must be a positive integer, not {value!r}.")
        kind, limit = self.hardware, self.hardware.devices_per_host
        if kind.torus:
            self._check_slice()
        elif self.topology is not None:
            raise ValueError(f"{kind.name} devices are joined by a switch: they have no topology {self.topology!r}.")
        elif self.slices != 1:
            raise ValueError(f"{kind.name} has hosts, not slices: hosts={self.slices * self.hosts}, slices=1.")
        elif self.devices_per_host > limit:
            raise ValueError(
                f"{kind.name} hosts have {limit} devices each, not {self.devices_per_host}. "
                f"{_hosts_that_would_do(kind, self.hosts * self.devices_per_host)}"
            )

    def _check_slice(self) -> None:
        kind = self.hardware
        if self.topology is None:
            raise ValueError(f"a {kind.name} cluster needs its topology, such as topology={_example(kind)}.")
        if not kind.has_slice(self.topology):
            raise ValueError(f"{kind.name} has no slice {spell(self.topology)}. {_slices_that_would_do(kind)}")
        chips = math.prod(self.topology)
        hosts, per_host = _hosts_of(kind, chips)
        if (self.hosts, self.devices_per_host) != (hosts, per_host):
            raise ValueError(
                f"a {kind.name} slice {spell(self.topology)} has {hosts} hosts with {per_host} devices each, not "
                f"{self.hosts} with {self.devices_per_host}."
            )

    @property
    def devices(self) -> int:
        return self.slices * self.hosts * self.devices_per_host

    @property
    def fast_domain(self) -> int:
        """Devices joined by the fast fabric: a slice, or the hosts' share of an NVLink domain.

        Where hosts outnumber a domain that crosses them, they stand in as few domains as can hold equally many.
        """
        kind, slice_devices = self.hardware, self.hosts * self.devices_per_host
        if kind.torus:
            return slice_devices
        if kind.domain <= kind.devices_per_host:
            within = self.devices_per_host
            return within if within <= kind.domain else math.gcd(within, kind.domain)
        fewest = -(-slice_devices // kind.domain)
        domains = next(count for count in range(fewest, self.hosts + 1) if self.hosts % count == 0)
        return slice_devices // domains

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions of the topology close into rings; none where there is no torus."""
        return self.hardware.wraps(self.topology) if self.topology else ()

    @property
    def libtpu_topology(self) -> dict[str, Any]:
        """The arguments of `jax.experimental.topologies.get_topology_desc` for one slice of this cluster."""
        if not self.topology:
            raise ValueError(f"{self} has no TPU topology.")
        arguments = {"topology_name": f"{self.hardware.name}:{spell(self.topology)}", **self.hardware.target}
        if math.prod(self.topology) == 1:
            arguments["chips_per_host_bounds"] = (1, 1, 1)  # hosts have 2x2 chips, unless it is told otherwise
        return arguments

    def __str__(self) -> str:
        if self.topology:
            return f"{self.hardware.name}:{f'{self.slices}*' if self.slices > 1 else ''}{spell(self.topology)}"
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        return f"{self.hardware.name}:{hosts}{self.devices_per_host}"

    def __repr__(self) -> str:
        return f"<{self}: {self.devices:,} x {self.hardware.title}>"


def cluster(spec: str | Cluster) -> Cluster:
    """The devices that `spec` names: see the top of this file for how to write it."""
    if isinstance(spec, Cluster):
        return spec
    if not isinstance(spec, str) or not (match := _SPEC.fullmatch(spec.strip())):
        raise ValueError(
            f"hardware={spec!r} is not a cluster: write a name and a count, such as 'h100:8', 'h100:16x8' (hosts x "
            "GPUs), 'v5p:4x4x4' (a TPU slice) or 'v5p:2*4x4x4' (two of them), or 'auto'."
        )
    if spec.strip() == "auto":
        return _at_hand()
    if named := _ACCELERATOR.fullmatch(spec.strip()):
        kind, cores = hardware(named["name"]), _CORES_OF_CHIP.get(named["name"], 1)
        chips, rest = divmod(int(named["count"]), cores)
        if rest:
            raise ValueError(f"hardware={spec!r}: Google Cloud counts cores there, {cores} to a chip.")
        shapes = [f"{kind.name}:{spell(shape)}" for shape in _slices(kind) if math.prod(shape) == chips]
        raise ValueError(
            f"hardware={spec!r} is Google Cloud's name of {chips} chips, whose topology it does not say: "
            + (f"write {' or '.join(shapes)}." if shapes else _slices_that_would_do(kind))
        )
    kind = hardware(match["name"])
    counts = _counts(spec, match["counts"], "x") if match["counts"] else (1,) * (kind.torus or 1)
    slices = _counts(spec, match["slices"], None)[0] if match["slices"] else 1
    if kind.torus:
        return _slice(kind, slices, counts)
    if match["slices"] or len(counts) > 2:
        raise ValueError(f"hardware={spec!r}: {kind.name} is written {kind.name}:DEVICES or {kind.name}:HOSTSxDEVICES.")
    hosts, devices = (1, *counts)[-2:]
    return Cluster(hardware=kind, hosts=hosts, devices_per_host=devices)


def hardware(name: str) -> Hardware:
    """The record of that name, from the catalogue or registered."""
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in _registered:
        return _registered[key]
    if key in RECORDS:
        return RECORDS[key]
    known = names()
    near = difflib.get_close_matches(key, [*known, *ALIASES], n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"hardware {name!r} is unknown.{guess} tbjax knows {', '.join(known)}; others can be described with "
        "tbjax.planner.hardware.Hardware(...) and register()."
    )


def register(record: Hardware) -> Hardware:
    """Makes `record` known under its name; a name of the catalogue cannot be taken."""
    key = record.name.lower()
    if key in RECORDS or key in ALIASES or key == "auto":
        raise ValueError(f"hardware {record.name!r} is in the catalogue: give the record another name.")
    _registered[key] = record
    return record


def names() -> tuple[str, ...]:
    """Every name that a spec can begin with, aliases aside."""
    return (*RECORDS, *_registered)


def recognise(device_kind: str) -> Hardware:
    """The record of the device that JAX calls `device_kind`."""
    for record in (*_registered.values(), *RECORDS.values()):
        if device_kind in record.device_kinds:
            return record
    raise ValueError(
        f"the device {device_kind!r} is not in the catalogue. Describe it with tbjax.planner.hardware.Hardware("
        f"name=..., device_kinds=({device_kind!r},), memory=..., ...), give that to register(), and ask again; or "
        f"name the hardware to plan for: {', '.join(names())}."
    )


def spell(shape: Sequence[int]) -> str:
    """A shape as in a spec: 4x4x8."""
    return "x".join(map(str, shape))


def _counts(spec: str, text: str, separator: str | None) -> Shape:
    parts = text.split(separator) if separator else [text]
    if not all(part.strip().isascii() and part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"hardware={spec!r}: {text!r} must be whole numbers above zero, such as 8, 16x8 or 4x4x4.")
    return tuple(int(part) for part in parts)


def _slice(kind: Hardware, slices: int, topology: Shape) -> Cluster:
    if len(topology) != kind.torus:
        chips = math.prod(topology)
        fitting = [shape for shape in _slices(kind) if math.prod(shape) == chips]
        written = " or ".join(f"{kind.name}:{spell(shape)}" for shape in fitting)
        raise ValueError(
            f"{kind.name} is a {kind.torus}-D torus: {kind.name}:{spell(topology)} does not say its shape. "
            f"{f'{chips} chips are {written}.' if fitting else _slices_that_would_do(kind)}"
        )
    hosts, per_host = _hosts_of(kind, math.prod(topology))
    return Cluster(hardware=kind, slices=slices, hosts=hosts, devices_per_host=per_host, topology=topology)


def _hosts_of(kind: Hardware, chips: int) -> tuple[int, int]:
    """Hosts of a slice of so many chips, and devices on each."""
    devices = chips * kind.devices_per_chip
    hosts = -(-devices // kind.devices_per_host)
    return hosts, devices // hosts


def _slices(kind: Hardware) -> list[Shape]:
    """Every slice up to the largest, each in ascending order."""
    if kind.torus != 3:
        return list(kind.shapes)
    chips = kind.domain // kind.devices_per_chip
    cubes = [
        (CUBE * a, CUBE * b, CUBE * c)
        for a in range(1, 1 + round(chips ** (1 / 3)) // CUBE)
        for b in range(a, 1 + math.isqrt(chips // (CUBE * a)) // CUBE)
        for c in range(b, 1 + chips // (CUBE**3 * a * b))
    ]
    return [*kind.shapes, *(shape for shape in cubes if shape not in kind.shapes)]


def _slices_that_would_do(kind: Hardware) -> str:
    known = ", ".join(spell(shape) for shape in kind.shapes)
    if kind.torus == 2:
        return f"It has {known}."
    chips = kind.domain // kind.devices_per_chip
    return f"It has {known}, and AxBxC of multiples of {CUBE} up to {chips} chips."


def _example(kind: Hardware) -> Shape:
    return kind.shapes[-1] if kind.shapes else (CUBE,) * kind.torus


def _hosts_that_would_do(kind: Hardware, devices: int) -> str:
    if devices % kind.devices_per_host == 0:
        return f"{devices} devices are {kind.name}:{devices // kind.devices_per_host}x{kind.devices_per_host}."
    return f"Write {kind.name}:HOSTSxDEVICES with at most {kind.devices_per_host} devices."


def _at_hand() -> Cluster:
    """What jax.devices() shows."""
    import jax  # only here: planning for other machines touches no device of this one

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return _cpu_at_hand(devices)
    kind = recognise(devices[0].device_kind)
    if kind.torus:
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        extent = tuple(len({device.coords[axis] for device in devices}) for axis in range(3))
        return _slice(kind, slices, extent[: kind.torus])
    per_host = collections.Counter(device.process_index for device in devices)
    if len(set(per_host.values())) > 1:
        raise ValueError(f"the processes at hand have {sorted(per_host.values())} devices: each needs equally many.")
    return Cluster(hardware=kind, hosts=len(per_host), devices_per_host=max(per_host.values()))


def _cpu_at_hand(devices: Sequence[Any]) -> Cluster:
    """The processors of this machine share its memory, so that is counted rather than taken from the catalogue."""
    hosts = len({device.process_index for device in devices})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    per_host = len(devices) // hosts
    record = dataclasses.replace(
        RECORDS["cpu"],
        memory=memory // per_host,
        devices_per_host=per_host,
        host_memory=memory,
        sources={"memory": "this machine's, shared by its devices"},
    )
    return Cluster(hardware=record, hosts=hosts, devices_per_host=per_host)
