"""What devices send each other in a step: collectives by part, kind and mesh axes, with their bytes.

A layout decides what has to be moved: partial results of matrices cut over tp, weights cut over fsdp, gradients of what
several devices hold. This file says how often and how many bytes, as the program of `tbjax.training` does it; how long
that takes is `prices`' business, and what a compiler made of it stands in its program (`hlo`). Both count the bytes of
the whole buffer on one device: what was gathered, or what was reduced.

R rows of S tokens in a microbatch on a device; the residual stream on a device is R x S / cp x D elements.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tbjax import room
from tbjax.config import LayerKind, ModelConfig
from tbjax.mesh import AXES
from tbjax.pipeline.grid import lay_out
from tbjax.pipeline.schedule import named
from tbjax.planner.compilers import Compiler
from tbjax.planner.hlo import Collective, collective
from tbjax.planner.liveness import block_of, heads_on_device
from tbjax.planner.parameters import shards, stage_layers
from tbjax.planner.workload import Layout, Remat, Workload

TP, CP, EP, PP = ("tp",), ("cp",), ("ep",), ("pp",)
BOTH = ("fsdp", "ep")  # over which everything but experts lies in parts


class Message(NamedTuple):
    """A collective, and how often it runs."""

    kind: str  # as HLO names it
    axes: tuple[str, ...]  # of the mesh, outermost first
    size: float
    runs: float = 1.0


def members(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


class Spoken(NamedTuple):
    """The collectives of one layer, for one microbatch."""

    tensor: tuple[Message, ...] = ()
    context: tuple[Message, ...] = ()
    expert: tuple[Message, ...] = ()


def stream(config: ModelConfig, workload: Workload, rows: float, sequence: float, cp: int) -> float:
    """Bytes of the residual stream on one device."""
    return rows * sequence / cp * config.embed * workload.compute_bytes


def layer(
    config: ModelConfig,
    workload: Workload,
    rows: float,
    sequence: int,
    *,
    tp: int,
    cp: int,
    ep: int,
    sequence_parallel: bool,
    remat: Remat | None,
    prunes: bool = True,
    joins: bool = True,
) -> Spoken:
    """An average layer: in training forwards, again and backwards; with no `remat`, forwards, without what attention
    to a cut cache sends (`joined`).

    `prunes` says that what is computed again leaves out what the backward pass does not ask for; `joins`, that the
    gradients by all matrices that lead into a block are added up before they are summed over devices.
    """
    size = stream(config, workload, rows, sequence, cp)
    sparse = sum(kind.sparse for kind in config.layer_kinds) / config.layers
    # Two blocks, each a collective before (sequence parallel: a gather) and one after (a scatter; without, a reduction
    # that is both at once) forwards and backwards. Recomputation runs them again as far as it goes.
    gathers, scatters = (2.0, 2.0) if remat is None else (6.0, 4.0)  # the cut inputs are gathered again backwards
    if remat is not None and not joins:
        scatters += 2.0 + config.gated_mlp
    if remat in ("full", "stage"):
        scatters += 1.0 if prunes else 2.0
    if remat == "stage":  # forwards once more
        gathers, scatters = gathers + 2, scatters + 2
    if sequence_parallel:
        tensor = (Message("all-gather", TP, size, gathers), Message("reduce-scatter", TP, size, scatters))
    else:
        # Experts reduce the tokens of all their ep peers: half of the reductions, in layers that have experts.
        tensor = (
            Message("all-reduce", TP, size, scatters * (1 - sparse / 2)),
            Message("all-reduce", TP, ep * size, scatters * sparse / 2),
        )
    keys = 2 * rows * sequence * -(-config.kv_heads // tp) * config.head_dim * workload.compute_bytes
    # Keys and values go round forwards, again, and backwards, where their gradients go round as well.
    rounds = 0.0 if remat is None else {"none": 3.0, "stage": 5.0}.get(remat, 4.0)
    # Tokens are gathered from the ep peers and their results scattered back; backwards the other way round.
    gathers, scatters = (1.0, 1.0) if remat is None else (2.0 if remat == "none" else 3.0, 2.0)
    if remat == "stage":
        gathers, scatters = gathers + 1, scatters + 1
    return Spoken(
        _said(tensor, {"tp": tp}),
        _said((Message("all-gather", CP, keys, rounds),), {"cp": cp}),
        _said(
            (
                Message("all-gather", EP, ep * size, sparse * gathers),
                Message("reduce-scatter", EP, ep * size, sparse * scatters),
            ),
            {"ep": ep},
        ),
    )


def joined(
    config: ModelConfig, workload: Workload, rows: int, sequence: int, *, tp: int, cp: int, pp: int = 1
) -> tuple[Message, ...]:
    """In serving, the attention of an average layer to a cache whose tokens are cut over cp, and over tp where that has
    more devices than there are key-value heads (`tbjax.layers.ring`).

    Every device must have all queries, keys and values of the tokens that are read at once. What it finds in its part
    is joined, a block of queries at a time, by three reductions: of the largest scores and the sums of the weights, in
    float32, and of the values.
    """
    whole, sizes = room.heads_are_whole(config, tp), {"tp": tp, "cp": cp}
    if whole:
        heads, kv_heads = config.heads, config.kv_heads
    else:
        heads, kv_heads = heads_on_device(config.heads, config.kv_heads, tp)
    over = CP + TP if whole else CP
    at_once = room.tokens_at_once(config, rows, sequence, pp=pp) if sequence > 1 else 1
    chunks = math.ceil(sequence / at_once)
    head = rows * at_once * config.head_dim * workload.compute_bytes  # of all tokens that are read at once
    # A single token is known to all of cp.
    gathered = over if at_once > 1 else TP if whole else ()
    found = [Message("all-gather", gathered, count * head, chunks) for count in (heads, kv_heads, kv_heads)]
    for kind in dict.fromkeys(config.layer_kinds):
        runs = chunks * config.layer_kinds.count(kind) / config.layers
        keys = met(config, workload, kind, rows, sequence, pp)
        blocks = math.ceil(at_once / block_of(at_once, keys, rows * heads))
        numbers = 4 * rows * at_once * heads / blocks
        found += [
            Message("all-reduce", over, size, blocks * runs) for size in (numbers, numbers, heads * head / blocks)
        ]
    return _said(found, sizes)


def met(config: ModelConfig, workload: Workload, kind: LayerKind, rows: int, sequence: int, pp: int) -> int:
    """Keys that each query is multiplied with in serving: all that the layer's cache has room for, or, of prompts that
    are read at once into a cache of their own, all of those. Stages read them into the cache that lasts."""
    at_once = room.tokens_at_once(config, rows, sequence, pp=pp) if sequence > 1 else 1
    staged = room.in_stages(config, pp)
    if at_once == sequence > 1 and not staged:
        return sequence
    return room.slots(None if staged else kind.window, workload.seq_len, at_once)


def ends(
    config: ModelConfig,
    workload: Workload,
    rows: float,
    sequence: int,
    *,
    tp: int,
    cp: int,
    sequence_parallel: bool = False,
) -> tuple[Message, ...]:
    """The ends of the model, whose vocabulary is cut over tp."""
    size = stream(config, workload, rows, sequence, cp)
    if not sequence_parallel:
        # What was looked up is summed, and in training the gradient of what the head was given.
        return _said((Message("all-reduce", TP, size, 2.0 if workload.training else 1.0),), {"tp": tp})
    # Devices have different tokens: their states are gathered for the head and the gradient scattered, and for the
    # lookup the table comes to the tokens, and its gradient is scattered in float32.
    table = config.padded_vocab * config.embed
    found = (
        Message("all-gather", TP, size),
        Message("reduce-scatter", TP, size),
        Message("all-gather", TP, table * workload.compute_bytes),
        Message("reduce-scatter", TP, table * 4),
    )
    return _said(found, {"tp": tp})


class Weights(NamedTuple):
    """FSDP's collectives, for one microbatch."""

    layer: tuple[Message, ...]
    ends: tuple[Message, ...]


