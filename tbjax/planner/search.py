"""The search: the best layouts of a `Space`, without pricing them all.

A layout is decided step by step: the mesh and what is shared out on it, the recomputation, the number of microbatches,
the schedule, what is offloaded. After each step the best that can still come of it is bounded from below, and the
beginning with the lowest bound is continued first. When a whole layout that fits has the lowest value of all, nothing
that is left can beat it. So the answer is that of pricing everything, as the tests show by pricing everything.

The bounds rest on what is true of any sensible price:

- Time. Recomputing, offloading and more microbatches never save time, except that more microbatches make the pipeline's
  bubble smaller. So the time without the first two, at the fewest microbatches and less the bubble, is a bound.
- Memory. Recomputing and offloading save memory, 1F1B holds the fewest activations, and over the number of microbatches
  memory has no minimum between the ends: activations shrink as it grows, while a second microbatch brings buffers to
  sum gradients in. So the lesser of both ends with everything saved is a bound, and what exceeds the device even then
  is continued no further.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from tbjax.mesh import AXES, spell
from tbjax.planner.cost import Time, step_time
from tbjax.planner.legal import Rejection, Space, divisors
from tbjax.planner.memory import Memory, memory
from tbjax.planner.words import gib, options, seconds, spelled_sizes, time_title
from tbjax.planner.workload import Layout, Offloaded, Remat

Objective: TypeAlias = Literal["throughput", "latency", "memory"]
Sizes: TypeAlias = tuple[int, ...]  # of a mesh, in the order of AXES

# Runners-up that are worth showing.
KEPT = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its price."""

    layout: Layout
    memory: Memory
    time: Time

    def __repr__(self) -> str:
        price = f"{gib(self.memory.total)}, {seconds(self.time.total)}"
        return f"<{spelled_sizes(self.layout.mesh)}, {options(self.layout)}: {price}>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: tuple[Candidate, ...]  # the best of each mesh that fits, best first; where nothing fits, the closest
    fits: bool
    rejected: tuple[Rejection, ...]  # the meshes that are not among the best, by reason


def search(space: Space, objective: Objective = "throughput", keep: int = 1 + KEPT) -> Found:
    """The best layouts of `space`, each on a mesh of its own unless the mesh is fixed.

    "throughput" and "latency" rank by time, which for a given batch is both, "memory" by the bytes of a device. Raises
    where no mesh is legal at all, with the reasons.
    """
    check_objective(objective)
    meshes, refused = space.meshes()
    if not any(space.microbatches(mesh) for mesh in meshes):
        raise ValueError(_nothing_legal(space, refused))
    descent = _Descent(space, objective, distinct=len(meshes) > 1)
    best = descent.run(meshes, keep)
    fits = bool(best)
    if not fits:
        best = _Descent(space, "memory", distinct=len(meshes) > 1, bounded=False).run(meshes, keep)
    return Found(best=best, fits=fits, rejected=(*refused, *descent.rejections(meshes, best)))


def anything_fits(space: Space) -> bool:
    """Whether some legal layout fits."""
    meshes, _ = space.meshes()
    return bool(_Descent(space, "memory", distinct=True).run(meshes, keep=1))


def check_objective(objective: str) -> None:
    if objective not in get_args(Objective):
        known = ", ".join(map(repr, get_args(Objective)))
        raise ValueError(f"objective={objective!r} is unknown: tbjax ranks by {known}.")


def missing(space: Space, held: Memory) -> int:
    """Bytes that the device and the host lack, for each device; zero where the layout fits."""
    return max(held.total - space.cluster.hardware.usable, 0) + missing_on_host(space, held)


def missing_on_host(space: Space, held: Memory) -> int:
    return max(held.host - space.cluster.hardware.host_memory_per_device, 0)


