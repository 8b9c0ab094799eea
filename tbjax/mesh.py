"""The mesh: six named axes, always in the same order, however the user spells them.

    (dp, fsdp, tp)            a tuple of three
    {"fsdp": 4, "tp": 2}      a dict of any of the six
    jax.sharding.Mesh         with axes among the six
    tbjax.Plan                the mesh that was planned
    None or "auto"            every device on fsdp

Axes run from the outermost, which may cross slow links, to the innermost, which should lie where links are fast: within
a slice of TPUs, within the GPUs that NVLink joins. One size may be -1: it takes what the others leave. A size that the
user gave is never changed.
"""

import collections
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tbjax.elsewhere import called_here

log = logging.getLogger("tbjax")

AXES: tuple[str, ...] = ("pp", "dp", "fsdp", "ep", "cp", "tp")


class Planned(Protocol):
    """What a plan is to this file."""

    @property
    def mesh(self) -> Mapping[str, int]: ...


MeshSpec: TypeAlias = Mesh | Mapping[str, int] | Sequence[int] | Planned | Literal["auto"] | None


def axis_sizes(spec: MeshSpec, device_count: int) -> dict[str, int]:
    """The size of each of the six axes that `spec` asks for on `device_count` devices."""
    if isinstance(spec, Mesh):
        return {axis: spec.shape.get(axis, 1) for axis in AXES}
    # numpy's integers are integers.
    asked = {axis: int(size) if isinstance(size, np.integer) else size for axis, size in _requested(spec).items()}
    sizes = dict.fromkeys(AXES, 1) | asked
    for axis, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(f"mesh axis {axis!r} has size {size!r}: sizes are positive integers, or -1 to fill.")
    filled = [axis for axis, size in sizes.items() if size == -1]
    if len(filled) > 1:
        raise ValueError(f"mesh axes {filled} are both -1: only one can be filled from the device count.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if filled and device_count % fixed == 0:
        sizes[filled[0]] = device_count // fixed
    elif filled or fixed != device_count:
        raise ValueError(
            f"mesh {spell(sizes)} needs {'a multiple of ' if filled else ''}{fixed} devices, "
            f"but there are {device_count}. "
            f"A mesh that would do: {spell(_nearest(sizes, device_count))}."
        )
    return sizes


def make_mesh(spec: MeshSpec = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), validated against their number."""
    if isinstance(spec, Mesh):
        unknown = [axis for axis in spec.axis_names if axis not in AXES]
        if unknown:
            raise ValueError(f"mesh axes {unknown} are unknown: tbjax knows {', '.join(AXES)}.")
        # Axes that the caller's mesh lacks have size one, and placements are the compiler's to propagate, whatever kind
        # of axes they are.
        lacking = tuple(axis for axis in AXES if axis not in spec.axis_names)
        grid = spec.devices.reshape((1,) * len(lacking) + spec.devices.shape)
        return Mesh(grid, (*lacking, *spec.axis_names), axis_types=(AxisType.Auto,) * len(AXES))
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(spec, len(devices))
    if len(devices) > 1 and devices[0].platform == "cpu":
        settings = cast(Any, jax.config)  # its names are made as JAX is imported, so types do not know them
        if settings.jax_enable_compilation_cache:
            _warn_of_stored_programs(settings.jax_compilation_cache_dir)
    mesh = Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if "tp" in crossing_axes(mesh):
        log.warning(
            "mesh %s: tp=%d crosses from host to host, where links are slow; a size that divides the %d devices of one "
            "stays inside.",
            spell(sizes),
            sizes["tp"],
            min(collections.Counter(map(_domain, devices)).values()),
        )
    return mesh


@functools.cache
def _warn_of_stored_programs(folder: str | None) -> None:
    """Says once that programs kept in `folder`, if any, may hang.

    One that XLA for the CPU reads back has lost the order between collectives in loops or branches and those outside:
    every sequence of operations gets a communicator of its own, where a program just compiled has one for all. Devices
    may then wait for each other in different collectives, for ever.
    """
    if folder:
        log.warning(
            "JAX keeps compiled programs in %s: with several CPU devices one that is read back may hang, as XLA loses "
            "the order of its collectives. JAX_ENABLE_COMPILATION_CACHE=false leaves them alone.",
            folder,
        )


def _grid(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices, with the inner axes along the fastest links: torus neighbours on TPU, the same host on GPU.

    What JAX calls a slice is a slice of a TPU, joined to others by the data-centre network, or the GPUs that NVLink
    joins: those of a host, or of a rack.
    """
    slices = collections.Counter(getattr(device, "slice_index", None) or 0 for device in devices)
    if len(slices) > 1 and len(set(slices.values())) == 1:
        outer = steps_over_slices(sizes, len(slices))
        inner = [size // outer[axis] for axis, size in sizes.items()]
        return mesh_utils.create_hybrid_device_mesh(
            inner, list(outer.values()), devices, allow_split_physical_axes=True
        )
    if len(slices) > 1:  # of different sizes, so that no axis steps from one to the next: one after another
        ordered = sorted(devices, key=lambda device: (device.slice_index, device.id))
        return np.array(ordered).reshape(tuple(sizes.values()))
    return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)


def crossing_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes along which neighbours lie in different fast domains, so that their collectives take slow links."""
    found = [_domain(device) for device in mesh.devices.flat]
    numbers = {domain: number for number, domain in enumerate(dict.fromkeys(found))}
    domains = np.array([numbers[domain] for domain in found]).reshape(mesh.devices.shape)
    return tuple(
        axis
        for dimension, axis in enumerate(mesh.axis_names)
        if (domains != np.take(domains, [0], axis=dimension)).any()
    )


def _domain(device: Any) -> tuple[int, int]:
    """Which of the groups of devices with fast links among them a device is in."""
    index = getattr(device, "slice_index", None) or 0
    # Where GPUs share a host, or a rack, JAX says by their slice; of CPUs each process stands for a host.
    return index, device.process_index if device.platform == "cpu" else 0


def steps_over_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """How often each axis steps from one TPU slice to the next: the outermost first, as those links are slow."""
    left, steps = slices, {}
    for axis, size in sizes.items():
        steps[axis] = math.gcd(size, left)
        left //= steps[axis]
    if left > 1:
        raise ValueError(
            f"mesh {spell(sizes)} cannot be laid over {slices} slices: the sizes of its axes, outermost first, must "
            f"multiply to {slices}."
        )
    return steps


def fixed_sizes(spec: MeshSpec) -> dict[str, int]:
    """The sizes that `spec` leaves no choice about, to who chooses the others (the planner).

    A tuple (dp, fsdp, tp) speaks of all axes, a dict of those that it names; a size of -1 is to be chosen.
    """
    if spec is None or (isinstance(spec, str) and spec == "auto"):
        return {}
    if isinstance(spec, Mesh):
        return axis_sizes(spec, spec.size)
    asked = _requested(spec)
    others = {} if isinstance(spec, Mapping) else dict.fromkeys(AXES, 1)
    return {axis: size for axis, size in {**others, **asked}.items() if size != -1}


def _requested(spec: Mapping[str, int] | Sequence[int] | Planned | str | None) -> dict[str, int]:
    if spec is None or (isinstance(spec, str) and spec == "auto"):
        return {"fsdp": -1}
    if isinstance(planned := getattr(spec, "mesh", None), Mapping):
        spec = planned
    if isinstance(spec, np.ndarray):
        spec = spec.tolist()
    if isinstance(spec, Mapping):
        unknown = [axis for axis in spec if axis not in AXES]
        if unknown:
            said = called_here(*unknown) or f"tbjax knows {', '.join(AXES)}."
            raise ValueError(f"mesh axes {unknown} are unknown: {said}")
        return dict(spec)
    if isinstance(spec, str) or not isinstance(spec, Sequence) or len(spec) != 3:
        raise ValueError(
            f"mesh={spec!r} is not a mesh: give (dp, fsdp, tp), a dict such as {{'fsdp': 4, 'tp': 2}}, "
            "a jax.sharding.Mesh, a tbjax.Plan or 'auto'."
        )
    return dict(zip(("dp", "fsdp", "tp"), spec, strict=True))


def _nearest(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """The request cut down to divisors of what is left, inner axes first, with the remainder on fsdp."""
    nearest, left = dict.fromkeys(AXES, 1), device_count
    for axis in reversed(AXES):
        nearest[axis] = math.gcd(sizes[axis], left) if sizes[axis] > 0 else 1
        left //= nearest[axis]
    nearest["fsdp"] *= left
    return nearest


def spell(sizes: Mapping[str, int]) -> str:
    """The sizes as a user would write them: (dp, fsdp, tp) where that says it all."""
    if all(sizes.get(axis, 1) == 1 for axis in ("pp", "ep", "cp")):
        return f"({sizes.get('dp', 1)}, {sizes.get('fsdp', 1)}, {sizes.get('tp', 1)})"
    return repr({axis: size for axis, size in sizes.items() if size != 1})
