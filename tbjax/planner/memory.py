"""Bytes that one device holds at the worst moment of a step, by part, as the compilers of the vendors lay them out.

A step has few moments at which memory can peak, and each has its own set of living arrays:

    loss        one chunk of logits, the head's weight and its gradient
    backward    what computing one layer again and differentiating it needs, in its attention or its feed-forward part
    embedding   the gradient of the table, before it is cut
    update      new parameters gathered, where the optimizer works on parts of them

Throughout there are parameters and optimizer state and, until the last layer's backward pass has ended, what the
forward pass saved and the gradients of all layers: one stack for each weight, which exists from the beginning though
it is filled layer by layer. The largest moment is what a device must have room for. Its parts are what `memory`
returns, so parts always sum to the total.

Everything is arithmetic on sizes: no arrays, no model. What depends on the model and a few degrees alone is cached, so
that a search can ask for tens of thousands of layouts.
"""

import dataclasses
import math
from collections.abc import Mapping

from tbjax.config import ModelConfig
from tbjax.planner import liveness
from tbjax.planner.device import Hardware, Vendor
from tbjax.planner.liveness import Compiler, Layer, Live
from tbjax.planner.parameters import Shard, shards
from tbjax.planner.workload import Layout, Schedule, Workload

# Float32 logits that the loss computes at once on a device (`tbjax.train.loss.CHUNK_BYTES`).
LOGITS_CHUNK = 128 * 2**20

# Of what a program computes, the part that is lost between buffers of different sizes.
FRAGMENTATION = 0.01


# Whole copies of each stack of matrices that the Newton-Schulz iteration of optax's muon has at once.
MUON_COPIES = 1.8

# Slots for what arrives at a stage in the interleaved schedule, for up to eight stages.
MOST_TRANSFERS = 5

