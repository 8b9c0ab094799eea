"""What one layer has alive at the worst moments of its backward pass, counted in arrays, for each compiler.

A layer computed again for its backward pass leaves intermediate values of four widths behind, a row for each token: as
wide as the residual stream, as the queries, as the keys, as the feed-forward layer. How many of each are alive at
once is not in the program but in the order that a compiler chooses for it, and so it is counted, not derived: from the
buffer assignments of the step for models whose sizes are all different, where every buffer tells by its shape what it
is. The counts are those of these compilers at any size; the sizes are the model's and the layout's.

    nvidia   what goes into the feed-forward layer and the gradients of it stand together, since the gradients of its
             weights are put off until the gathers of FSDP can hide behind them. cuDNN keeps no scores.
    google   gradients of weights are taken at once, so that little stays; but scores are kept, of one block of queries.
    cpu      computes in float32 whatever the program says, and keeps transposed copies for its matmuls.

Where a layer scores all its queries at once (short sequences), the scores stay until the end of its backward pass.
"""

import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.device import Hardware, Vendor
from tbjax.planner.parameters import layer_tensors
from tbjax.planner.workload import Layout, Workload
from tbjax.room import heads_are_whole

# `tbjax.layers.blocks`: the float32 scores that a block of queries may have on a device, what a block is a multiple of,
# and the bands that queries are cut into.
SCORE_BYTES = 64 * 2**20
BLOCK_MULTIPLE = 128
BANDS = 4

# `tbjax.layers.attend`: the least compute capability, and the widest heads, that cuDNN's attention is used for.
CUDNN_CAPABILITY = 8
CUDNN_HEAD_DIM = 128

# And what a sequence must be a multiple of for splash attention.
SPLASH_MULTIPLE = 128


class Live(NamedTuple):
    """Arrays alive at one moment, by their width; one of float32 counts as two of bfloat16."""

    embed: float
    queries: float
    keys: float
    inner: float  # for each of the matrices that lead into the feed-forward layer: two where it is gated
    scores: float = 0  # copies of a block's scores in float32, and in the activations' precision
    rows: float = 0  # with experts: as wide as the residual stream, one row for each expert of a token


# Whose counts they are. XLA's compiler for CPUs meets bfloat16 with casts, which merge some arrays and split others.
Compiler: TypeAlias = Literal["nvidia", "google", "cpu", "cpu, bfloat16"]

# The moment at which the gradients of the feed-forward layer are taken, all before it having been computed again.
# Scores are there if there is one block of them.
FEED_FORWARD: Mapping[Compiler, Live] = {
    "nvidia": Live(embed=5, queries=2, keys=2, inner=2, scores=1, rows=3),
    "google": Live(embed=3, queries=2, keys=2, inner=1.5, scores=1, rows=3),
    "cpu": Live(embed=7.5, queries=2.5, keys=4, inner=4, scores=2, rows=3),
    "cpu, bfloat16": Live(embed=6.5, queries=2.5, keys=4, inner=2.75, scores=1, rows=3),
}
# The moment at which those of attention are.
ATTENTION: Mapping[Compiler, Live] = {
    "nvidia": Live(embed=6, queries=4, keys=4, inner=0.5, scores=3),
    "google": Live(embed=3, queries=4, keys=6, inner=0.5, scores=1),
    "cpu": Live(embed=7, queries=4, keys=4, inner=1, scores=2),
    "cpu, bfloat16": Live(embed=6, queries=4, keys=4, inner=1, scores=2),
}
# The same by cuDNN, which keeps no scores.
FUSED = Live(embed=5, queries=4, keys=4, inner=0.5)

# What tp adds to the first: partial sums of the gradient by each matrix, on their way through a reduction.
REDUCED: Mapping[Compiler, float] = {"nvidia": 2, "google": 0, "cpu": 0, "cpu, bfloat16": 0}

# With sequence parallelism, the arrays of the residual stream that are whole on every tp device; the others are cut.
GATHERED: Mapping[Compiler, float] = {"nvidia": 7, "google": 4, "cpu": 6, "cpu, bfloat16": 6}


def compiler(vendor: Vendor, compute_bytes: int) -> Compiler:
    """Whose counts hold for a program that computes in so many bytes."""
    return "cpu, bfloat16" if vendor == "cpu" and compute_bytes == 2 else vendor


