"""What a compiled program does between devices, read from its HLO text.

The text lists computations, each a list of instructions; some instructions run other computations (a fusion, a loop's
body). Walking from the entry and multiplying by every loop's trip count on the way gives how often each instruction
runs. For the collectives among them, the groups of devices say over which mesh axes they go: the axes along which the
members of a group differ.

A pipeline runs its tasks in loops of a turn or none (`tbjax.pipeline.training.when`): how often they turn hangs on the
stage, and no program can tell. What the schedule says of it (`Turns`) takes the place of a trip count, so that what is
counted is that of a stage which has both the first layers and the last.

The TPU compiler also notes its own estimate of an instruction's cycles; summed in the same walk they are an estimate of
the time that a device computes. That is a whole chip, also where it has two cores that work as one (v4, v5p): a product
of two bfloat16 matrices of 8192 x 8192 is put at 90 % of the peak of a v5p, and at 88 to 93 % of a v5e's and a v4's.
Transfers that run beside are not in it, nor is what the compiler cannot tell: products of ragged groups, and kernels
written by hand such as splash attention. How often such instructions run is counted instead.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tbjax.mesh import steps_over_slices

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# How often the whole buffer passes around the ring, less the share that is at home.
_PASSES = {"all-reduce": 2}

# Bits of an element, by the names that HLO gives to types.
BITS = {
    name: bits
    for bits, names in {
        4: "s4 u4 f4e2m1fn",
        8: "pred s8 u8 f8e3m4 f8e4m3 f8e4m3fn f8e4m3b11fnuz f8e5m2 f8e8m0fnu",
        16: "s16 u16 f16 bf16",
        32: "s32 u32 f32",
        64: "s64 u64 f64 c64",
        128: "c128",
    }.items()
    for name in names.split()
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
# The result's shape may be a tuple with nested parentheses; the operation is the first word after it that opens one.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}\]])(?P<operation>[a-z][\w\-]*)\(")
_SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|branch_computations|body)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_INDEX = re.compile(r"\bindex=(\d+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What goes between slices of TPUs leaves the program as a message to the host, which says what it is part of.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_NO_ESTIMATE = 1 << 62  # libtpu writes more than this where it cannot tell, as of ragged products; of kernels, nothing
_KERNEL = 'custom_call_target="tpu_custom_call"'
# On TPU a reduce-scatter is a fusion of this name: an all-reduce, and the slice of it that a device keeps.
_SCATTERED = "all-reduce-scatter"
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_IOTA = re.compile(r"replica_groups=\[(?P<groups>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_MESH = re.compile(r"replica_groups=@?mesh\[(?P<axes>[^\]]*)\](?P<layout>[^{]*)\{(?P<over>[^}]*)\}")
_ORDER = re.compile(
    r"device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\)|device_ids=\(?[\[(](?P<ids>[\d,]+)"
)
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>(?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same axes."""

    kind: str
    axes: tuple[str, ...]  # of the mesh; empty where the groups follow no axis
    count: int  # how often they run, loops included
    bytes: int  # of the whole buffers on one device, summed: what was gathered, or what was reduced
    # Bytes that one device sends for them around a ring: what kinds can be compared by, since one program reduces where
    # another scatters and gathers.
    sent: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a walk through a program finds."""

    collectives: tuple[Collective, ...]
    cycles: int  # 0 where the compiler does not say
    untold: int  # instructions run, kernels and ragged products, whose cycles the compiler for TPU cannot tell
    unknown_loops: int  # loops whose trip count the text does not tell; counted as one trip


class Turns(NamedTuple):
    """How often a stage of a pipeline does what it may do in a tick."""

    ticks: int
    tasks: int  # of each kind, forward or backward, in all ticks
    ends: float = 1.0  # the share of its tasks that are at an end of the model


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    operation: str
    result: str  # its shape
    text: str  # what follows the operation's name
    root: bool
    scattered: bool  # whether what it gives is cut at once, in a fusion of the TPU's compiler


def read(text: str, mesh: Mapping[str, int], slices: int = 1, turns: Turns | None = None) -> Program:
    """The collectives and cycles of a compiled program, for devices numbered along `mesh`, outermost axis first.

    Of several slices of TPUs the program is that of one, and what goes between them is counted over the axes that are
    laid across slices. `turns` are those of a pipeline's schedule, if the program runs one.
    """
    walk = _Walk(*_computations(text), turns)
    counts: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    volumes: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    cycles = untold = 0.0
    for instruction, times in walk.runs():
        noted = _CYCLES.search(instruction.text)
        if noted and int(noted[1]) < _NO_ESTIMATE:
            cycles += times * int(noted[1])
        elif noted or _KERNEL in instruction.text:
            untold += times
        kind = instruction.operation.removesuffix("-start")
        if kind == "send" and (transfer := _MEGASCALE.search(instruction.text)):
            steps = steps_over_slices(mesh, slices)
            key = transfer[1].lower().replace("_", "-"), tuple(axis for axis, step in steps.items() if step > 1)
            counts[key] += times
            volumes[key] += times * _bytes(_parts(instruction.result)[0])
        elif kind in KINDS:
            groups = _groups(instruction.text, mesh)
            key = "reduce-scatter" if instruction.scattered else kind, _axes(groups, mesh)
            counts[key] += times
            volumes[key] += times * _volume(instruction, kind, groups)
    collectives = [
        collective(kind, axes, count, volumes[kind, axes], mesh) for (kind, axes), count in sorted(counts.items())
    ]
    return Program(
        collectives=tuple(collectives), cycles=round(cycles), untold=round(untold), unknown_loops=walk.unknown
    )


def collective(kind: str, axes: tuple[str, ...], count: float, size: float, mesh: Mapping[str, int]) -> Collective:
    """All collectives of one kind over the same axes, of `size` bytes together."""
    members = math.prod(mesh[axis] for axis in axes)
    share = 1.0 if kind == "collective-permute" else _PASSES.get(kind, 1) * (members - 1) / members
    return Collective(kind=kind, axes=axes, count=round(count), bytes=round(size), sent=round(share * size))


def sent(collectives: Iterable[Collective]) -> Counter[tuple[str, ...]]:
    """Bytes that leave one device, by the mesh axes along which they go."""
    result: Counter[tuple[str, ...]] = Counter()
    for each in collectives:
        result[each.axes] += each.sent
    return result


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current, scattered = "", None, False
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header["name"], [])
                scattered = header["name"].startswith(_SCATTERED)
                entry = header["name"] if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # two end what a kernel notes of itself
            current = None
        elif match := _INSTRUCTION.match(line):
            rest = match["rest"]
            if operation := _OPERATION.search(rest):
                current.append(
                    _Instruction(
                        match["name"],
                        operation["operation"],
                        rest[: operation.start("operation")],
                        rest[operation.end() :],
                        match[1] is not None,
                        scattered,
                    )
                )
    if not entry:
        raise ValueError("this is not HLO text: it has no ENTRY computation.")
    return computations, entry


class _Walk:
    """From the entry through all that is run."""

    def __init__(self, computations: Mapping[str, list[_Instruction]], entry: str, turns: Turns | None) -> None:
        self.computations, self.entry, self.turns = computations, entry, turns
        self.unknown = 0  # loops met whose trip count nobody tells

    def runs(self) -> Iterator[tuple[_Instruction, float]]:
        """Every instruction that is run, and how often."""
        return self._within(self.entry, 1.0, 0)

    def _within(self, name: str, times: float, around: int | None) -> Iterator[tuple[_Instruction, float]]:
        """As `runs`, within one computation; `around` are the trips of the loop whose body it is in: 0 where it is in
        none, None where nobody tells."""
        for instruction in self.computations.get(name, ()):
            yield instruction, times
            inner, loop = times, around
            if instruction.operation == "while":
                loop = _trips(instruction, self.computations)
                inner *= self._turns(around) if loop is None else loop
            for several, one in _CALLED.findall(instruction.text):
                for called in several.split(",") if several else [one]:
                    yield from self._within(called.strip().lstrip("%"), inner, loop)

    def _turns(self, around: int | None) -> float:
        """How often a loop runs, on average, whose trip count the text does not tell."""
        if self.turns and around == self.turns.ticks:
            return self.turns.tasks / self.turns.ticks
        if self.turns and around is None:  # in such a loop itself: what is done at an end of the model alone
            return self.turns.ends
        self.unknown += 1
        return 1.0


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int | None:
    """How often a loop's body runs: as the compiler notes it, or as the condition bounds a counter from zero."""
    if noted := _TRIP_COUNT.search(loop.text):
        return int(noted[1])
    condition, body = (
        {i.name: i for i in computations.get(called[1] if called else "", ())}
        for called in (re.search(rf"\b{name}=%?([\w.\-]+)", loop.text) for name in ("condition", "body"))
    )
    root = _root(condition)
    if root is None:
        return None
    if root.operation == "fusion" and (called := _CALLED.search(root.text)):  # the comparison, fused
        operands = list(condition.values())
        compares = any("direction=LT" in i.text for i in computations.get(called[2] or "", ()) if _is(i, "compare"))
    else:
        operands = [condition[name] for name in _operands(root) if name in condition]
        compares = _is(root, "compare") and "direction=LT" in root.text
    bounds = [bound for i in operands if (bound := _constant(i)) is not None]
    counters = [_INDEX.search(i.text) for i in operands if _is(i, "get-tuple-element")]
    if not compares or len(bounds) != 1:
        return None
    step = _step(body, int(counters[0][1])) if len(counters) == 1 and counters[0] else 1
    return math.ceil(bounds[0] / step)


