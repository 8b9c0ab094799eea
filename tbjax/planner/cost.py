"""How long a step takes, by part.

Products run at a fraction of the device's peak that falls with their smallest dimensions; everything else moves bytes
at a fraction of the memory's bandwidth; each kernel costs a moment, and where the host launches them one by one it may
be the host that everyone waits for. Collectives are priced where their axis lies (`network`), and what a scheduler can
hide behind arithmetic is taken off. A pipeline adds its bubble in closed form.

    a product      FLOPs / (peak x fraction) x (1 + half/(half + rows) + half/columns + half/inner), at least its bytes
    a pass         products + bytes / bandwidth + kernels x gap, at least kernels x host
    a microbatch   passes and collectives of the layers, and of the head, on the slowest stage
    a step         microbatches x microbatch + bubble + what is left of the gradients' sum + optimizer

How a program was written is not a property of the device: a `Stack` holds it, with the few constants that are fitted.
The pieces stand in `prices`; here they are added up.
"""

import dataclasses
import functools
from collections.abc import Mapping

from tbjax.config import ModelConfig
from tbjax.pipeline import schedule as schedules
from tbjax.pipeline.price import price
from tbjax.pipeline.simulate import Times
from tbjax.planner.hardware import Cluster
from tbjax.planner.network import Group
from tbjax.planner.prices import Prices, peak, prices
from tbjax.planner.stack import XLA, Stack
from tbjax.planner.work import forward_flops, training_flops
from tbjax.planner.workload import Layout, Schedule, Workload
from tbjax.sharding import ShardingStrategy


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds, by part; they sum to `total`. Of a training step, or of serving a whole batch of requests."""

    parts: Mapping[str, float]
    total: float
    prefill: float = 0.0  # inference: until the first new token
    decode: float = 0.0  # inference: each new token


def step_time(config: ModelConfig, workload: Workload, layout: Layout, cluster: Cluster, *, stack: Stack = XLA) -> Time:
    """The time of a training step on all of the cluster's devices, or of serving the batch."""
    priced = prices(config, workload, cluster, stack)
    parts, *served = _step(priced, layout) if workload.training else _serve(priced, layout)
    return Time(parts, sum(parts.values()), *served)


def tokens_per_second(time: Time, workload: Workload) -> float:
    """Tokens trained on, or generated, per second by all devices together."""
    tokens = workload.tokens if workload.training else workload.global_batch * max(workload.new_tokens, 1)
    return tokens / time.total


def mfu(time: Time, config: ModelConfig, workload: Workload, cluster: Cluster, *, causal: bool = False) -> float:
    """Model FLOP/s over the devices' peak: recomputation not counted, attention over all pairs unless `causal`."""
    if workload.training:
        flops = training_flops(config, workload, causal=causal)
    else:
        flops = forward_flops(config, workload.seq_len, causal=causal) * workload.tokens
    return flops / time.total / (cluster.devices * peak(cluster, workload))


def bubble_share(layout: Layout, forwards: float, inputs: float, weights: float) -> float:
    """What a pipeline's fill and drain cost, as a share of (stages - 1) microbatches on one stage.

    `forwards`, `inputs` and `weights` are the seconds of a microbatch's forward pass, of the gradient of its input
    (with what is recomputed for it) and of the gradient of its weights. Closed forms of Qi et al. 2024, where there are
    microbatches enough to fill a zero-bubble pipeline; the simulator's answer where there are not.
    """
    schedule, whole = layout.schedule, forwards + inputs + weights
    if schedule == "interleaved":
        return 1 / layout.chunks
    if schedule not in _ZERO_BUBBLE:
        return 1.0
    if layout.microbatches < 2 * layout.pp - 1:
        # To the thousandth, so that a search does not simulate a pipeline for every layout.
        return _unfilled(schedule, layout.pp, layout.microbatches, round(forwards / whole, 3), round(inputs / whole, 3))
    if schedule == "zb-h1":
        return max(forwards + inputs - weights, 0.0) / whole
    if schedule == "zb-h2":
        return max(forwards + inputs - 2 * weights, 0.0) / whole
    # Nothing where the three are alike; what sets them apart is left.
    return (max(forwards, inputs, weights) - min(forwards, inputs, weights)) / whole


