"""Layers to stages: where to cut a model so that its longest stage is as short as can be.

Stages need not have equally many layers. The embedding costs memory and hardly any time, the head and the loss cost as
much as a block or several, and blocks differ among themselves (a mixture of experts between dense layers, a sliding
window between full attention). The pipeline runs at the pace of its longest stage, so that is what is minimised; among
divisions that are equally good in this, the most even one is taken. A stage must also fit into its memory: what its
layers hold at all times, and what they hold for each microbatch under way, of which earlier stages have more (see
`Timeline.peak_activations`). Cuts that the user has made stay where they are.

Both minima are found exactly, by dynamic programming over where the last stage begins.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from tbjax.config import LayerKind, ModelConfig

# Times are sums of floats: two divisions that differ by no more than this part are equally good.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer costs, in any units."""

    name: str
    time: float
    memory: float = 0.0  # held at all times: weights, their gradients, optimizer state
    activations: float = 0.0  # held for each microbatch under way
    block: bool = True  # one of the model's layers, rather than what stands before or after them

    def __post_init__(self) -> None:
        for field in ("time", "memory", "activations"):
            value = getattr(self, field)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"Layer.{field}={value!r} of layer {self.name!r} must be a finite number, zero or more."
                )


@dataclasses.dataclass(frozen=True)
class Partition:
    """A division of layers into stages."""

    layers: tuple[Layer, ...]
    starts: tuple[int, ...]  # the index of the first layer of each stage
    limits: tuple[float, ...]  # the memory that each stage has
    held: tuple[float, ...]  # the microbatches that each stage has under way
    splits: tuple[int, ...]  # the cuts that the user made

    @property
    def stages(self) -> tuple[tuple[Layer, ...], ...]:
        return tuple(self.layers[a:b] for a, b in itertools.pairwise((*self.starts, len(self.layers))))

    @property
    def counts(self) -> tuple[int, ...]:
        """How many layers each stage has."""
        return tuple(map(len, self.stages))

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many of the model's own layers each stage has: what `tbjax.load(..., stage_layers=...)` takes."""
        return tuple(sum(layer.block for layer in stage) for stage in self.stages)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(sum(layer.time for layer in stage) for stage in self.stages)

    @property
    def memories(self) -> tuple[float, ...]:
        return tuple(
            sum(layer.memory + held * layer.activations for layer in stage)
            for stage, held in zip(self.stages, self.held, strict=True)
        )

    @property
    def longest(self) -> float:
        return max(self.times)

    def explain(self) -> str:
        """Every stage in words, and why the longest is not shorter."""
        lines = []
        for index, (stage, time, memory, limit) in enumerate(
            zip(self.stages, self.times, self.memories, self.limits, strict=True)
        ):
            of_longest = f", {time / self.longest:.0%} of the longest" if self.longest else ""
            line = f"stage {index}: {_names(stage)} ({len(stage)} layers): time {time:.4g}{of_longest}"
            if memory:
                line += f", memory {memory:.4g}" + (f" of {limit:.4g}" if limit < math.inf else "")
            lines.append(line + ("; begins where asked" if self.starts[index] in self.splits else ""))
        return "\n".join([*lines, self._reason()])

    def _reason(self) -> str:
        """What keeps the longest stage from being shorter."""
        mean = sum(self.times) / len(self.times)
        largest = max(self.layers, key=lambda layer: layer.time)
        said = f"The longest stage takes {self.longest:.4g}, the mean {mean:.4g}: "
        if self.longest <= mean * (1 + _ROUNDING):
            return said + "the stages are even."
        if self.longest <= largest.time * (1 + _ROUNDING):
            return said + f"the layer {largest.name!r} alone takes that long."
        reasons = []
        if self.splits:
            free = _divide_by_time(self.layers, self.limits, self.held, ())
            if free is not None and (shorter := _longest(self.layers, free)) < self.longest * (1 - _ROUNDING):
                reasons.append(f"without the cuts that were asked for it would take {shorter:.4g}")
        if any(limit < math.inf for limit in self.limits):
            roomy = _divide_by_time(self.layers, (math.inf,) * len(self.limits), self.held, self.splits)
            if roomy is not None and (shorter := _longest(self.layers, roomy)) < self.longest * (1 - _ROUNDING):
                reasons.append(f"with unlimited memory it would take {shorter:.4g}")
        return said + ("; ".join(reasons) or "no other cuts between layers make it shorter") + "."


