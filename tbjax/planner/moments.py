"""The moments at which a program's memory can peak, with the bytes that are alive at each: see `memory`."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from tbjax import room
from tbjax.config import ModelConfig
from tbjax.planner import liveness
from tbjax.planner.device import Hardware
from tbjax.planner.flight import activations_in_flight, arrivals_in_flight
from tbjax.planner.liveness import Compiler, Layer, Live
from tbjax.planner.parameters import TILE, Shard, bytes_per_device, shards, stage_layers
from tbjax.planner.workload import Layout, Optimizer, Workload
from tbjax.sharding import STATIONARY_SHARE, ShardingStrategy

# Float32 logits that the loss computes at once on a device (`tbjax.training.loss.CHUNK_BYTES`).
LOGITS_CHUNK = 128 * 2**20

# A TPU's lanes: what lies in its memory with a head's elements last takes a multiple of them.
LANES = 128

# Whole copies of one layer's matrices that the Newton-Schulz iteration of muon, run layer by layer, has at once.
MUON_COPIES = 3.5

# What remat="none" keeps inside the two norms of a layer, in arrays of bfloat16 (one of float32 is as large as two). A
# norm casts what it takes to float32, and scales that. libtpu keeps the former as it came, which for the first norm is
# the layer's input, and kept anyway.
NORM_ARRAYS: Mapping[Compiler, int] = {"nvidia": 8, "google": 5, "cpu": 8, "cpu, bfloat16": 8}

Parts: TypeAlias = dict[str, float]


class Moments(NamedTuple):
    """Bytes by part."""

    throughout: Parts  # at every moment, unless the moment says otherwise
    moments: list[tuple[str, Parts]]
    host: float = 0


class Step(NamedTuple):
    """What is to be priced, with the sizes that every part of it asks for."""

    config: ModelConfig
    workload: Workload
    layout: Layout
    hardware: Hardware
    compiler: Compiler
    kinds: tuple[Layer, ...]
    layers: float  # of the fullest stage
    rows: int  # sequences of a microbatch on a device
    tokens: int
    compute: int  # bytes of an activation, as the compiler keeps it
    table: int  # elements of the vocabulary's table in use

    @classmethod
    def make(cls, config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware, length: int) -> "Step":
        rows = layout.rows(workload)
        pieces = layout.pieces if workload.training else 1
        kinds, layers = _stage(config, layout.tp, layout.ep, layout.sequence_parallel, layout.pp, pieces)
        return cls(
            config,
            workload,
            layout,
            hardware,
            liveness.compiler(hardware.vendor, workload.compute_bytes),
            kinds,
            layers,
            rows,
            rows * -(-length // layout.cp),
            4 if hardware.vendor == "cpu" else workload.compute_bytes,  # a CPU has no other floating point
            config.padded_vocab // layout.tp * config.embed,
        )

    @property
    def gathers(self) -> bool:
        """Whether weights lie in parts that are brought together where they are used."""
        return self.layout.strategy.cuts_parameters and self.layout.fsdp * self.layout.ep > 1

    @property
    def fused(self) -> bool:
        """Whether attention is a kernel that keeps no scores."""
        return liveness.is_fused(self.config, self.workload, self.layout, self.hardware)

    @property
    def narrow(self) -> bool:
        """Whether a device's part of a row is less than a TPU's tile is wide."""
        width = self.config.embed // (self.layout.fsdp * self.layout.ep)
        return self.compiler == "google" and self.gathers and width < TILE[1]


@functools.lru_cache(maxsize=16384)
def _stage(
    config: ModelConfig, tp: int, ep: int, sequence_parallel: bool, stages: int, pieces: int
) -> tuple[tuple[Layer, ...], int]:
    """The kinds of layers, and how many of all kinds the fullest stage has."""
    return liveness.layers(config, tp, ep, sequence_parallel), stage_layers(config, stages, pieces)


class Weights(NamedTuple):
    """Elements on one device, of parameters and of what belongs to them."""

    held: int  # parameters
    stacked: int  # of them, those in stacks of layers
    stacked_tiled: int  # as a TPU stores what it computes
    matrices: int  # of the whole model: matrices in stacks
    tables_tiled: int  # embedding and head, as a TPU stores what it computes
    largest: int  # tensor
    gradients: int
    gradient_stacks: int
    gradient_stacks_tiled: int
    parts: int  # parameters that the optimizer works on
    state: int


@functools.lru_cache(maxsize=16384)
def _weights(
    config: ModelConfig, optimizer: Optimizer, strategy: ShardingStrategy, pp: int, fsdp: int, ep: int, tp: int
) -> Weights:
    layout = Layout(pp=pp, fsdp=fsdp, ep=ep, tp=tp, strategy=strategy)
    held = shards(config, layout)
    # What ZeRO-2 cuts of gradients it cuts when all of them are there.
    gradients = shards(config, layout, cut=strategy.cuts_parameters)
    parts = shards(config, layout, cut=strategy.cuts_optimizer)
    return Weights(
        held=_local(held),
        stacked=sum(shard.local for shard in held if shard.stacked),
        stacked_tiled=sum(shard.tiled for shard in held if shard.stacked),
        matrices=sum(shard.elements for shard in held if shard.stacked and shard.matrix),
        tables_tiled=sum(shard.tiled for shard in held if shard.matrix and not shard.stacked),
        largest=max(shard.largest for shard in held),
        gradients=_local(gradients),
        gradient_stacks=sum(shard.local for shard in gradients if shard.stacked),
        gradient_stacks_tiled=sum(shard.tiled for shard in gradients if shard.stacked),
        parts=_local(parts),
        state=sum(_state(optimizer, shard) for shard in parts),
    )


# Training.


def of_training(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Moments:
    step = Step.make(config, workload, layout, hardware, workload.seq_len)
    stored, strategy = workload.parameter_bytes, layout.strategy
    weights = _weights(config, workload.optimizer, strategy, layout.pp, layout.fsdp, layout.ep, layout.tp)
    state = stored * weights.state
    saved = _saved_bytes(step)

    host = 0.0
    if "optimizer" in layout.offload:
        host += state
        state /= step.layers  # one layer's part is on the device while it is updated
    if "activations" in layout.offload:
        host += saved
        saved *= 2 / step.layers  # one layer's on its way out or in, and the one that is computed with

    summed = stacks = 0.0
    if layout.pp > 1:
        # A pipeline adds each layer's gradient to the sums as soon as it is there, in float32.
        summed = 4 * weights.gradients
    else:
        tiled = step.compiler == "google"
        stacks = stored * (weights.gradient_stacks_tiled if tiled else weights.gradient_stacks)
        summed = stored * weights.gradients if layout.microbatches > 1 else 0
    throughout: Parts = {
        "parameters": stored * weights.held,
        "optimizer": state,
        "batch": step.tokens * (8 * layout.microbatches + 4 * config.head_dim),  # tokens, targets; rope's angles
        "gradients": summed,
        "arriving activations": _arrivals(step) * step.tokens * step.compute * config.embed,
    }
    layers: Parts = {"gradients": summed + stacks, "saved activations": saved}  # until the backward pass has ended
    if step.compiler == "google" and step.compute < stored:
        # The casts of all layers' weights are taken out of the loops over layers.
        layers["cast weights"] = step.compute * weights.stacked_tiled
    if step.narrow:
        # Tables so narrow are given with their rows innermost, and turned, as is what the optimizer has of them.
        throughout["turned tables"] = stored * weights.tables_tiled * (1 + weights.state / weights.parts)

    # The head's gradient waits for the update, in the precision that it was computed in.
    head = step.table * step.compute / (layout.fsdp * layout.ep if strategy.cuts_gradients else 1)
    # XLA for CPUs allocates the stacks of gradients before the loss, the others after it.
    before = layers if hardware.vendor == "cpu" else {**layers, "gradients": summed}
    found = [("loss", {**before, **_loss(step)})]
    for kind in step.kinds:
        for name, alive in _backward(step, kind):
            found.append((f"backward of {name}", {**layers, "head": head, **alive}))
    embedding = {"gradients": summed + stacks, "head": head, "embedding": step.table * (4 + step.compute)}
    found.append(("embedding", embedding))
    if strategy.cuts_optimizer and not strategy.cuts_parameters:
        update = {"gradients": summed or stored * weights.parts}
        update["new parameters"] = stored * (weights.parts + weights.largest)
        found.append(("update", update))
    if workload.optimizer == "muon":
        # The matrices of a layer are orthogonalised whole, so that they are brought together on every device.
        whole = MUON_COPIES * weights.matrices / (config.layers * layout.tp)
        update = {"gradients": stored * weights.held, "orthogonalisation": stored * whole}
        found.append(("update", update))
    return Moments(throughout, found, host)


def _local(found: tuple[Shard, ...]) -> int:
    return sum(shard.local for shard in found)


def _state(optimizer: Optimizer, shard: Shard) -> int:
    """Elements of optimizer state for parameters of one kind, on one device."""
    match optimizer:
        case "adamw":
            return 2 * shard.local
        case "adafactor":
            return 0 if shard.matrix else shard.local  # rows and columns of a matrix: nothing beside it
        case "muon":
            return shard.local if shard.matrix and shard.stacked else 2 * shard.local  # AdamW for tables and norms
        case _:
            return shard.local


def _arrivals(step: Step) -> int:
    """Slots of a stage for what arrives."""
    layout, waiting = step.layout, step.layout.remat == "stage"
    return arrivals_in_flight(layout.schedule, layout.pp, layout.microbatches, layout.chunks, waiting=waiting)


def _saved_bytes(step: Step) -> float:
    """What forward passes leave for backward passes, on the stage that holds most."""
    layout = step.layout
    flight = activations_in_flight(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    held = flight * sum(kind.repeats * _saved(kind, step) for kind in step.kinds)
    if layout.remat == "stage":
        # Nothing besides what has arrived; but a backward pass begins with a forward pass of its piece, and has the
        # inputs of its layers.
        held /= flight * layout.pieces
    if layout.pp > 1 and layout.schedule.startswith("zb"):
        # From a gradient of the input until that of the weights, the two factors of every weight's gradient are kept,
        # one of them in the place of the layer's input.
        held += flight * sum(kind.repeats * (_factors(kind) - kind.residual) for kind in step.kinds)
    return step.layers / step.config.layers * step.tokens * step.compute * held


def _saved(layer: Layer, step: Step) -> int:
    """Elements of one token that a layer's forward pass leaves for its backward pass."""
    remat = step.layout.remat
    if remat in ("full", "stage"):
        return layer.residual
    if remat == "dots":
        # Of the attention's output projection, which the second norm of a block takes up, unless its two halves stand
        # side by side; and, where a norm follows, of the feed-forward layer's.
        outwards = layer.residual * ((step.config.block == "sequential") + layer.post_norm)
        inner = 0 if layer.experts else layer.inner  # ragged matmuls are not among them
        return layer.residual + layer.queries + 2 * layer.keys + outwards + layer.router + inner
    # What is inside both norms and what they gave, which is kept as it lies cut: gathering it is done again. What
    # attention took and gave, splash attention's also with the heads in front and each head in whole lanes; for each
    # matrix into the feed-forward layer its result and two factors of its gradient.
    norms = layer.residual * (NORM_ARRAYS[step.compiler] + 2)
    attention = 2 * layer.queries + 2 * layer.keys
    if step.compiler == "google" and step.fused:
        head = step.config.head_dim
        attention = (3 * layer.queries + 2 * layer.keys) * (-(-head // LANES) * LANES) // head
    inner = layer.copies * (3 * layer.inner + (2 * layer.embed if layer.experts else 0))
    return layer.residual + norms + attention + layer.router + inner


def _factors(layer: Layer) -> int:
    """Elements of one token from which the gradients of a layer's matrices are made."""
    streams = 4 * layer.embed  # what the projections take, and the gradients of what they hand on
    return streams + 2 * layer.queries + 2 * layer.keys + layer.copies * (layer.inner + layer.inner // layer.matrices)


def _loss(step: Step) -> Parts:
    """The head's table as it is used, its gradient's sum in float32, a chunk of logits, states and their gradient."""
    vocabulary = step.config.padded_vocab // step.layout.tp
    chunks = max(1, math.ceil(4 * step.tokens * vocabulary / LOGITS_CHUNK))
    logits = math.ceil(step.tokens / chunks) * vocabulary
    if step.hardware.vendor == "cpu":
        # The sum so far, the new part of it and the table, all in float32; the zeros that it starts from, too, if they
        # are not cut over devices. Where the program has bfloat16, the table in that as well.
        head = 4 * (3 if step.gathers else 4) + (2 if step.compiler == "cpu, bfloat16" else 0)
        logits *= 4
    else:
        head = 4 + step.compute * (step.gathers or step.compute < step.workload.parameter_bytes)
        logits *= 4 + step.compute
        turned = step.narrow or (step.compiler == "nvidia" and step.gathers)
        if turned and step.table * step.compute > logits:
            # As it is gathered, and as the matmul takes it. The first is gone once there are logits, unless tp cuts it.
            head, logits = head + step.compute, logits if step.layout.tp > 1 else 0
    states = 2 * step.tokens * step.config.embed * step.compute
    return {"head": step.table * head, "logits": logits, "working set": states}


def _backward(step: Step, layer: Layer) -> Iterator[tuple[str, Parts]]:
    """What a layer has alive in its backward pass: at the gradients of its feed-forward part, and of its attention."""
    layout, compiler = step.layout, step.compiler
    sequence = step.tokens // step.rows
    band = sequence if layout.cp > 1 else liveness.band_of(sequence)
    bands = -(-sequence // band)
    block = liveness.block_of(band, step.workload.seq_len, step.rows * layer.heads * bands)
    scores = step.rows * layer.heads * block * step.workload.seq_len
    fused = step.fused
    attention = liveness.FUSED if fused else liveness.ATTENTION[compiler]
    feed_forward = liveness.FEED_FORWARD[compiler]
    if layout.tp > 1:
        feed_forward = feed_forward._replace(embed=feed_forward.embed + liveness.REDUCED[compiler])
    if fused or block < band:
        feed_forward = feed_forward._replace(scores=0)

    weights = 0.0
    if layout.pp > 1:
        weights += layer.weights * step.workload.parameter_bytes  # a stage takes a layer's weights out of its stack
    if step.gathers:
        # All of a layer's weights but the first that the backward pass has done with.
        weights += (layer.weights - (0 if layer.experts else layer.outwards)) * step.compute
    # A block of each band at once; the first of four bands meets a quarter of the keys, the last all of them. A single
    # device, which waits for no other, gets to the bands later.
    at_once = (bands + 1) / 2
    for name, live, blocks in (
        ("feed-forward", feed_forward, 1 if layout.devices == 1 else at_once),
        ("attention", attention, at_once),
    ):
        alive = step.tokens * step.compute * _width(layer, live, layout, compiler)
        of_scores = blocks * scores * (4 * live.scores + step.compute) if live.scores else 0
        yield name, {"working set": alive, "scores": of_scores, "gathered weights": weights}


def _width(layer: Layer, live: Live, layout: Layout, compiler: Compiler) -> float:
    """Elements a token that are alive."""
    embed = live.embed * layer.embed
    if layout.sequence_parallel:
        whole = min(live.embed, liveness.GATHERED[compiler])
        embed = whole * layer.embed + (live.embed - whole) * layer.residual
    width = embed + live.queries * layer.queries + live.keys * layer.keys
    if not layer.experts:
        return width + live.inner * layer.inner
    if compiler != "nvidia":
        return width + layer.copies * (live.inner * layer.inner + live.rows * layer.embed)
    # XLA for NVIDIA has no ragged matmul. It makes a copy of the rows for every expert that the device holds, with
    # zeros in the place of those that are another's, and transposes two of them where there are several.
    spread = layer.experts * (3 if layer.experts == 1 else 5) / layer.matrices
    return width + layer.copies * (spread * layer.inner + (live.rows + 2 * layer.experts) * layer.embed)


# Inference.


def of_inference(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Moments:
    reading = Reading.make(config, workload, layout)
    step = Step.make(config, workload, layout, hardware, reading.chunk)
    compute = workload.compute_bytes
    share = step.layers / config.layers
    weights = _weights(config, "sgd", layout.strategy, layout.pp, layout.fsdp, layout.ep, layout.tp)

    def caches(slots: Callable[[Layer], int]) -> float:
        return share * compute * step.rows * sum(kind.repeats * kind.cached * slots(kind) for kind in step.kinds)

    lasting = caches(reading.lasting)
    throughout: Parts = {
        "parameters": bytes_per_device(config, layout, workload.parameter_bytes, workload.quantization),
        "KV cache": lasting,
    }
    head = 0
    if step.compiler == "cpu, bfloat16":
        # XLA for CPUs casts all weights before the loop over layers, and the head's three times over.
        head = 4 * step.table
        throughout["cast weights"] = head + 4 * weights.stacked
    found: list[tuple[str, Parts]] = []
    prompts: Parts = {}
    if reading.at_once:
        # Prompts that are read at once have a cache of their own, with all of them also where windows see less. What
        # decoding gets is made of it in the end; its place is free until then.
        own = caches(reading.slots)
        prompts = {"KV cache of prompts": max(own - lasting, 0)}
        found.append(("prefill, cache", {"KV cache of prompts": own}))
    if step.gathers and workload.global_batch * reading.chunk > STATIONARY_SHARE * config.padded_vocab:
        # So many rows are looked up that the table is brought to the tokens.
        found.append(("prefill, lookup", prompts | {"gathered weights": step.table * compute}))
    for kind in step.kinds:
        # Of one layer, read out of the whole.
        found.append(("decode", {"working set": _of_layer(step, kind, reading.lasting(kind)), "head": 2 * head}))
        found += [(f"prefill, {name}", prompts | alive) for name, alive in _reading(step, kind, reading)]
    return Moments(throughout, found)


class Reading(NamedTuple):
    """How prompts are read, and how many tokens of a row a device's caches have, as `tbjax.layers.cache` has them."""

    length: int  # of a prompt
    chunk: int  # tokens of a row that are read at once
    capacity: int
    cut: int  # parts that devices have of a cache's tokens
    keeps_rings: bool

    @classmethod
    def make(cls, config: ModelConfig, workload: Workload, layout: Layout) -> "Reading":
        length, staged = max(workload.prompt_len, 1), room.in_stages(config, layout.pp)
        chunk = room.tokens_at_once(config, layout.rows(workload), length, pp=layout.pp)
        cut = room.parts(config, tp=layout.tp, cp=layout.cp)
        return cls(length, chunk, room.slots(None, workload.seq_len, chunk, cut), cut, not staged)

    @property
    def at_once(self) -> bool:
        """Whether prompts have a cache of their own while they are read. Stages of a pipeline fill the lasting one."""
        return self.chunk == self.length and self.keeps_rings

    def lasting(self, kind: Layer) -> int:
        """Tokens of the cache that decoding goes on with. Rings of prompts read at once get single tokens."""
        return self._kept(kind, self.capacity, 1 if self.chunk == self.length else self.chunk)

    def slots(self, kind: Layer) -> int:
        """Tokens of the cache that prompts are read into."""
        return self._kept(kind, self.length, self.length) if self.at_once else self.lasting(kind)

    def _kept(self, kind: Layer, capacity: int, written: int) -> int:
        return room.slots(kind.window if self.keeps_rings else None, capacity, written, self.cut) // self.cut


def _of_layer(step: Step, kind: Layer, slots: int) -> float:
    """Keys and values of one layer, out of a cache of so many tokens of a row."""
    return step.rows * step.workload.compute_bytes * kind.cached * slots


def _reading(step: Step, kind: Layer, reading: Reading) -> Iterator[tuple[str, Parts]]:
    """What a layer has alive while a chunk of the prompts is read: at its scores, where queries are gathered, and in
    its feed-forward part."""
    config, layout, compute = step.config, step.layout, step.workload.compute_bytes
    slots, read = reading.slots(kind), step.rows * reading.chunk
    cache = _of_layer(step, kind, slots)
    # Beside attention stands the residual stream alone. Over cp, all devices have all queries of the chunk, and what
    # each found in its part of the keys; so they have over tp, of all heads, where that cuts a cache's tokens.
    queries, keys, heads = kind.queries, kind.keys, kind.heads
    if room.heads_are_whole(config, layout.tp):
        queries, keys, heads = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.heads
    attention = compute * (step.tokens * kind.embed + read * 2 * (queries + keys))
    block = liveness.block_of(reading.chunk, slots * reading.cut, step.rows * heads)
    # In float32 and, on their way to the product with values, as activations are: on TPU within that product.
    scores = step.rows * heads * block * slots * (4 if step.compiler == "google" else 4 + compute)
    yield "attention", {"working set": cache + attention, "scores": scores}
    if reading.cut > 1:
        # Before there are scores, the queries as they were gathered, in blocks, and the room for what those find.
        yield "gathering", {"working set": cache + attention + compute * read * queries}
    # The residual stream, its normed copy and, over tp, the sum of partial results, which TPUs reduce where they lie.
    stream = (3 if layout.tp > 1 and step.compiler != "google" else 2) * kind.embed
    inner = kind.inner + kind.queries
    if kind.experts:
        spread = kind.experts if step.compiler == "nvidia" else 1
        inner = kind.copies * (kind.inner + spread * kind.inner // kind.matrices)
    # What is quantised is gathered as it is.
    each = step.workload.layer_bytes if step.workload.quantization else compute
    gathered = (kind.weights - kind.outwards) * each if step.gathers else 0
    feed_forward = cache + step.tokens * compute * (stream + inner)
    yield "feed-forward", {"working set": feed_forward, "gathered weights": gathered}
