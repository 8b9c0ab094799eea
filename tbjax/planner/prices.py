"""The pieces of a step's time, each remembered by the few sizes that it depends on.

`Prices` holds one model, workload, cluster and stack. Its methods are pieces that `cost` adds up: the arithmetic of a
layer, of the model's ends, the collectives of a layer, the gathering of its weights, the update. A search asks for tens
of thousands of layouts and meets the same pieces again and again.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tbjax.config import ModelConfig
from tbjax.mesh import AXES
from tbjax.planner import traffic
from tbjax.planner.hardware import Cluster
from tbjax.planner.network import Fabric, Group, Sizes, group
from tbjax.planner.parameters import Shard, shards, stage_layers
from tbjax.planner.stack import Stack, sustained
from tbjax.planner.traffic import Message
from tbjax.planner.work import ENDS_KERNELS, Cut, Matmul, Work, forward, head, layer
from tbjax.planner.workload import PROJECTION, Layout, Optimizer, Remat, Workload

# Bytes that an update reads and writes for each parameter, with float32 state: the gradient twice (its norm, then the
# update), the parameter and each moment in and out.
_UPDATE_BYTES: Mapping[Optimizer, float] = {"adamw": 32, "lion": 24, "muon": 24, "sgd": 16, "adafactor": 20}

# Bytes of float32 optimizer state for each parameter.
_STATE_BYTES: Mapping[Optimizer, float] = {"adamw": 8, "lion": 4, "muon": 4, "sgd": 4, "adafactor": 0.1}

# Muon: each of five Newton-Schulz iterations squares the m x n matrix (m <= n) into m x m (2 m m n FLOPs), squares that
# (2 m m m) and multiplies it back (2 m m n). For m = n that is 6 m FLOPs for each parameter.
_NEWTON_SCHULZ_FLOPS = 5 * 6


class Passes(NamedTuple):
    """Seconds of arithmetic for one microbatch: by part, and by pass as the schedules tell them apart."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    forwards: float = 0.0
    inputs: float = 0.0  # the gradient of the input, with what is recomputed
    weights: float = 0.0  # the gradient of the weights

    @property
    def seconds(self) -> float:
        return self.matmul + self.attention + self.memory + self.launch

    @property
    def backwards(self) -> float:
        return self.inputs + self.weights


class Talk(NamedTuple):
    """Seconds of one layer's collectives for one microbatch."""

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0


class Gather(NamedTuple):
    """Seconds that FSDP's collectives take for one microbatch: of a layer, and of the vocabulary's tables."""

    layer: float
    ends: float


class Same:
    """A key that equals itself only: to hash a `ModelConfig` takes longer than to price a layout.

    It holds on to its value, so that no other object can take its identity while the key is in use.
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def prices(config: ModelConfig, workload: Workload, cluster: Cluster, stack: Stack) -> "Prices":
    """The prices of a model and workload on a cluster, made once for the same four objects."""
    return _prices(Same(config), Same(workload), Same(cluster), Same(stack))


@functools.lru_cache(maxsize=256)
def _prices(config: Same, workload: Same, cluster: Same, stack: Same) -> "Prices":
    return Prices(config.value, workload.value, cluster.value, stack.value)  # type: ignore[arg-type]


def peak(cluster: Cluster, workload: Workload) -> float:
    """FLOP/s of one device in the workload's precision."""
    return cluster.hardware.flops["float32" if workload.precision == "float32" else "bfloat16"]