def partition(
    layers: Iterable[Layer],
    stages: int,
    *,
    memory: float | Sequence[float] | None = None,
    held: float | Sequence[float] = 1.0,
    splits: Iterable[int | str] = (),
) -> Partition:
    """The division of `layers` into `stages` whose longest stage takes the least time.

    `memory` is what a stage may hold (one figure, or one for each; None: no limit), `held` how many microbatches'
    activations it has under way. `splits` names layers, or gives their indices, at which a stage has to begin: all
    stages-1 of them, or some, and the others are chosen. Where stages have several chunks, divide into as many parts
    as there are pieces of the model, and give each piece its share of the memory.
    """
    layers = tuple(layers)
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        raise ValueError(f"stages must be a positive integer, not {stages!r}.")
    if stages > len(layers):
        raise ValueError(f"{len(layers)} layers cannot fill stages={stages}: each needs one, so {len(layers)} at most.")
    limits = _for_each("memory", math.inf if memory is None else memory, stages)
    under_way = _for_each("held", held, stages)
    cuts = _cuts(layers, stages, splits)
    starts = _divide_by_time(layers, limits, under_way, cuts)
    if starts is None:
        raise ValueError(_does_not_fit(layers, limits, under_way, cuts))
    return Partition(layers, starts, limits, under_way, cuts)


def model_layers(
    config: ModelConfig, *, seq_len: int, rows: int = 1, parameter_bytes: float = 16.0, compute_bytes: int = 2
) -> tuple[Layer, ...]:
    """The layers of a model with estimates of their costs: the embedding, each block, the head with the loss.

    Time is in FLOPs of a microbatch of `rows` sequences, forward; backwards take the same multiple of it everywhere.
    Memory is in bytes: 16 for each parameter (float32 weights, gradients and Adam's two moments) and a block's input
    for each microbatch, as with full recomputation. Whoever has measured better figures builds `Layer`s of their own.
    """
    tokens, table = seq_len * rows, config.padded_vocab * config.embed
    saved = float(tokens * config.embed * compute_bytes)
    found = [Layer(name="embedding", time=0.0, memory=table * parameter_bytes, block=False)]
    for index, kind in enumerate(config.layer_kinds):
        active, parameters = _block_parameters(config, kind)
        reach = min(seq_len, kind.window or seq_len)
        # A token meets every weight in a multiply-add, and in attention (scores, then values) half of what it may
        # reach back to, all of it once the window is full.
        attended = reach * (seq_len - reach / 2) / seq_len
        flops = 2 * active + 4 * config.heads * config.head_dim * attended
        found.append(
            Layer(name=f"block {index}", time=tokens * flops, memory=parameters * parameter_bytes, activations=saved)
        )
    # A tied table is held by both ends of a pipeline.
    head = tokens * 2.0 * table
    found.append(Layer(name="head", time=head, memory=table * parameter_bytes, activations=saved, block=False))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _block_parameters(config: ModelConfig, kind: LayerKind) -> tuple[int, int]:
    """Matrix elements of a block that a token meets, and all of them. Norms and biases are too few to matter."""
    attention = 2 * config.embed * config.head_dim * (config.heads + config.kv_heads)
    if kind.sparse:
        moe = config.experts
        router, expert = config.embed * moe.experts, 3 * config.embed * moe.mlp
        return attention + router + moe.experts_per_token * expert, attention + router + moe.experts * expert
    dense = attention + (3 if config.gated_mlp else 2) * config.embed * config.mlp
    return dense, dense


def _divide_by_time(
    layers: Sequence[Layer], limits: Sequence[float], held: Sequence[float], cuts: Sequence[int]
) -> tuple[int, ...] | None:
    """The first layers of the stages: the longest stage minimal, then the squares of all. None if none fits."""
    times = [0.0, *itertools.accumulate(layer.time for layer in layers)]
    fits = _fits(layers, limits, held)

    def time(stage: int, start: int, end: int) -> float:
        return times[end] - times[start] if fits(stage, start, end) else math.inf

    count, stages = len(layers), len(limits)
    shortest = _divide(count, stages, cuts, time, max)
    if shortest is None:
        return None
    bound = _longest(layers, shortest) * (1 + _ROUNDING)

    def square(stage: int, start: int, end: int) -> float:
        taken = time(stage, start, end)
        return taken * taken if taken <= bound else math.inf

    return _divide(count, stages, cuts, square, lambda so_far, more: so_far + more) or shortest