class _Node(NamedTuple):
    """A beginning of a layout: what is settled, and what is open of the rest. They are continued in this order."""

    bound: float
    order: int
    layout: Layout
    remats: tuple[Remat, ...]  # ascending in what they recompute
    microbatches: tuple[int, ...]  # ascending
    time: Time | None = None  # of a whole layout: nothing is open


class _Descent:
    """One run of the search.

    `distinct` says whether a mesh is shown once, `bounded` whether the device must hold the layout; the host must.
    """

    def __init__(self, space: Space, objective: Objective, *, distinct: bool, bounded: bool = True) -> None:
        self.space = space
        self.distinct = distinct
        self.bounded = bounded
        self.saving = objective == "memory"
        self.order = itertools.count()
        self.short: dict[Sizes, tuple[int, Layout]] = {}  # mesh -> the least that it lacked, and with which layout
        self.left: list[_Node] = []

    def run(self, meshes: Iterable[Layout], keep: int) -> tuple[Candidate, ...]:
        """The `keep` best, best first."""
        heap = [node for mesh in meshes for node in self._share_out(mesh)]
        heapq.heapify(heap)
        best: dict[Layout | Sizes, Candidate] = {}
        while heap and len(best) < keep:
            node = heapq.heappop(heap)
            key = _sizes(node.layout) if self.distinct else node.layout
            if key in best:
                continue
            if node.time:
                held = self._memory(node.layout)
                if self._fits(node.layout, (missing if self.bounded else missing_on_host)(self.space, held)):
                    best[key] = Candidate(layout=node.layout, memory=held, time=node.time)
                    continue
            for child in self._continue(node):
                heapq.heappush(heap, child)
        self.left = heap
        tie_breaker = {True: lambda c: (c.memory.total, c.time.total), False: lambda c: (c.time.total, c.memory.total)}
        return tuple(sorted(best.values(), key=tie_breaker[self.saving]))

    # The steps.

    def _share_out(self, mesh: Layout) -> Iterator[_Node]:
        space = self.space
        counts = space.microbatches(mesh)
        if counts:
            for strategy, parallel in itertools.product(space.strategies(mesh), space.sequence_parallel(mesh)):
                layout = _varied(mesh, strategy=strategy, sequence_parallel=parallel)
                yield self._begun(layout, space.remats(mesh), counts)

    def _continue(self, node: _Node) -> Iterator[_Node]:
        layout, remats, counts = node.layout, node.remats, node.microbatches
        if node.time:
            yield from self._offload(layout)
        elif len(remats) > 1:
            if self._may_fit(node):
                for remat in remats:
                    yield self._begun(layout, (remat,), counts)
        elif len(counts) > 1:
            # Those that leave the pipeline unfilled, whose bubble is large, apart from the others.
            few = sum(count < layout.pp for count in counts)
            cut = few if 0 < few < len(counts) else 1
            yield self._begun(layout, remats, counts[:cut])
            yield self._begun(layout, remats, counts[cut:])
        elif self._may_fit(node):
            for remat, count in zip(remats, counts, strict=True):  # one of each is left
                yield from self._schedule(_varied(layout, remat=remat, microbatches=count))

    def _schedule(self, begun: Layout) -> Iterator[_Node]:
        offloads = self.space.offloads(begun, begun.remat)
        offloads = offloads if self.saving else offloads[:1]
        for schedule, chunks in self.space.schedules(begun, begun.microbatches):
            for offload in offloads:
                yield self._whole(_varied(begun, schedule=schedule, chunks=chunks, offload=offload))

    def _offload(self, whole: Layout) -> Iterator[_Node]:
        """What may fit in place of a layout that does not. Nobody offloads what has room."""
        first, *others = self.space.offloads(whole, whole.remat)
        if not self.saving and whole.offload == first:
            for offload in others:
                yield self._whole(_varied(whole, offload=offload))

    def _begun(self, layout: Layout, remats: tuple[Remat, ...], counts: tuple[int, ...]) -> _Node:
        least = self._least_memory if self.saving else self._least_time
        return _Node(least(layout, remats, counts), next(self.order), layout, remats, counts)

    def _whole(self, layout: Layout) -> _Node:
        time = self._time(layout)
        return _Node(self._memory(layout).total if self.saving else time.total, next(self.order), layout, (), (), time)

    # Bounds.

    def _least_time(self, layout: Layout, remats: tuple[Remat, ...], counts: tuple[int, ...]) -> float:
        quickest = self._time(self._plainest(layout, remats[0], counts[0]))
        rest = quickest.total - quickest.parts["bubble"]
        # Where only one schedule can follow, so can its bubble be known.
        if layout.pp > 1 and len(self.space.schedules(layout, counts[-1])) == 1:
            most = quickest if len(counts) == 1 else self._time(self._plainest(layout, remats[0], counts[-1]))
            return rest + most.parts["bubble"]
        return rest

    def _least_memory(self, layout: Layout, remats: tuple[Remat, ...], counts: tuple[int, ...]) -> int:
        return min(self._least_memories(layout, remats, counts))

    def _least_memories(self, layout: Layout, remats: tuple[Remat, ...], counts: tuple[int, ...]) -> Iterator[int]:
        """Of which the least is that of `_least_memory`."""
        # Of a stage with few layers its input and those of its layers, once, may be more than the layers' in flight.
        for remat in remats[-2:] if remats[-1] == "stage" else remats[-1:]:
            everything = self.space.offloads(layout, remat)[-1]
            for count in {counts[0], counts[-1]}:
                yield self._memory(self._plainest(layout, remat, count, everything)).total

    def _plainest(self, layout: Layout, remat: Remat, count: int, offload: tuple[Offloaded, ...] = ()) -> Layout:
        schedule, chunks = self.space.schedules(layout, count)[0]
        settings = {"remat": remat, "microbatches": count, "schedule": schedule, "chunks": chunks, "offload": offload}
        return _varied(layout, **settings)

    def _may_fit(self, node: _Node) -> bool:
        """Whether the device may hold it. The host is asked about whole layouts only: saving fills its memory."""
        if not self.bounded:
            return True
        usable, least = self.space.cluster.hardware.usable, math.inf
        for held in self._least_memories(node.layout, node.remats, node.microbatches):
            if held <= usable:
                return True
            least = min(least, held)
        return self._fits(node.layout, int(least) - usable)

    def _fits(self, layout: Layout, lacking: int) -> bool:
        """Whether nothing is lacking. Remembers the least that each mesh lacked."""
        if lacking <= 0:
            return True
        sizes = _sizes(layout)
        if sizes not in self.short or lacking < self.short[sizes][0]:
            self.short[sizes] = lacking, layout
        return False

    # Prices.

    def _memory(self, layout: Layout) -> Memory:
        return memory(self.space.config, self.space.workload, layout, self.space.cluster.hardware)

    def _time(self, layout: Layout) -> Time:
        return step_time(self.space.config, self.space.workload, layout, self.space.cluster)

    # Why the others were not chosen.

    def rejections(self, meshes: Iterable[Layout], best: tuple[Candidate, ...]) -> list[Rejection]:
        """The legal meshes that are not among `best`, by reason, each with the mesh to which it applies least."""
        chosen = {_sizes(candidate.layout) for candidate in best}
        beaten: dict[Sizes, _Node] = {}  # mesh -> the most promising of its beginnings that may fit
        for node in sorted(self.left):
            sizes = _sizes(node.layout)
            if sizes not in chosen and sizes not in beaten and (node.time or self._may_fit(node)):
                beaten[sizes] = node
        reasons: dict[str, list[tuple[float, str, Layout]]] = {}
        for mesh in meshes:
            sizes = _sizes(mesh)
            if sizes in chosen:
                continue
            if sizes in beaten:
                rule, distance, words = self._beaten(beaten[sizes], best[0])
            else:
                rule, distance, words = "fit", float(self.short[sizes][0]), self._too_large(*self.short[sizes])
            reasons.setdefault(rule, []).append((distance, words, mesh))
        found = []
        for cases in reasons.values():
            _, words, mesh = min(cases, key=lambda case: case[0])
            found.append(Rejection(reason=words, count=len(cases), example=mesh.mesh))
        return sorted(found, key=lambda rejection: -rejection.count)

    def _too_large(self, lacking: int, layout: Layout) -> str:
        hardware = self.space.cluster.hardware
        on_host = self._memory(layout).host - hardware.host_memory_per_device
        if on_host > 0:
            room = f"{gib(hardware.host_memory_per_device)} of the host's memory that a device may take"
            short = f", and {gib(lacking - on_host)} more than its own" if lacking > on_host else ""
            return f"needs {gib(on_host)} more than the {room}{short}"
        device = f"{gib(hardware.memory)} device, {gib(hardware.usable)} of it usable, can hold"
        means = [("recomputed", self.space.remats(layout)), ("offloaded", self.space.offloads(layout, layout.remat))]
        used = " and ".join(word for word, choices in means if len(choices) > 1)
        return f"needs {gib(lacking)} more than the {device}" + (f", however much is {used}" if used else "")

    def _beaten(self, node: _Node, best: Candidate) -> tuple[str, float, str]:
        """The rule, the distance and the words for a mesh that may fit and is worse."""
        if self.saving:
            more = max(node.bound - best.memory.total, 0)
            return "memory", more, f"holds at least {gib(more)} more than the best"
        time = node.time or self._time(self._plainest(node.layout, node.remats[0], node.microbatches[0]))
        ratio = node.bound / best.time.total
        slower = f"takes at least {ratio:.2f} times as long as the best" if ratio > 1.005 else "no faster than the best"
        kv_heads, tp = self.space.config.kv_heads, node.layout.tp
        if kv_heads < tp > best.layout.tp:
            return "kv", ratio, f"{kv_heads} KV heads < tp {tp}: KV replicated; {slower}"
        part = max(time.parts, key=lambda name: time.parts[name] - best.time.parts.get(name, 0.0))
        return part, ratio, f"{slower}; costs most in: {time_title(part)}"