_ZERO_BUBBLE: Mapping[Schedule, schedules.Schedule] = {
    "zb-h1": schedules.ZBH1(),
    "zb-h2": schedules.ZBH2(),
    "zb-v": schedules.ZBV(),
}


@functools.lru_cache(maxsize=4096)
def _unfilled(schedule: Schedule, stages: int, microbatches: int, forwards: float, inputs: float) -> float:
    """The bubble of a zero-bubble schedule with few microbatches, in the units of `bubble_share`."""
    times = Times(forward=forwards, backward_input=inputs, backward_weight=1 - forwards - inputs)
    priced = price(_ZERO_BUBBLE[schedule], stages, microbatches, times)
    return (priced.total - microbatches) / (stages - 1)


def _stages(priced: Prices, layout: Layout) -> Group:
    """The devices of a pipeline: one of each stage."""
    return priced.group((layout.tp, layout.cp, layout.ep, layout.fsdp, layout.dp), layout.pp)


def _step(priced: Prices, layout: Layout) -> tuple[dict[str, float]]:
    """The parts of a training step."""
    workload, stack, m = priced.workload, priced.stack, layout.microbatches
    pp, dp, fsdp, ep, cp, tp = layout.pp, layout.dp, layout.fsdp, layout.ep, layout.cp, layout.tp
    rows, sequence, parallel = layout.rows(workload), workload.seq_len, layout.sequence_parallel
    cuts, shares = layout.strategy.cuts_parameters, layout.strategy is not ShardingStrategy.NO_SHARD
    layers = priced.layers(pp, layout.pieces)
    work = priced.layer(rows, tp, cp, ep, parallel, layout.remat)
    ends = priced.ends(rows, sequence, tp, cp)
    talk = priced.talk(rows, sequence, tp, cp, ep, parallel, layout.remat)
    # What can hide behind a layer's arithmetic shares that time: keys and values first, then weights, then activations.
    room, tensor = stack.overlap * work.seconds, talk.tensor
    if parallel and priced.cluster.hardware.torus:
        # The TPU's compiler cuts a product and the gather or scatter beside it into steps that run at once.
        tensor, room = _exposed(tensor, room)
    context, room = _exposed(talk.context, room)
    fetched = fetched_ends = offloaded = 0.0
    if cuts:
        gather = priced.gather(fsdp, ep, cp, tp, layout.remat)
        fetched, room = _exposed(gather.layer, room)
        fetched_ends, _ = _exposed(gather.ends, stack.overlap * ends.seconds)
    if "activations" in layout.offload:
        offloaded, room = _exposed(priced.kept(rows, cp, tp, parallel, layout.remat), room)
    accumulated = priced.accumulate(pp, fsdp, ep, tp, cuts) if m > 1 else 0.0
    stage = layers * (work.seconds + tensor + talk.expert + context + fetched + offloaded)
    bubble = 0.0
    if pp > 1:
        share = bubble_share(layout, work.forwards, work.inputs, work.weights)
        hop = _stages(priced, layout).send(priced.stream(rows, sequence, cp) / (tp if parallel else 1))
        bubble = (pp - 1) * (share * (stage + accumulated) + 2 * layout.chunks * hop)
    # The gradients of a microbatch are summed while those of earlier layers are computed.
    summed, _ = _exposed(priced.gradients(pp, dp, fsdp, ep, cp, tp, cuts), stack.overlap * layers * work.backwards)
    summed *= 1 if stack.defers or pp > 1 else m
    update, crossing = priced.update(pp, fsdp, ep, tp, shares)
    parts = {
        "matmul": m * (layers * work.matmul + ends.matmul),
        "attention": m * layers * work.attention,
        "memory": m * (layers * work.memory + ends.memory + accumulated),
        "launch": m * (layers * work.launch + ends.launch),
        "tensor": m * (layers * tensor + priced.ends_talk(rows, sequence, tp, cp, parallel)),
        "context": m * layers * context,
        "expert": m * layers * talk.expert,
        "fsdp": m * (layers * fetched + fetched_ends),
        "data": summed,
        "bubble": bubble,
        "optimizer": update,
        "offload": m * layers * offloaded + (crossing if "optimizer" in layout.offload else 0.0),
    }
    return (parts,)


