"""Bytes that one device holds at the worst moment of a step, by part, as the compilers of the vendors lay them out.

A step has few moments at which memory can peak, and each has its own set of living arrays:

    loss       activations kept for the backward pass, one chunk of logits, the head's weight and its gradient
    backward   those activations, the gradients of all layers (one stack, written layer by layer), and everything that
               computing one layer again and differentiating it needs at once
    update     gradients, the optimizer's state and what it computes from them

Parameters and optimizer state are there throughout. The largest moment is what a device must have room for, and its
parts are what `memory` returns; so the parts always sum to the total.

Everything is arithmetic on sizes: no arrays, no model. What depends on the model and a few degrees alone is cached, so
that a search can ask for tens of thousands of layouts.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.device import Hardware
from tbjax.planner.parameters import Shard, elements_per_device, layer_tensors, shards
from tbjax.planner.workload import Layout, Schedule, Workload

# Float32 logits that the loss computes at once on a device (`tbjax.train.loss.CHUNK_BYTES`).
LOGITS_CHUNK = 128 * 2**20


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
        return _training(config, workload, layout, hardware)
    return _inference(config, workload, layout, hardware)


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


def _training(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Memory:
    rows = layout.rows(workload)
    tokens = rows * -(-workload.seq_len // layout.cp)
    stored = int(workload.parameter_bytes)
    compute = workload.compute_bytes
    strategy = layout.strategy
    sizes = _sizes(config, layout.tp, layout.ep, layout.sequence_parallel)

    held = elements_per_device(config, layout)
    gradient_shards = shards(config, layout, cut=strategy.cuts_gradients)
    gradients = sum(shard.local for shard in gradient_shards) * stored
    if layout.microbatches > 1:
        gradients *= 2  # the sum so far, and this microbatch's
    state_shards = shards(config, layout, cut=strategy.cuts_optimizer)
    state = sum(_state_elements(workload, shard) for shard in state_shards) * stored

    layers = -(-config.layers // layout.pp)
    flight = activations_in_flight(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    saved = layers * tokens * sizes.saved(layout.remat) * compute * flight
    working = tokens * sizes.working * compute + rows * _attention_block(config, layout, workload)
    gathered = sizes.weights * compute if _gathers(layout) else sizes.weights * compute * (compute < stored)
    table = config.padded_vocab // layout.tp * config.embed
    chunk = min(LOGITS_CHUNK, 4 * tokens * config.padded_vocab // layout.tp)
    logits = 2 * chunk + table * (compute + 4)

    host = 0
    if "optimizer" in layout.offload:
        host += state
        state = -(-state // max(layers, 1))  # one layer's part is on the device while it is updated
    if "activations" in layout.offload:
        host += int(saved)
        saved = 2 * saved / layers  # one layer's going out, one coming in
    always = {"parameters": held * stored, "optimizer": state, "saved activations": int(saved)}
    moments = {
        "loss": {"gradients": gradients if layout.microbatches > 1 else 0, "logits and loss": logits},
        "backward": {"gradients": gradients, "working set": int(working), "gathered weights": 2 * gathered},
    }
    return _worst(always, moments, host)


def _inference(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Memory:
    rows = layout.rows(workload)
    compute = workload.compute_bytes
    sizes = _sizes(config, layout.tp, layout.ep, layout.sequence_parallel)
    tokens = rows * -(-workload.prompt_len // layout.cp)
    layers = -(-config.layers // layout.pp)
    cache = layers * rows * -(-workload.seq_len // layout.cp) * 2 * sizes.cached * compute
    working = tokens * sizes.working * compute // 2
    gathered = sizes.weights * compute if _gathers(layout) else 0
    logits = 4 * rows * config.padded_vocab // layout.tp
    always = {"parameters": int(elements_per_device(config, layout) * workload.parameter_bytes), "KV cache": cache}
    moments = {"prefill": {"working set": working, "gathered weights": gathered, "logits": logits}}
    return _worst(always, moments, 0)


def _worst(always: Mapping[str, int], moments: Mapping[str, Mapping[str, int]], host: int) -> Memory:
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {name: size for name, size in {**always, **moments[moment]}.items() if size}
    return Memory(parts, int(host), moment)


def _gathers(layout: Layout) -> bool:
    return layout.strategy.cuts_parameters and layout.fsdp * layout.ep > 1


def _state_elements(workload: Workload, shard: Shard) -> int:
    """Elements of optimizer state for parameters of one kind, on one device."""
    match workload.optimizer:
        case "adamw":
            return 2 * shard.local
        case "adafactor":
            return 0 if shard.matrix else shard.local
        case _:
            return shard.local


class _Sizes(NamedTuple):
    """Elements of one layer on one device, the most of any kind of layer: of a token, and of the weights."""

    residual: int
    dots: int
    everything: int
    working: int
    weights: int
    cached: int

    def saved(self, remat: str) -> int:
        return {"full": self.residual, "dots": self.residual + self.dots, "none": self.everything}[remat]


@functools.lru_cache(maxsize=1024)
def _sizes(config: ModelConfig, tp: int, ep: int, sequence_parallel: bool) -> _Sizes:
    kinds = set(config.layer_kinds)
    found = [_layer(config, kind, tp, ep, sequence_parallel) for kind in kinds]
    return _Sizes(*(max(values) for values in zip(*found, strict=True)))


def _layer(config: ModelConfig, kind: LayerKind, tp: int, ep: int, sequence_parallel: bool) -> _Sizes:
    d = config.embed
    residual = d // tp if sequence_parallel else d
    q, kv = -(-config.heads // tp) * config.head_dim, -(-config.kv_heads // tp) * config.head_dim
    if kind.sparse:
        f = config.experts.mlp // tp * config.experts.experts_per_token
        wide = d * config.experts.experts_per_token
    else:
        f, wide = config.mlp // tp, 0
    inner = f * (2 if config.gated_mlp or kind.sparse else 1)
    dots = q + 2 * kv + inner + 2 * residual
    everything = 6 * residual + 3 * q + 4 * kv + 2 * inner + 2 * wide
    working = max(3 * inner + 4 * d + 2 * wide, 4 * q + 4 * kv + 4 * d)
    weights = sum(
        tensor.count
        // math.prod({"experts": ep, "mlp": tp, "heads": tp, "kv_heads": tp}.get(x or "", 1) for x in set(tensor.dims))
        for tensor in layer_tensors(config, kind)
    )
    return _Sizes(residual, dots, everything, working, weights, kv)


def _attention_block(config: ModelConfig, layout: Layout, workload: Workload) -> int:
    """Bytes of the scores that attention has at once for one sequence."""
    heads = -(-config.heads // layout.tp)
    return 4 * heads * min(workload.seq_len, 512) * workload.seq_len