def _varied(layout: Layout, **changes: Any) -> Layout:
    """A copy with changes, without the checks of `Layout`: they are for what users write, and a search makes tens of
    thousands of layouts."""
    copy = object.__new__(Layout)
    copy.__dict__.update(layout.__dict__, **changes)
    return copy


def _sizes(layout: Layout) -> Sizes:
    return tuple(layout.__dict__[axis] for axis in AXES)


def _nothing_legal(space: Space, refused: list[Rejection]) -> str:
    """Why no mesh is legal, and what would do."""
    reasons = "; ".join(f"{rejection.reason} ({spelled_sizes(rejection.example)})" for rejection in refused[:4])
    return (
        f"no mesh of the {space.cluster.devices} devices of {space.cluster} would do: {reasons}. {_what_would(space)}"
    )


def _what_would(space: Space) -> str:
    """The next larger batch with which a mesh is legal; failing that, the legal mesh nearest to what was fixed."""
    batch, axes = space.workload.global_batch, [axis for axis in AXES if axis in space.fixed]
    for larger in sorted({-(-batch // size) * size for size in divisors(space.cluster.devices)} - {batch}):
        if dataclasses.replace(space, workload=dataclasses.replace(space.workload, global_batch=larger)).meshes()[0]:
            return f"global_batch={larger} would do."
    settings = {name: value for name, value in space.fixed.items() if name not in AXES}
    meshes, _ = dataclasses.replace(space, fixed=settings).meshes()
    if not axes or not meshes:
        return "Other hardware, or another batch, would."

    def distance(mesh: Layout) -> float:
        return sum(abs(math.log2(mesh.mesh[axis] / space.fixed[axis])) for axis in axes)

    return f"A mesh that would do: {spell(min(meshes, key=distance).mesh)}."