def _divide(
    count: int,
    stages: int,
    cuts: Sequence[int],
    cost: Callable[[int, int, int], float],
    add: Callable[[float, float], float],
) -> tuple[int, ...] | None:
    """The first layers of the stages such that their costs, added up, come to the least; None if all are infinite.

    `cost(stage, start, end)` of a stage must not fall when it begins earlier.
    """
    # best[end]: the least cost of the stages so far if they take the layers before `end`; begun[stage][end]: where the
    # last of them begins.
    best = [0.0] + [math.inf] * count
    begun: list[list[int]] = []
    for stage in range(stages):
        extended, starts = [math.inf] * (count + 1), [-1] * (count + 1)
        for end in range(stage + 1, count - (stages - 1 - stage) + 1):
            for start in range(end - 1, stage - 1, -1):
                own = cost(stage, start, end)
                if own >= extended[end]:
                    break  # beginning even earlier only costs more
                if (total := add(best[start], own)) < extended[end]:
                    extended[end], starts[end] = total, start
                if start in cuts:
                    break  # nor may a stage reach over a cut
        best = extended
        begun.append(starts)
    if best[count] == math.inf:
        return None
    found, end = [], count
    for starts in reversed(begun):
        end = starts[end]
        found.append(end)
    return tuple(reversed(found))


def _fits(layers: Sequence[Layer], limits: Sequence[float], held: Sequence[float]) -> Callable[[int, int, int], bool]:
    needs = _memory(layers, held)
    return lambda stage, start, end: needs(stage, start, end) <= limits[stage] * (1 + _ROUNDING)


def _memory(layers: Sequence[Layer], held: Sequence[float]) -> Callable[[int, int, int], float]:
    fixed = [0.0, *itertools.accumulate(layer.memory for layer in layers)]
    moving = [0.0, *itertools.accumulate(layer.activations for layer in layers)]
    return lambda stage, start, end: fixed[end] - fixed[start] + held[stage] * (moving[end] - moving[start])


def _longest(layers: Sequence[Layer], starts: Sequence[int]) -> float:
    return max(sum(layer.time for layer in layers[a:b]) for a, b in itertools.pairwise((*starts, len(layers))))


def _does_not_fit(layers: Sequence[Layer], limits: Sequence[float], held: Sequence[float], cuts: Sequence[int]) -> str:
    """How far from fitting it is: the division whose fullest stage has the least too much."""
    needs = _memory(layers, held)

    def excess(stage: int, start: int, end: int) -> float:
        return max(0.0, needs(stage, start, end) - limits[stage])

    starts = _divide(len(layers), len(limits), cuts, excess, max) or ()
    ends = (*starts[1:], len(layers))
    worst = max(range(len(starts)), key=lambda stage: excess(stage, starts[stage], ends[stage]))
    needed = needs(worst, starts[worst], ends[worst])
    asked = " with the cuts that were asked for" if cuts else ""
    return (
        f"no division of {len(layers)} layers into {len(limits)} stages{asked} fits into memory. Closest comes one in "
        f"which stage {worst} ({_names(layers[starts[worst] : ends[worst]])}) needs {needed:.4g} and has "
        f"{limits[worst]:.4g}: use more stages, or hold fewer microbatches."
    )


def _for_each(name: str, given: float | Sequence[float], stages: int) -> tuple[float, ...]:
    figures = (float(given),) * stages if isinstance(given, int | float) else tuple(map(float, given))
    if len(figures) != stages:
        raise ValueError(f"{name} has {len(figures)} figures: give one, or {stages} for stages={stages}.")
    if not all(figure >= 0 for figure in figures):
        raise ValueError(f"{name}={given!r} must be zero or more.")
    return figures


def _cuts(layers: Sequence[Layer], stages: int, splits: Iterable[int | str]) -> tuple[int, ...]:
    """The indices at which a stage has to begin, in order."""
    by_name = {layer.name: index for index, layer in enumerate(layers)}
    found: set[int] = set()
    for split in splits:
        index = by_name.get(split) if isinstance(split, str) else split
        if index is None:
            raise ValueError(f"splits: there is no layer {split!r}; the first are {_names(layers[:3])}.")
        if not 0 < index < len(layers):
            raise ValueError(
                f"splits: a stage cannot begin at layer {split!r}, but between the second layer, 1, and the last, "
                f"{len(layers) - 1}."
            )
        found.add(index)
    if len(found) > stages - 1:
        raise ValueError(f"splits={sorted(found)} make {len(found) + 1} stages, not stages={stages}.")
    return tuple(sorted(found))


def _names(layers: Sequence[Layer]) -> str:
    """`a`, or `a to z`."""
    return layers[0].name if len(layers) == 1 else f"{layers[0].name} to {layers[-1].name}"