def is_fused(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> bool:
    """Whether attention in training is the device's own kernel: `tbjax.layers.attend` again."""
    if hardware.vendor == "google":
        return workload.seq_len % SPLASH_MULTIPLE == 0 and layout.cp == 1 and not config.alibi
    return (
        hardware.vendor == "nvidia"
        and int(hardware.target.get("major", CUDNN_CAPABILITY)) >= CUDNN_CAPABILITY
        and workload.compute_bytes == 2
        and config.head_dim <= CUDNN_HEAD_DIM
        and config.head_dim % 8 == 0
        and config.attention_softcap is None
        and not config.alibi
    )


class Layer(NamedTuple):
    """The sizes of one layer on one device."""

    residual: int  # elements of the residual stream a token
    embed: int
    queries: int
    keys: int
    inner: int  # what leads into the feed-forward layer, both parts where it is gated
    cached: int  # keys and values of one token, of the heads that a cache has here
    window: int | None  # how many tokens attention looks back on
    weights: int  # elements that the layer computes with
    outwards: int  # of them, the matrix that leads out of the feed-forward layer (of all experts here)
    experts: int  # experts that this device holds; 0: a dense layer
    copies: int  # rows of each token in the feed-forward layer: ep peers' tokens are gathered, once for each expert
    router: int  # scores of a token's experts
    heads: int
    matrices: int  # that lead into the feed-forward layer
    post_norm: bool
    repeats: int  # how many such layers the model has


@functools.lru_cache(maxsize=4096)
def layers(config: ModelConfig, tp: int, ep: int, sequence_parallel: bool) -> tuple[Layer, ...]:
    """The sizes of each kind of layer that the model has."""
    return tuple(_layer(config, kind, tp, ep, sequence_parallel) for kind in dict.fromkeys(config.layer_kinds))


def heads_on_device(heads: int, kv_heads: int, tp: int) -> tuple[int, int]:
    """Query heads and key-value heads of a device, repeated or padded where tp does not divide them.

    `tbjax.layers.attention.HeadLayout` again.
    """
    queries = heads // kv_heads

    def fit(repeat: int) -> tuple[int, int, int]:
        held = -(-kv_heads * repeat // tp)
        return held, held * -(-queries // repeat), repeat

    held, held_queries, _ = min(map(fit, range(1, queries + 1)))
    return held_queries, held


def _layer(config: ModelConfig, kind: LayerKind, tp: int, ep: int, sequence_parallel: bool) -> Layer:
    d = config.embed
    heads, kv_heads = heads_on_device(config.heads, config.kv_heads, tp)
    matrices = 2 if config.gated_mlp or kind.sparse else 1
    mlp = config.experts.mlp if kind.sparse else config.mlp
    experts = config.experts.experts // ep if kind.sparse else 0
    ways = {"experts": ep, "mlp": tp, "heads": tp, "kv_heads": tp}
    return Layer(
        residual=d // tp if sequence_parallel else d,
        embed=d,
        queries=heads * config.head_dim,
        keys=kv_heads * config.head_dim,
        inner=matrices * (mlp // tp),
        cached=2 * (config.kv_heads if heads_are_whole(config, tp) else kv_heads) * config.head_dim,
        window=kind.window,
        weights=sum(
            tensor.count // math.prod(ways.get(dim or "", 1) for dim in tensor.dims)
            for tensor in layer_tensors(config, kind)
        ),
        outwards=max(experts, 1) * d * (mlp // tp),
        experts=experts,
        copies=ep * config.experts.experts_per_token if kind.sparse else 1,
        router=config.experts.experts if kind.sparse else 0,
        heads=heads,
        matrices=matrices,
        post_norm=config.norm_placement != "pre",
        repeats=config.layer_kinds.count(kind),
    )


def block_of(queries: int, keys: int, heads: int) -> int:
    """How many queries are scored at once: `tbjax.layers.blocks.block_queries` again."""
    fitting = SCORE_BYTES // (4 * keys * heads)
    if fitting >= queries:
        return queries
    blocks = -(-queries // max(BLOCK_MULTIPLE, fitting))
    return min(queries, -(-queries // blocks // BLOCK_MULTIPLE) * BLOCK_MULTIPLE)


def band_of(queries: int) -> int:
    """How many queries a band has, where queries and keys are the same tokens: `tbjax.layers.blocks.bands_of` again."""
    return min(queries, -(-queries // (BANDS * BLOCK_MULTIPLE)) * BLOCK_MULTIPLE)