def weights(
    config: ModelConfig, size: int, fsdp: int, ep: int, tp: int, remat: Remat, *, piped: bool = False
) -> Weights:
    """In training: weights are gathered forwards and backwards, their gradients scattered, `size` bytes an element."""
    gathers = 3.0 if remat == "stage" else 2.0
    layer = [
        told
        for said in apart(config, size, fsdp, ep, tp)
        for message in said
        for told in (message._replace(runs=gathers), message._replace(kind="reduce-scatter"))
    ]
    table = config.padded_vocab * config.embed / tp
    # For the lookup's gradient see `gradients`. In a pipeline rows are looked up where they lie, and their gradient is
    # scattered like any other.
    ends = (
        Message("all-gather", BOTH, table * size, 1.0 if piped else 2.0),
        Message("reduce-scatter", BOTH, table * size, 2.0 if piped else 1.0),
    )
    return Weights(tuple(layer), _said(ends, {"fsdp": fsdp, "ep": ep}))


def apart(
    config: ModelConfig, size: int, fsdp: int, ep: int, tp: int
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """One gathering of an average layer's weights, which lie in parts over fsdp and ep; of the experts' apart."""
    dense = experts = 0.0
    for shard in shards(config, Layout(fsdp=fsdp, ep=ep, tp=tp), cut=False):
        if shard.stacked:
            if "ep" in shard.axes:
                experts += size * shard.local / config.layers
            else:
                dense += size * shard.local / config.layers
    sizes = {"fsdp": fsdp, "ep": ep}
    # Over ep and fsdp lies everything but the experts, which ep has cut already.
    return _said((Message("all-gather", BOTH, dense),), sizes), _said(
        (Message("all-gather", ("fsdp",), experts),), sizes
    )


class Sums(NamedTuple):
    """The sums of gradients over devices that hold the same parameters."""

    lookup: tuple[Message, ...]  # in float32, and whole: what a device keeps of it is cut out afterwards
    others: tuple[Message, ...]


def gradients(
    config: ModelConfig, size: int, *, pp: int, dp: int, fsdp: int, ep: int, cp: int, tp: int, cut: bool
) -> Sums:
    """The sum over the devices that hold the same parameters: once a step, `size` bytes an element.

    `cut` says that fsdp and ep hold different ones; otherwise all but experts are held by all of them.
    """
    table = config.padded_vocab * config.embed / tp
    dense, experts = -size * table / (fsdp * ep if cut else 1) * (not config.tie_embeddings), 0.0
    for shard in shards(config, Layout(pp=pp, fsdp=fsdp, ep=ep, tp=tp), cut=cut):
        if "ep" in shard.axes and not cut:
            experts += size * shard.local
        else:
            dense += size * shard.local
    sizes = {"dp": dp, "fsdp": fsdp, "ep": ep, "cp": cp}
    whole = ("dp", "fsdp", "ep", "cp")
    if cut:
        found = Message("all-reduce", CP, dense), Message("all-reduce", ("dp",), dense)
    else:
        apart = Message("all-reduce", CP, experts), Message("all-reduce", ("dp", "fsdp"), experts)
        found = Message("all-reduce", whole, dense), *apart
    return Sums(_said((Message("all-reduce", whole, 4 * table),), sizes), _said(found, sizes))


def step(config: ModelConfig, workload: Workload, layout: Layout, compiler: Compiler = "cuda") -> tuple[Message, ...]:
    """All of a training step on one device: on the fullest stage of a pipeline, and with both ends of the model.

    XLA for CPUs sums more than the other compilers: the gradient by each matrix on its own, and whole where a device
    keeps a part.
    """
    plain = compiler == "cpu"
    m, layers = layout.microbatches, stage_layers(config, layout.pp, layout.pieces)
    sizes: dict[str, Any] = dict(layout.mesh)
    rows, sequence, size = layout.rows(workload), workload.seq_len, workload.compute_bytes
    parallel, cut = layout.sequence_parallel, layout.strategy.cuts_parameters
    over = {axis: sizes[axis] for axis in ("tp", "cp", "ep")}
    said = layer(
        config, workload, rows, sequence, **over, sequence_parallel=parallel, remat=layout.remat, joins=not plain
    )
    found = [message for part in said for message in _times(part, m * layers)]
    found += _times(ends(config, workload, rows, sequence, tp=layout.tp, cp=layout.cp, sequence_parallel=parallel), m)
    if cut:
        gathered = weights(config, size, layout.fsdp, layout.ep, layout.tp, layout.remat, piped=layout.pp > 1)
        found += [*_times(gathered.layer, m * layers), *_times(gathered.ends, m)]
    sums = gradients(config, size, **sizes, cut=cut)
    if layout.pp > 1:
        found += sums.others
    else:
        # Each microbatch's gradients are summed over the devices, and then over the microbatches; the lookup's only if
        # fsdp cuts it.
        found += [*_times(sums.others, m), *_times(sums.lookup, m if cut else 1)]
    if layout.strategy.cuts_optimizer and not cut:
        # Each device updates a part of the parameters, and all get the whole of them.
        held = sum(shard.local for shard in shards(config, layout, cut=False))
        found.append(Message("all-gather", BOTH, workload.parameter_bytes * held))
    if layout.pp > 1:
        found += _between_stages(config, workload, layout)
    if plain:
        found = [each._replace(kind="all-reduce") if each.kind == "reduce-scatter" else each for each in found]
    return _said(found, sizes)


def _between_stages(config: ModelConfig, workload: Workload, layout: Layout) -> Iterator[Message]:
    """A pipeline's own: activations and gradients from stage to stage, and the sum of the ends' gradients."""
    saves = layout.remat != "stage"
    grid = lay_out(named(layout.schedule, layout.chunks), layout.pp, layout.microbatches, saves=saves)
    hop = stream(config, workload, layout.rows(workload), workload.seq_len, layout.cp)
    if layout.sequence_parallel:
        hop /= layout.tp
    # In every tick each stage sends, whatever it did: in one direction, or in both.
    yield Message("collective-permute", PP, hop, grid.ticks * (bool(grid.down) + bool(grid.up)))
    # Every stage has the ends, in float32 and cut as their gradients are.
    cut = layout.strategy.cuts_gradients
    yield Message(
        "all-reduce",
        PP,
        4.0 * sum(shard.local for shard in shards(config, layout, cut=cut) if not shard.stacked),
    )


def collectives(
    config: ModelConfig, workload: Workload, layout: Layout, compiler: Compiler = "cuda"
) -> tuple[Collective, ...]:
    """All of a training step, as what a compiler made of it is written."""
    runs: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    volumes: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for kind, axes, size, count in step(config, workload, layout, compiler):
        runs[kind, axes] += count
        volumes[kind, axes] += count * size
    return tuple(collective(*key, runs[key], volumes[key], layout.mesh) for key in sorted(runs))


def _times(messages: Iterable[Message], times: float) -> Iterator[Message]:
    return (message._replace(runs=message.runs * times) for message in messages)


def _said(messages: Iterable[Message], sizes: Mapping[str, int]) -> tuple[Message, ...]:
    """Those that say anything, over axes that have more than one device."""
    return tuple(
        message._replace(axes=tuple(axis for axis in AXES if axis in message.axes and sizes[axis] > 1))
        for message in messages
        if message.size and message.runs and members(message.axes, sizes) > 1
    )