def _step(body: Mapping[str, _Instruction], place: int) -> int:
    """What a turn adds to the counter that is element `place` of the loop's state: one, where it is not plain to see.

    A product that is computed while its operand arrives (libtpu's windowed einsum) has two turns written out in one.
    """
    root = _root(body)
    state = _operands(root) if root is not None else []
    following = body.get(state[place]) if place < len(state) else None
    if following is None or not _is(following, "add"):
        return 1
    added = [body[name] for name in _operands(following) if name in body]
    return next((step for i in added if (step := _constant(i))), 1)


def _root(computation: Mapping[str, _Instruction]) -> _Instruction | None:
    return next((i for i in computation.values() if i.root), None)


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.text.split(")")[0])


def _is(instruction: _Instruction, operation: str) -> bool:
    return instruction.operation == operation


def _constant(instruction: _Instruction) -> int | None:
    """Its value, of a constant that is a whole number."""
    value = re.match(r"(\d+)\)", instruction.text) if _is(instruction, "constant") else None
    return int(value[1]) if value else None


def _groups(text: str, mesh: Mapping[str, int]) -> np.ndarray:
    """The groups of devices that a collective joins, one a row; for a permutation its pairs of devices."""
    if match := _IOTA.search(text):
        return _iota(match["dims"], match["order"]).reshape(_numbers(match["groups"]))
    if match := _MESH.search(text):
        return _groups_of_mesh(match["axes"], match["layout"], match["over"])
    pairs = _PAIRS.search(text)
    if match := pairs or _LISTED.search(text):
        found = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1]) if group]
        if found:
            return np.asarray(found)
    return np.arange(math.prod(mesh.values()))[None]  # no groups: all devices in one


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The numbers of all devices, as an array of `dims` with its dimensions in another order."""
    shape = _numbers(dims)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(order)) if order else devices


def _groups_of_mesh(axes: str, layout: str, over: str) -> np.ndarray:
    """Groups written as axes of a mesh of the compiler's own: `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`.

    Of an axis a part can be named, `'a':(m)s`: split into m, s and what remains, it is the middle factor. Without
    `device_ids` the mesh holds the devices in order.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    chosen = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    ]
    # Every axis as its factors, so that each chosen part is a dimension of its own.
    factors: list[int] = []
    dimension: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        done = 1
        for _, before, part in sorted(part for part in chosen if part[0] == name):
            factors += [before // done, part]
            dimension[name, before] = len(factors) - 1
            done = before * part
        factors.append(size // done)
    inner = [dimension[name, before] for name, before, _ in chosen]
    outer = [i for i in range(len(factors)) if i not in inner]
    devices = np.arange(math.prod(factors))
    if match := _ORDER.search(layout):
        devices = np.asarray(_numbers(match["ids"])) if match["ids"] else _iota(match["dims"], match["order"])
    devices = devices.reshape(factors).transpose(outer + inner)
    return devices.reshape(-1, math.prod(factors[i] for i in inner))


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axis, group, member]
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if np.any(place != place[:, :1]))


def _volume(instruction: _Instruction, kind: str, groups: np.ndarray) -> int:
    """The bytes of the whole buffers that one device takes part with."""
    started = instruction.operation.endswith("-start")
    if started and kind != "all-reduce":  # the result names operands and results
        return max(_bytes(part) for part in _parts(instruction.result)[:2])
    return _bytes(instruction.result) * (groups.shape[1] if kind == "reduce-scatter" else 1)


def _parts(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in shape)
    cuts = [i for i, (c, depth) in enumerate(zip(shape, depths, strict=True)) if c == "," and depth == 1]
    return [shape[a + 1 : b] for a, b in itertools.pairwise([shape.find("("), *cuts, len(shape)])] or [shape]


def _bytes(shape: str) -> int:
    return sum(
        math.ceil(math.prod(_numbers(dims.replace("<=", ""))) * BITS[dtype] / 8)
        for dtype, dims in _SHAPE.findall(shape)
        if dtype in BITS
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