# What remat="none" keeps inside a norm: two arrays of float32, each as large as two of bfloat16.
NORM_ARRAYS = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device at the moment when they are most, on the pipeline stage that has most."""

    parts: Mapping[str, int]
    host: int = 0  # bytes in the host's memory, of each device
    moment: str = ""  # which moment that is

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Memory:
    """What one device of `hardware` holds when `workload` runs under `layout`."""
    if workload.training:
        return _training(config, workload, layout, hardware.vendor)
    return _inference(config, workload, layout, hardware.vendor)


def activations_in_flight(schedule: Schedule, stages: int, microbatches: int, chunks: int = 1) -> float:
    """Microbatches whose activations a stage holds at once, the most of any stage.

    The closed forms of Narayanan et al. 2021 (GPipe, 1F1B, interleaved) and Qi et al. 2024 (the zero-bubble ones).
    """
    if stages == 1:
        return 1
    match schedule:
        case "gpipe":
            held: float = microbatches
        case "interleaved":
            held = stages * (1 + (stages - 1) / (stages * chunks))
        case "zb-h2":
            held = 2 * stages - 1
        case _:
            held = stages
    return min(held, microbatches)


def transfers_in_flight(schedule: Schedule, stages: int, microbatches: int) -> int:
    """Slots that a stage has for what arrives from its neighbours (`tbjax.pipeline.grid`)."""
    if stages == 1:
        return 0
    return microbatches if schedule == "gpipe" else MOST_TRANSFERS if schedule == "interleaved" else 3


# Training.


def _training(config: ModelConfig, workload: Workload, layout: Layout, vendor: Vendor) -> Memory:
    rows = layout.rows(workload)
    tokens = rows * -(-workload.seq_len // layout.cp)
    stored, compute = int(workload.parameter_bytes), _compute_bytes(workload, vendor)
    strategy = layout.strategy
    kinds = liveness.layers(config, layout.tp, layout.ep, layout.sequence_parallel)
    share = -(-config.layers // layout.pp) / config.layers  # of the layers, on the fullest stage

    held = shards(config, layout)
    gradients = shards(config, layout, cut=strategy.cuts_gradients)
    state = sum(_state(workload, shard) for shard in shards(config, layout, cut=strategy.cuts_optimizer)) * stored
    stacks = sum(shard.tiled if vendor == "google" else shard.local for shard in gradients if shard.stacked) * stored
    accumulated = sum(shard.local for shard in gradients) * stored if layout.microbatches > 1 else 0
    if layout.pp > 1:
        # A pipeline adds each layer's gradient to the sums as soon as it is there, in float32.
        accumulated, stacks = sum(shard.local for shard in gradients) * 4, 0

    flight = activations_in_flight(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    of_microbatch = share * tokens * compute
    saved = flight * of_microbatch * sum(kind.repeats * _saved(kind, layout.remat) for kind in kinds)
    if layout.pp > 1 and layout.schedule.startswith("zb"):
        # From a gradient of the input until that of the weights, the two factors of every weight's gradient are kept.
        saved += flight * of_microbatch * sum(kind.repeats * _factors(kind) for kind in kinds)
    arriving = transfers_in_flight(layout.schedule, layout.pp, layout.microbatches) * tokens * compute * config.embed

    host = 0
    if "optimizer" in layout.offload:
        host += state
        state = math.ceil(state / (config.layers * share))  # one layer's part is on the device while it is updated
    if "activations" in layout.offload:
        host += math.ceil(saved)
        saved *= 2 / (config.layers * share)  # one layer's on its way out or in, and the one that is computed with
    throughout = {
        "parameters": sum(shard.local for shard in held) * stored,
        "optimizer": state,
        "batch": 8 * tokens * layout.microbatches + 4 * tokens * config.head_dim,  # tokens and targets; rope's angles
        "gradients": accumulated,
        "arriving activations": arriving,
    }
    until_embedding = {"gradients": accumulated + stacks, "saved activations": math.ceil(saved)}
    if vendor == "google" and compute < stored:
        # The casts of all layers' weights are taken out of the loops over layers, and stay until the last has ended.
        until_embedding["cast weights"] = sum(shard.tiled for shard in held if shard.stacked) * compute

    table = config.padded_vocab // layout.tp * config.embed
    # XLA for CPUs allocates the stacks of gradients before the loss, the others after it.
    loss = until_embedding if vendor == "cpu" else {**until_embedding, "gradients": accumulated}
    moments = {"loss": {**loss, **_loss(config, workload, layout, vendor, tokens)}}
    cut = layout.fsdp * layout.ep if strategy.cuts_gradients else 1
    head = table // cut * compute  # the head's gradient waits for the update, in the precision that it was summed in
    for kind in kinds:
        for name, live in _moments(kind, workload, layout, vendor, rows).items():
            moments[f"backward of {name}"] = {**until_embedding, "head": head, **live}
    moments["embedding"] = {"gradients": accumulated + stacks, "head": head, "embedding": table * (4 + compute)}
    if strategy.cuts_optimizer and not strategy.cuts_parameters:
        whole = max(shard.largest for shard in held) * stored
        parts = sum(shard.local for shard in shards(config, layout, cut=True)) * stored
        moments["update"] = {"gradients": accumulated or parts, "new parameters": parts + whole}
    if workload.optimizer == "muon":
        # Every stack of matrices is orthogonalised as a whole, so that it is brought together on every device.
        matrices = sum(shard.elements for shard in held if shard.stacked and shard.matrix) // (layout.pp * layout.tp)
        parts = sum(shard.local for shard in held) * stored
        moments["update"] = {"gradients": parts, "orthogonalisation": int(stored * matrices * MUON_COPIES) + parts}
    return _worst(throughout, moments, host)


def _compute_bytes(workload: Workload, vendor: Vendor) -> int:
    """Bytes of an activation as the compiler keeps it: a CPU has no other floating point than float32."""
    return 4 if vendor == "cpu" else workload.compute_bytes


def _state(workload: Workload, shard: Shard) -> int:
    """Elements of optimizer state for parameters of one kind, on one device."""
    match workload.optimizer:
        case "adamw":
            return 2 * shard.local
        case "adafactor":
            return 0 if shard.matrix else shard.local  # rows and columns of a matrix: nothing beside it
        case "muon":
            return shard.local if shard.matrix and shard.stacked else 2 * shard.local  # AdamW for tables and norms
        case _:
            return shard.local


def _saved(layer: Layer, remat: str) -> int:
    """Elements of one token that a layer's forward pass leaves for its backward pass."""
    if remat == "full":
        return layer.residual
    # Of the attention's output projection and, where a norm follows, of the feed-forward layer's.
    outwards = layer.residual * (2 if layer.post_norm else 1)
    matmuls = layer.queries + 2 * layer.keys + outwards + layer.router
    if remat == "dots":
        return layer.residual + matmuls + (0 if layer.experts else layer.inner)
    # What is inside both norms and what they gave; what attention took and gave; for each matrix into the feed-forward
    # layer its result and two factors of its gradient.
    kept = layer.residual * (1 + 2 * NORM_ARRAYS) + layer.embed * 2 + 2 * layer.queries + 2 * layer.keys
    if layer.experts:
        rows = layer.ep * layer.chosen
        return kept + layer.router + rows * (3 * layer.inner + 2 * layer.embed)
    return kept + 3 * layer.inner


