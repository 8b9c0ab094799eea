"""The search: the best layouts of a `Space`, without pricing them all.

A layout is decided in four steps: the mesh and what is shared out on it, the recomputation, the number of microbatches,
and last the schedule and what is offloaded. After each step the best that can still come of it is bounded from below,
and the beginning with the lowest bound is continued first. When a whole layout has the lowest value of all, nothing
that is left can beat it. So the answer is that of pricing everything, as the tests show by pricing everything.

The bounds rest on what is true of any sensible price:

- Time. Recomputing, offloading and more microbatches never save time, except that more microbatches make the pipeline's
  bubble smaller. So the time without the first two, at the fewest microbatches and less the bubble, is a bound.
- Memory. Recomputing and offloading save memory, 1F1B holds the fewest activations, and over the number of microbatches
  memory has no minimum between the ends: activations shrink as it grows, while a second microbatch brings buffers to
  sum gradients in. So the lesser of both ends with everything saved is a bound, and a mesh whose bound is above the
  device is dropped before its time is asked for.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

from tbjax.planner.cost import Time, step_time
from tbjax.planner.legal import Rejection, Space
from tbjax.planner.memory import Memory, memory
from tbjax.planner.words import gib, spelled_sizes, time_title
from tbjax.planner.workload import Layout, Workload

Objective: TypeAlias = Literal["throughput", "latency", "memory"]

# Runners-up that are worth showing.
KEPT = 8

# Value and tie-breaker; the lower the better.
Score: TypeAlias = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its price."""

    layout: Layout
    memory: Memory
    time: Time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found."""

    best: tuple[Candidate, ...]  # the best of each mesh that fits, best first; where nothing fits, the closest
    fits: bool
    rejected: tuple[Rejection, ...]
    legal: int  # meshes


def search(space: Space, objective: Objective = "throughput", keep: int = KEPT) -> Found:
    """The best layouts of `space`, each on a mesh of its own unless the mesh is fixed.

    Raises where no mesh is legal at all, with the reasons.
    """
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r} is unknown: tbjax ranks by {', '.join(get_args(Objective))}.")
    meshes, refused = space.meshes()
    if not any(True for mesh in meshes for _ in space.layouts(mesh)):
        raise ValueError(_nothing_legal(space, refused))
    descent = _Descent(space, objective, distinct=len(meshes) > 1)
    best = descent.run(meshes, keep)
    if best:
        return Found(best=best, fits=True, rejected=(*refused, *descent.rejections(meshes, best)), legal=len(meshes))
    closest = _Descent(space, "memory", distinct=len(meshes) > 1, bounded=False).run(meshes, keep)
    return Found(best=closest, fits=False, rejected=(*refused, *descent.rejections(meshes, closest)), legal=len(meshes))


def score(candidate: Candidate, workload: Workload, objective: Objective) -> Score:
    """What a candidate is ranked by."""
    time = duration(candidate.time, workload, objective)
    total = candidate.memory.total
    return (total, time) if objective == "memory" else (time, total)


def duration(time: Time, workload: Workload, objective: Objective) -> float:
    """The time that counts: of a step in training; in inference, of all requests or until one is answered."""
    return time.total


def overflow(space: Space, held: Memory) -> int:
    """Bytes that are missing on the device and on the host; zero where the layout fits."""
    hardware = space.cluster.hardware
    return max(held.total - hardware.usable, 0) + max(held.host - hardware.host_memory_per_device, 0)


class _Node(NamedTuple):
    """A beginning of a layout, in the order in which they are continued."""

    bound: Score
    order: int
    layout: Layout
    follow: Callable[[Layout], Iterator["_Node"]] | None  # its continuations; None: it is whole
    candidate: Candidate | None


class _Descent:
    """One run of the search. `bounded` says whether a layout must fit; `distinct` whether a mesh is shown once."""

    def __init__(self, space: Space, objective: Objective, *, distinct: bool, bounded: bool = True) -> None:
        self.space = space
        self.objective = objective
        self.distinct = distinct
        self.bounded = bounded
        self.order = itertools.count()
        self.short: dict[Layout, tuple[int, Layout]] = {}  # mesh -> the least overflow seen, and of which layout
        self.left: list[_Node] = []

    def run(self, meshes: Iterable[Layout], keep: int) -> tuple[Candidate, ...]:
        heap = [node for mesh in meshes for node in self._share_out(mesh)]
        heapq.heapify(heap)
        best: dict[Layout, Candidate] = {}
        while heap and len(best) < keep:
            node = heapq.heappop(heap)
            key = _mesh_of(node.layout) if self.distinct else node.layout
            if key in best:
                continue
            if node.candidate:
                best[key] = node.candidate
            elif node.follow:
                for child in node.follow(node.layout):
                    heapq.heappush(heap, child)
        self.left = heap
        return tuple(best.values())

    # The four steps.

    def _share_out(self, mesh: Layout) -> Iterator[_Node]:
        space = self.space
        for strategy, parallel in itertools.product(space.strategies(mesh), space.sequence_parallel(mesh)):
            begun = dataclasses.replace(
                mesh, strategy=strategy, sequence_parallel=parallel, remat=space.remats()[-1], offload=()
            )
            if self._may_fit(begun, space.microbatches(mesh)):
                quickest = dataclasses.replace(begun, remat=space.remats()[0])
                yield self._begin(quickest, space.microbatches(mesh), self._recompute)

    def _recompute(self, begun: Layout) -> Iterator[_Node]:
        microbatches = self.space.microbatches(begun)
        for remat in self.space.remats():
            layout = dataclasses.replace(begun, remat=remat)
            if self._may_fit(layout, microbatches):
                yield self._begin(layout, microbatches, self._split_batch)

    def _split_batch(self, begun: Layout) -> Iterator[_Node]:
        for microbatches in self.space.microbatches(begun):
            layout = dataclasses.replace(begun, microbatches=microbatches)
            if self._may_fit(layout, (microbatches,)):
                yield self._begin(layout, (microbatches,), self._finish)

    def _finish(self, begun: Layout) -> Iterator[_Node]:
        space = self.space
        for (schedule, chunks), offload in itertools.product(
            space.schedules(begun, begun.microbatches), space.offloads()
        ):
            layout = dataclasses.replace(begun, schedule=schedule, chunks=chunks, offload=offload)
            held = self._memory(layout)
            excess = overflow(space, held)
            if not self.bounded or excess == 0 or self._note_overflow(layout, excess):
                candidate = Candidate(layout=layout, memory=held, time=self._time(layout))
                bound = score(candidate, space.workload, self.objective)
                yield _Node(bound, next(self.order), layout, None, candidate)

    # Bounds.

    def _begin(
        self, layout: Layout, microbatches: tuple[int, ...], follow: Callable[[Layout], Iterator[_Node]]
    ) -> _Node:
        if self.objective == "memory":
            bound = self._least_memory(layout, microbatches)
        else:
            bound = self._least_time(dataclasses.replace(layout, microbatches=microbatches[0]))
        return _Node((bound, 0.0), next(self.order), layout, follow, None)

    def _least_time(self, layout: Layout) -> float:
        time = self._time(layout)
        return duration(time, self.space.workload, self.objective) - time.parts.get("bubble", 0.0)

    def _least_memory(self, layout: Layout, microbatches: tuple[int, ...]) -> int:
        return min(self._memory(frugal).total for frugal in self._frugal(layout, microbatches))

    def _may_fit(self, layout: Layout, microbatches: tuple[int, ...]) -> bool:
        """Whether the device may hold it. The host's memory is asked about whole layouts only: saving fills it."""
        if not self.bounded:
            return True
        excess = self._least_memory(layout, microbatches) - self.space.cluster.hardware.usable
        return excess <= 0 or self._note_overflow(layout, excess)

    def _frugal(self, layout: Layout, microbatches: tuple[int, ...]) -> list[Layout]:
        """The layouts between which the least memory lies."""
        return [
            dataclasses.replace(
                layout,
                microbatches=count,
                schedule=schedules[0][0],
                chunks=schedules[0][1],
                offload=self.space.offloads()[-1],
            )
            for count in sorted({microbatches[0], microbatches[-1]})
            if (schedules := self.space.schedules(layout, count))
        ]

    # Prices.

    def _memory(self, layout: Layout) -> Memory:
        return memory(self.space.config, self.space.workload, layout, self.space.cluster.hardware)

    def _time(self, layout: Layout) -> Time:
        return step_time(self.space.config, self.space.workload, layout, self.space.cluster)

    def _note_overflow(self, layout: Layout, excess: int) -> bool:
        """Remembers the least that a mesh lacked; False, since it does lack something."""
        mesh = _mesh_of(layout)
        if mesh not in self.short or excess < self.short[mesh][0]:
            self.short[mesh] = (excess, layout)
        return False

    # Why the others were not chosen.

    def rejections(self, meshes: Iterable[Layout], best: tuple[Candidate, ...]) -> list[Rejection]:
        """The legal meshes that are not among the best, by reason."""
        chosen = {_mesh_of(candidate.layout) for candidate in best}
        beaten: dict[Layout, Layout] = {}  # mesh -> its most promising beginning
        for node in sorted(self.left):
            beaten.setdefault(_mesh_of(node.layout), node.layout)
        reasons: dict[str, list[tuple[float, str, Layout]]] = {}
        for mesh in meshes:
            if mesh in chosen:
                continue
            if mesh in beaten:
                rule, distance, words = self._beaten(beaten[mesh], best[0])
            else:
                excess, layout = self.short[mesh]
                rule, distance, words = "memory", float(excess), self._too_large(excess, layout)
            reasons.setdefault(rule, []).append((distance, words, mesh))
        found = []
        for cases in reasons.values():
            _, words, mesh = min(cases, key=lambda case: case[0])
            found.append(Rejection(reason=words, count=len(cases), example=mesh.mesh))
        return sorted(found, key=lambda rejection: -rejection.count)

    def _too_large(self, excess: int, layout: Layout) -> str:
        hardware = self.space.cluster.hardware
        device = self._least_memory(layout, (layout.microbatches,)) > hardware.usable
        saved = " even with everything recomputed and offloaded" if self.space.workload.training else ""
        place = f"the {gib(hardware.usable)} that a {hardware.title} leaves to a program"
        if not device:
            return f"needs {gib(excess)} more of the host than the {gib(hardware.host_memory_per_device)} of a device"
        return f"needs {gib(excess)} more than {place},{saved}" if saved else f"needs {gib(excess)} more than {place}"

    def _beaten(self, layout: Layout, best: Candidate) -> tuple[str, float, str]:
        """The rule, the distance and the words for a mesh that is legal, may fit and is worse."""
        if self.objective == "memory":
            more = self._least_memory(layout, self.space.microbatches(layout)) - best.memory.total
            return "memory", more, f"holds at least {gib(max(more, 0))} more"
        time = self._time(layout)
        ratio = self._least_time(layout) / duration(best.time, self.space.workload, self.objective)
        slower = f"at least {ratio:.2f} times the best's time" if ratio > 1.005 else "no faster than the best"
        kv_heads = self.space.config.kv_heads
        if kv_heads % layout.tp and layout.tp > best.layout.tp:
            return "kv", ratio, f"{kv_heads} KV heads < tp {layout.tp}: KV replicated, {slower}"
        part = max(time.parts, key=lambda name: time.parts[name] - best.time.parts.get(name, 0.0))
        return part, ratio, f"{slower}: more {time_title(part)}"


def _mesh_of(layout: Layout) -> Layout:
    return Layout(pp=layout.pp, dp=layout.dp, fsdp=layout.fsdp, ep=layout.ep, cp=layout.cp, tp=layout.tp)


def _nothing_legal(space: Space, refused: list[Rejection]) -> str:
    """Why no mesh is legal, and what would do."""
    reasons = "; ".join(f"{rejection.reason} ({spelled_sizes(rejection.example)})" for rejection in refused[:4])
    return f"no mesh of {space.cluster} can hold this: {reasons}."