class Prices:
    """The prices of one model and workload on one cluster. `rows` are a microbatch's sequences on one device."""

    def __init__(self, config: ModelConfig, workload: Workload, cluster: Cluster, stack: Stack) -> None:
        self.config, self.workload, self.cluster, self.stack = config, workload, cluster, stack
        self.flops = peak(cluster, workload) * stack.matmul_fraction * sustained(cluster.hardware)
        self.bandwidth = cluster.hardware.memory_bandwidth * stack.memory_fraction
        self.size = workload.compute_bytes
        self.fabric = Fabric(link=stack.link_fraction, network=stack.network_fraction, start=stack.collective_start)
        # Layers of one kind cost the same; a stage is taken to have its share of each.
        kinds = dict.fromkeys(config.layer_kinds)
        self.kinds = [(kind, config.layer_kinds.count(kind) / config.layers) for kind in kinds]
        self.sparse_share = sum(kind.sparse for kind in config.layer_kinds) / config.layers
        remember = functools.lru_cache(maxsize=8192)
        self.group = remember(self._group)
        self.layer = remember(self._layer)
        self.layers = remember(functools.partial(stage_layers, config))
        self.served = remember(self._served)
        self.ends = remember(self._ends)
        self.talk = remember(self._talk)
        self.joined = remember(self._joined)
        self.ends_talk = remember(self._ends_talk)
        self.gather = remember(self._gather)
        self.fetched = remember(self._fetched)
        self.gradients = remember(self._gradients)
        self.update = remember(self._update)
        self.accumulate = remember(self._accumulate)
        self.kept = remember(self._kept)
        self.stationary = remember(self._stationary)

    # Arithmetic.

    def product(self, matmul: Matmul, weight_bytes: float) -> float:
        """Seconds of products against weights of so many bytes an element."""
        rows, columns, inner, copies = matmul
        moved = copies * (self.size * rows * (inner + columns) + weight_bytes * inner * columns)
        return max(self._computed(matmul), moved / self.bandwidth)

    def score(self, matmul: Matmul) -> float:
        """Seconds of a product of attention. Fused, its scores stay on the chip: the face without a head dimension."""
        rows, columns, inner, copies = matmul
        wide = self.config.head_dim
        moved = wide * (rows + columns + inner - wide)  # queries or outputs, and keys or values
        if self.stack.attention == "materialised":
            moved += rows * columns * inner / wide
        return max(self._computed(matmul), copies * moved * self.size / self.bandwidth)

    def _computed(self, matmul: Matmul) -> float:
        """Seconds of a product's arithmetic: its edges, where the units run half empty, are so many elements wide."""
        half = self.stack.matmul_half
        # Few rows, as in decoding, are no such edge: what they cost is the reading of the weights.
        edges = half / (half + matmul.rows) + half / matmul.columns + half / matmul.inner
        return matmul.flops / self.flops * (1 + edges)

    def _pass(self, work: Work, weight_bytes: float) -> tuple[float, float, float, float]:
        """Seconds of one pass: products, attention, other bytes, launches."""
        matmul = sum(self.product(matmul, weight_bytes) for matmul in work.weights)
        attention = sum(map(self.score, work.scores)) + work.scores_moved / self.bandwidth
        memory = work.moved / self.bandwidth
        gaps = work.kernels * self.stack.kernel_gap
        waited = work.kernels * self.stack.host_per_kernel - (matmul + attention + memory + gaps)
        return matmul, attention, memory, gaps + max(waited, 0.0)

    def _layer(self, rows: int, tp: int, cp: int, ep: int, sequence_parallel: bool, remat: Remat) -> Passes:
        """The arithmetic of an average layer in training."""
        stack, total = self.stack, Passes()
        cut = Cut(rows, self.workload.seq_len, tp=tp, cp=cp, ep=ep, sequence_parallel=sequence_parallel)
        for kind, share in self.kinds:
            work = layer(self.config, kind, cut, remat, attention=stack.attention, size=self.size, prunes=stack.prunes)
            passes = [self._pass(part, self.size) for part in (work.forward, work.recomputed, work.backward)]
            there, again, back = map(sum, passes)
            # Every second product of the backward pass is a weight's gradient.
            weights = sum(self.product(matmul, self.size) for matmul in work.backward.weights[1::2])
            matmul, attention, memory, launch = (sum(column) for column in zip(*passes, strict=True))
            whole = Passes(matmul, attention, memory, launch, there, again + back - weights, weights)
            total = Passes(*(old + share * new for old, new in zip(total, whole, strict=True)))
        return total

    def _served(
        self, rows: int, sequence: int, cached: float, parts: int, pp: int, tp: int, cp: int, ep: int, spread: int
    ) -> Passes:
        """The arithmetic of an average layer forwards, behind `cached` tokens, of which each device has one of `parts`.

        `spread` devices may keep their shares of a layer's weights and each meet the tokens of all: `sharding.project`.
        The experts' weights are gathered in any case.
        """
        total = Passes()
        cut = Cut(rows, sequence, context=cached, parts=parts, tp=tp, cp=cp, ep=ep)
        for kind, share in self.kinds:
            if sequence > 1:
                # No kernel of a device's own knows caches and padding: nothing is left out that a query does not see.
                met = traffic.met(self.config, self.workload, kind, rows, sequence, pp)
                cut = dataclasses.replace(cut, met=met)
            work = forward(self.config, kind, cut, attention="fused", size=self.size)
            if spread > 1:
                dense = len(work.weights) - work.experts
                shared = (_spread(matmul, spread) for matmul in work.weights[:dense])
                work = work._replace(weights=(*shared, *work.weights[dense:]))
            spent = self._pass(work, self.workload.moved_by(PROJECTION))
            whole = Passes(*spent, forwards=sum(spent))
            total = Passes(*(old + share * new for old, new in zip(total, whole, strict=True)))
        return total

    def _ends(self, rows: int, sequence: int, tp: int, cp: int) -> Passes:
        """The head and the loss in training; in inference the head, for the last token of each sequence."""
        tokens = rows * sequence / cp
        if self.workload.training:
            product = head(self.config, tokens, tp)
            matmul = sum(self.product(each, self.size) for each in (product, *product.gradients()))
            # Rows of the table are looked up and written, and backwards read and added to.
            moved = product.rows * product.columns * self.stack.logit_bytes + 4 * self.stream(rows, sequence, cp)
            # Here the host waits for the loss of every microbatch, so its own time is not hidden by the device's.
            launch = ENDS_KERNELS * (self.stack.kernel_gap + self.stack.host_per_kernel)
            return Passes(matmul, memory=moved / self.bandwidth, launch=launch)
        table = self.workload.moved_by("embedding.weight" if self.config.tie_embeddings else "head.weight")
        product = self.product(head(self.config, rows, tp), table)
        return Passes(product, launch=ENDS_KERNELS / 3 * self.stack.kernel_gap)

    # Collectives.

    def _group(self, within: Sizes, *sizes: int) -> Group:
        return group(self.cluster, within, sizes, self.fabric)

    def spent(self, messages: Iterable[Message], **sizes: int) -> float:
        """Seconds that collectives take, on a mesh of which these axes have these sizes."""
        return sum(message.runs * self._collective(message, sizes) for message in messages)

    def _collective(self, message: Message, sizes: Mapping[str, int]) -> float:
        within = AXES[AXES.index(message.axes[-1]) + 1 :]
        over = self.group(
            tuple(sizes.get(axis, 1) for axis in reversed(within)), *(sizes[axis] for axis in reversed(message.axes))
        )
        return getattr(over, message.kind.replace("-", "_"))(message.size)

    def stream(self, rows: int, sequence: int, cp: int) -> float:
        """Bytes of the residual stream on one device."""
        return traffic.stream(self.config, self.workload, rows, sequence, cp)

    def _talk(
        self, rows: int, sequence: int, tp: int, cp: int, ep: int, sequence_parallel: bool, remat: Remat | None
    ) -> Talk:
        """The collectives of an average layer: in training forwards, again and backwards; with no `remat`, forwards."""
        said = traffic.layer(
            self.config,
            self.workload,
            rows,
            sequence,
            tp=tp,
            cp=cp,
            ep=ep,
            sequence_parallel=sequence_parallel,
            remat=remat,
            prunes=self.stack.prunes,
        )
        return Talk(*(self.spent(messages, tp=tp, cp=cp, ep=ep) for messages in said))

    def _joined(self, rows: int, sequence: int, pp: int, tp: int, cp: int) -> float:
        """In serving, the collectives of an average layer's attention to a cache that is cut by tokens."""
        return self.spent(traffic.joined(self.config, self.workload, rows, sequence, tp=tp, cp=cp, pp=pp), tp=tp, cp=cp)

    def _ends_talk(self, rows: int, sequence: int, tp: int, cp: int, sequence_parallel: bool) -> float:
        """The collectives of the model's ends."""
        sizes = {"tp": tp, "cp": cp}
        said = traffic.ends(
            self.config,
            self.workload,
            rows,
            sequence,
            **sizes,
            sequence_parallel=sequence_parallel and self.stack.moves_tables,
        )
        return self.spent(said, **sizes)

    def _gather(self, fsdp: int, ep: int, cp: int, tp: int, remat: Remat) -> Gather:
        """FSDP in training."""
        said = traffic.weights(self.config, self.size, fsdp, ep, tp, remat)
        return Gather(*(self.spent(messages, fsdp=fsdp, ep=ep, cp=cp, tp=tp) for messages in said))

    def _fetched(self, fsdp: int, ep: int, cp: int, tp: int) -> tuple[float, float]:
        """Seconds in which one layer's weights are gathered: all, and the experts' alone."""
        dense, experts = (
            self.spent(messages, fsdp=fsdp, ep=ep, cp=cp, tp=tp)
            for messages in traffic.apart(self.config, self.size, fsdp, ep, tp)
        )
        return dense + experts, experts

    def _stationary(self, rows: int, fsdp: int, ep: int, cp: int, tp: int) -> float:
        """One layer's weights stay cut over fsdp and ep, and everyone's tokens meet each part: `Sharding.project`.

        What goes into a block has its features shared out in place of its tokens, and what they give in the block's
        middle is summed. From there the results of all tokens are gathered, and what comes out is turned back.
        """
        over, config = self.group((tp, cp), ep, fsdp), self.config
        if over.size == 1:
            return 0.0
        own = rows * self.size  # one feature of a device's tokens
        every = own * over.size  # and of all
        turned = 2 * over.all_to_all(own * config.embed)
        queries, keys = (heads * config.head_dim / tp for heads in (config.heads, config.kv_heads))
        attention = turned + over.reduce_scatter(every * (queries + 2 * keys)) + over.all_gather(every * queries)
        inner = every * config.mlp / tp
        mlp = turned + over.reduce_scatter((2 if config.gated_mlp else 1) * inner) + over.all_gather(inner)
        _, experts = self.fetched(fsdp, ep, cp, tp)
        return attention + (1 - self.sparse_share) * mlp + experts

    # Once a step.

    def _gradients(self, pp: int, dp: int, fsdp: int, ep: int, cp: int, tp: int, cut: bool) -> float:
        """Seconds in which the gradients are summed over the devices that hold the same parameters."""
        sizes = {"dp": dp, "fsdp": fsdp, "ep": ep, "cp": cp, "tp": tp}
        sums = traffic.gradients(self.config, self.size, pp=pp, cut=cut, **sizes)
        return self.spent((*sums.lookup, *sums.others), **sizes)

    def _accumulate(self, pp: int, fsdp: int, ep: int, tp: int, cut: bool) -> float:
        """Seconds in which one microbatch's gradients are added to the others'."""
        return self._elements(pp, fsdp, ep, tp, cut) * self.stack.accumulate_bytes / self.bandwidth

    def _update(self, pp: int, fsdp: int, ep: int, tp: int, cut: bool) -> tuple[float, float]:
        """Seconds of the optimizer on a device's share of the state, and of that share's way to the host and back."""
        elements, optimizer = self._elements(pp, fsdp, ep, tp, cut), self.workload.optimizer
        wide = 2 if self.workload.precision == "bfloat16" else 4
        seconds = elements * _UPDATE_BYTES[optimizer] * wide / 4 / self.bandwidth
        if optimizer == "muon":
            seconds += elements * _NEWTON_SCHULZ_FLOPS * self.config.embed / self.flops
        moved = 2 * elements * _STATE_BYTES[optimizer] * wide / 4 / self.cluster.hardware.host_link
        return seconds, moved

    def _elements(self, pp: int, fsdp: int, ep: int, tp: int, cut: bool) -> int:
        return sum(shard.local for shard in self._shards(pp, fsdp, ep, tp, cut))

    def _shards(self, pp: int, fsdp: int, ep: int, tp: int, cut: bool) -> tuple[Shard, ...]:
        return shards(self.config, Layout(pp=pp, fsdp=fsdp, ep=ep, tp=tp), cut=cut)

    # Kept activations.

    def _kept(self, rows: int, cp: int, tp: int, sequence_parallel: bool, remat: Remat) -> float:
        """Seconds in which what one layer keeps of a microbatch goes to the host and comes back."""
        whole = self.stream(rows, self.workload.seq_len, cp)
        kept = whole / tp if sequence_parallel else whole
        if remat != "full":
            cut = Cut(rows, self.workload.seq_len, tp=tp, cp=cp)
            for kind, share in self.kinds:
                work = forward(self.config, kind, cut, attention=self.stack.attention, size=self.size)
                results = sum(matmul.rows * matmul.columns * matmul.copies for matmul in work.weights) * self.size
                kept += share * (results if remat == "dots" else results + work.moved / 2)
        return 2 * kept / self.cluster.hardware.host_link


def _spread(matmul: Matmul, ways: int) -> Matmul:
    """The share of one of `ways` devices in the products of all of them, each holding a part of the weights."""
    return Matmul(matmul.rows * ways, matmul.columns, matmul.inner / ways, matmul.copies)