def _factors(layer: Layer) -> int:
    """Elements of one token from which the gradients of a layer's matrices are made."""
    streams = 4 * layer.embed  # what the projections take, and the gradients of what they hand on
    inner = layer.inner + layer.inner // layer.matrices
    return streams + 2 * layer.queries + 2 * layer.keys + inner * max(1, layer.ep * layer.chosen)


def _loss(config: ModelConfig, workload: Workload, layout: Layout, vendor: Vendor, tokens: int) -> dict[str, int]:
    """The head's table as it is used, its gradient's sum in float32, a chunk of logits, states and their gradient."""
    vocabulary = config.padded_vocab // layout.tp
    compute = _compute_bytes(workload, vendor)
    chunks = max(1, math.ceil(4 * tokens * vocabulary / LOGITS_CHUNK))
    logits = math.ceil(tokens / chunks) * vocabulary * (4 + compute)
    table, copies = vocabulary * config.embed, int(compute < workload.parameter_bytes)
    if vendor == "cpu":
        # The sum so far, the new part of it and the table, all in float32; the zeros that it starts from, too, if they
        # are not cut over devices. Where the program has bfloat16, the table in that as well.
        whole = 4 * (3 if _gathers(layout) else 4) + (2 if workload.compute_bytes == 2 else 0)
        return {"head": table * whole, "logits": logits // 2, "working set": 2 * tokens * config.embed * compute}
    if _gathers(layout):
        copies = 1
        if vendor == "nvidia" and table * compute > logits:
            # As it is gathered, and as the matmul takes it; the first is gone once there are logits.
            copies, logits = 2, 0
    return {
        "head": table * (4 + compute * copies),
        "logits": logits,
        "working set": 2 * tokens * config.embed * compute,
    }


def _moments(layer: Layer, workload: Workload, layout: Layout, vendor: Vendor, rows: int) -> dict[str, dict[str, int]]:
    """What a layer has alive at each moment of its backward pass."""
    sequence = -(-workload.seq_len // layout.cp)
    tokens, compute = rows * sequence, _compute_bytes(workload, vendor)
    block = liveness.block_of(sequence, workload.seq_len, rows * layer.heads)
    scores = rows * layer.heads * block * workload.seq_len
    whole = block == sequence
    fused = vendor == "nvidia" and compute == 2 and layer.queries // layer.heads <= 128
    compiler = liveness.compiler(vendor, workload.compute_bytes)
    attention = liveness.FUSED if fused else liveness.ATTENTION[compiler]
    feed_forward = liveness.FEED_FORWARD[compiler]
    if layout.tp > 1:
        feed_forward = feed_forward._replace(embed=feed_forward.embed + liveness.REDUCED[compiler])
    if whole and not fused:
        feed_forward = feed_forward._replace(scores=1)

    gathered = 0
    if layout.pp > 1:
        gathered = layer.weights * int(workload.parameter_bytes)  # a stage takes a layer's weights out of its stack
    if _gathers(layout):
        # All of a layer's weights but the first that the backward pass has done with.
        gathered += (layer.weights - (0 if layer.experts else layer.outwards)) * compute
    result = {}
    for name, live in (("feed-forward", feed_forward), ("attention", attention)):
        result[name] = {
            "working set": math.ceil(tokens * compute * _width(layer, live, layout, compiler)),
            "scores": math.ceil(scores * live.scores * (4 + compute / live.scores)) if live.scores else 0,
            "gathered weights": gathered,
        }
    return result


def _width(layer: Layer, live: Live, layout: Layout, compiler: Compiler) -> float:
    """Elements a token that are alive."""
    embed = live.embed * layer.embed
    if layout.sequence_parallel:
        whole = min(live.embed, liveness.GATHERED[compiler])
        embed = whole * layer.embed + (live.embed - whole) * layer.residual
    width = embed + live.queries * layer.queries + live.keys * layer.keys
    if not layer.experts:
        return width + live.inner * layer.inner
    # Tokens of all ep peers are gathered, and each is there once for each of its experts.
    width += layout.ep * layer.chosen * live.rows * layer.embed
    copies = layout.ep * layer.chosen * layer.inner
    if compiler != "nvidia":
        return width + copies * live.inner
    # XLA for NVIDIA has no ragged matmul. It makes a copy of the rows for every expert that the device holds, with
    # zeros in the place of those that are another's, and transposes two of them where there are several.
    spread = layer.experts * (3 if layer.experts == 1 else 5) / layer.matrices
    return width + copies * spread + layout.ep * layer.chosen * 2 * layer.experts * layer.embed


def _gathers(layout: Layout) -> bool:
    """Whether weights lie in parts that are brought together where they are used."""
    return layout.strategy.cuts_parameters and layout.fsdp * layout.ep > 1


def _spread(layer: Layer, vendor: Vendor) -> int:
    """Experts for which XLA for NVIDIA, which has no ragged matmul, makes copies of all rows."""
    return layer.experts if vendor == "nvidia" else 1


# Inference.


def _inference(config: ModelConfig, workload: Workload, layout: Layout, vendor: Vendor) -> Memory:
    rows = layout.rows(workload)
    compute = workload.compute_bytes
    kinds = liveness.layers(config, layout.tp, layout.ep, layout.sequence_parallel)
    share = -(-config.layers // layout.pp) / config.layers
    prompt = -(-workload.prompt_len // layout.cp)
    slots = -(-workload.seq_len // layout.cp)
    cache = math.ceil(share * rows * slots * compute * sum(kind.repeats * kind.cached for kind in kinds))
    of_layer = rows * slots * compute * max(kind.cached for kind in kinds)
    held = shards(config, layout)
    throughout = {
        "parameters": math.ceil(sum(shard.local for shard in held) * workload.parameter_bytes),
        "KV cache": cache,
    }
    head = 0
    if vendor == "cpu" and compute == 2:
        # XLA for CPUs casts all weights before the loop over layers, and the head's three times over.
        head = 4 * config.padded_vocab // layout.tp * config.embed
        throughout["cast weights"] = 4 * sum(shard.local for shard in held if shard.stacked) + head
    moments = {"decode": {"working set": of_layer, "head": 2 * head}}
    tokens = rows * prompt
    for kind in kinds:
        # The residual stream, its normed copy and, over tp, the sum of partial results.
        stream = (3 if layout.tp > 1 else 2) * kind.embed
        inner = kind.inner + kind.queries
        if kind.experts:
            inner = layout.ep * kind.chosen * (kind.inner + _spread(kind, vendor) * kind.inner // kind.matrices)
        moments["prefill, attention"] = {
            "working set": of_layer + tokens * compute * (stream + kind.queries + 2 * kind.keys),
            "scores": rows * kind.heads * liveness.block_of(prompt, slots, rows * kind.heads) * slots * (4 + compute),
        }
        moments["prefill, feed-forward"] = {
            "working set": of_layer + tokens * compute * (stream + inner),
            "gathered weights": (kind.weights - kind.outwards) * compute if _gathers(layout) else 0,
        }
    return _worst(throughout, moments, 0)


def _worst(throughout: Mapping[str, int], moments: Mapping[str, Mapping[str, int]], host: int) -> Memory:
    """The parts at the largest moment; `throughout` is there at every one, unless the moment says otherwise."""
    worst = max(moments, key=lambda name: sum({**throughout, **moments[name]}.values()))
    parts = {**throughout, **moments[worst]}
    computed = sum(size for name, size in parts.items() if name not in ("parameters", "optimizer", "batch", "KV cache"))
    parts["fragmentation"] = int(FRAGMENTATION * computed)
    return Memory({name: size for name, size in parts.items() if size}, int(host), worst)