def _exposed(seconds: float, room: float) -> tuple[float, float]:
    """What of `seconds` does not fit in `room` to hide in, and the room that is left."""
    return max(seconds - room, 0.0), max(room - seconds, 0.0)


def _serve(priced: Prices, layout: Layout) -> tuple[dict[str, float], float, float]:
    """The parts of serving the batch, the seconds until its first tokens, and those of each further token."""
    workload = priced.workload
    first = _pass(priced, layout, max(workload.prompt_len, 1), 0.0)
    # While decoding, the cache grows from the prompt to the whole: half of the new tokens on average.
    steps = max(workload.new_tokens - 1, 0)  # the first new token comes out of the prefill
    each = _pass(priced, layout, 1, workload.prompt_len + workload.new_tokens / 2) if steps else {}
    parts = {name: seconds + steps * each.get(name, 0.0) for name, seconds in first.items()}
    return parts, sum(first.values()), sum(each.values())


def _pass(priced: Prices, layout: Layout, sequence: int, cached: float) -> dict[str, float]:
    """The parts of one way of all microbatches through the model, `sequence` tokens each behind `cached` ones."""
    m, rows = layout.microbatches, layout.rows(priced.workload)
    pp, fsdp, ep, tp = layout.pp, layout.fsdp, layout.ep, layout.tp
    # A device of cp has its share of a prompt's tokens, or, of a single one, looks through its share of the cache for
    # all. Prompts are padded, to lengths that devices divide; and a cache is cut whatever its length.
    cp, parts = (layout.cp, 1) if sequence > 1 else (1, layout.cp)
    sequence = -(-sequence // cp) * cp
    layers = priced.layers(pp, 1)
    ways = fsdp * ep if layout.strategy.cuts_parameters else 1
    work, fetched = priced.served(rows, sequence, cached, parts, pp, tp, cp, ep, 1), 0.0
    if ways > 1:
        # Weights come to the tokens, hidden behind the layer before, or the tokens to the weights: the quicker way.
        fetched, _ = _exposed(priced.fetched(fsdp, ep, layout.cp, tp)[0], priced.stack.overlap * work.seconds)
        there = priced.served(rows, sequence, cached, parts, pp, tp, cp, ep, ways)
        moved = priced.stationary(rows * sequence, fsdp, ep, layout.cp, tp)
        if there.seconds + moved < work.seconds + fetched:
            work, fetched = there, moved
    ends = priced.ends(rows, sequence, tp, cp)
    talk = priced.talk(rows, sequence, tp, cp, ep, layout.sequence_parallel and sequence > 1, None)
    # Each of its collectives waits for the one before: nothing hides them.
    context = priced.joined(rows, sequence, pp, tp, layout.cp)
    # One microbatch after another goes through the stages; with fewer of them than stages, some stages wait.
    stage = layers * (work.seconds + talk.tensor + talk.expert + context + fetched)
    hop = _stages(priced, layout).send(priced.stream(rows, sequence, cp)) if pp > 1 else 0.0
    return {
        "matmul": m * (layers * work.matmul + ends.matmul),
        "attention": m * layers * work.attention,
        "memory": m * layers * work.memory,
        "launch": m * (layers * work.launch + ends.launch),
        "tensor": m * (layers * talk.tensor + priced.ends_talk(rows, sequence, tp, cp, False)),
        "context": m * layers * context,
        "expert": m * layers * talk.expert,
        "fsdp": m * layers * fetched,
        "bubble": (pp - 1) * (stage + hop),
    }
