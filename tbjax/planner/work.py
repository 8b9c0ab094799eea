"""What one device does for one microbatch: products, and bytes moved by everything that is not a product.

A layer is a short list of matrix products, each with the shape that is left of it after sharding, and a count of the
bytes that norms, residual sums, activations and the like read and write. Nothing here knows how fast a device is: that
is `cost`'s business. What is recomputed in the backward pass follows the remat policy:

    none   nothing: every intermediate is kept
    dots   the attention and all that is not a product against weights, whose results are kept
    full   the layer, from its input
    stage  of a pipeline, the stage from its input, and then each of its layers as under "full"

Under "full" a compiler drops what the backward pass does not ask for: the last product of the layer, whose result only
the next layer needs. A hand-written checkpoint runs it all.

T tokens in the microbatch on this device (rows x sequence / cp), S sequence, D embed, H heads, K kv heads, N head_dim,
F mlp, V vocab, E experts, k experts per token.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, TypeAlias

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.parameters import active_parameters, tensors
from tbjax.planner.workload import Remat, Workload
from tbjax.room import heads_are_whole

# How softmax(q k) v is computed: its S x S scores written out between the steps, or never leaving the chip.
Attention: TypeAlias = Literal["materialised", "fused"]


class Matmul(NamedTuple):
    """`copies` products [rows, inner] x [inner, columns]."""

    rows: float
    columns: float
    inner: float
    copies: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner * self.copies

    def gradients(self) -> "tuple[Matmul, Matmul]":
        """The two products of its backward pass: for its left operand, and for its right."""
        return (
            Matmul(self.rows, self.inner, self.columns, self.copies),
            Matmul(self.inner, self.columns, self.rows, self.copies),
        )


class Work(NamedTuple):
    """What one pass over something costs."""

    weights: tuple[Matmul, ...]  # products against weights
    scores: tuple[Matmul, ...]  # the products of attention
    scores_moved: float  # bytes that attention reads and writes besides its products
    moved: float  # bytes that everything else reads and writes
    kernels: int  # launches
    experts: int = 0  # how many of `weights`, the last ones, are against experts' weights

    @property
    def flops(self) -> float:
        return sum(matmul.flops for matmul in (*self.weights, *self.scores))


class LayerWork(NamedTuple):
    """One layer in training; `recomputed` precedes its backward pass."""

    forward: Work
    recomputed: Work
    backward: Work

    @property
    def flops(self) -> float:
        return self.forward.flops + self.recomputed.flops + self.backward.flops


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a microbatch lies on one device: its rows, the length of its sequences, and the axes that cut a layer."""

    rows: float  # sequences
    sequence: int  # tokens of a whole sequence, new ones only while decoding
    context: float = 0.0  # tokens that a query looks back on besides `sequence`: what is cached
    parts: int = 1  # devices that share out what a single query looks at; prompts are shared out over cp
    met: float | None = None  # keys that each query is multiplied with; None: those that it sees
    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False

    @property
    def tokens(self) -> float:
        return self.rows * self.sequence / self.cp


# Kernels of a dense layer besides its products: two norms, two residual sums, the activation, and heads laid out before
# and after attention.
_OTHER_KERNELS = 7
_ROUTING_KERNELS = 6  # top-k, sort, gather, weigh, unsort, sum
_MATERIALISED_KERNELS = 2  # softmax, dropout

# Kernels of the model's ends in training: the lookup, the head, eight steps of the loss; twice as many backwards.
ENDS_KERNELS = 3 * 10

# Bytes that the scores cost besides their products, per score, with two-byte scores and one-byte dropout masks.
# Forwards softmax reads and writes them (4) and dropout reads, writes and keeps a mask (5); backwards dropout reads,
# writes and reads the mask (5), softmax reads its result and the gradient and writes (6).
_SCORE_BYTES_FORWARD = 9
_SCORE_BYTES_BACKWARD = 11

# And where prompts are read: scores are made of a block of queries at a time, in float32 (4) and read by the softmax
# (4). Where devices have parts of the keys, the maximum and the sum go round in between, so that they are read twice
# more. Either way they are written as activations are for the product with values, which reads them.
_WIDE_SCORE_BYTES_READING = 8
_WIDE_SCORE_BYTES_APART = 16
_NARROW_SCORES = 2


@functools.lru_cache(maxsize=16384)
def projections(
    heads: int, kv_heads: int, head_dim: int, embed: int, mlp: int, gated: bool, tokens: float, tp: int
) -> tuple[Matmul, ...]:
    """The products of a dense layer against its weights; those of one input count as one, side by side."""
    q, kv = -(-heads // tp) * head_dim, -(-kv_heads // tp) * head_dim
    return (
        Matmul(tokens, q + 2 * kv, embed),
        Matmul(tokens, embed, q),
        Matmul(tokens, (2 if gated else 1) * mlp / tp, embed),
        Matmul(tokens, embed, mlp / tp),
    )


def forward(config: ModelConfig, kind: LayerKind, cut: Cut, *, attention: Attention, size: int) -> Work:
    """One layer forwards, `size` being the bytes of an activation's element."""
    tokens, tp, d = cut.tokens, cut.tp, config.embed
    # Between the products the residual stream is held whole by every tp device, unless the sequence is cut there too.
    whole = tokens / tp if cut.sequence_parallel else tokens
    dense = projections(config.heads, config.kv_heads, config.head_dim, d, config.mlp, config.gated_mlp, tokens, tp)
    weights, experts, routed, kernels = dense, 0, 0.0, 0
    if kind.sparse:
        moe, wide = config.experts, config.experts.mlp / tp
        met = tokens * moe.experts_per_token  # assignments that the experts of this device get, on average
        held = moe.experts / cut.ep
        used = held * (1 - (1 - 1 / held) ** met)  # a few tokens, as in decoding, leave some experts unread
        chosen = Matmul(met / used, 2 * wide, d, used), Matmul(met / used, d, wide, used)
        weights, experts = (*dense[:2], Matmul(tokens, moe.experts, d), *chosen), len(chosen)
        # Every assignment of the ep peers' tokens passes through the sort, met here or not: rows out and back.
        routed = 4.0 * met * cut.ep * d * size
        kernels = _ROUTING_KERNELS
        activated = met * wide
    else:
        activated = tokens * config.mlp / tp
    scores, scores_moved = _attention(config, kind, cut, attention, size)
    heads_out = tokens * -(-config.heads // tp) * config.head_dim
    keys_out = tokens * -(-config.kv_heads // tp) * config.head_dim
    moved = (
        whole * d * size * (2 * _norms(config) + 3 * 2)  # read, written; two operands read, their sum written
        + (4 * heads_out + 4 * keys_out) * size  # q, k, v turned by rope and laid out by head, the output laid back
        + activated * size * (3 if config.gated_mlp else 2)
        + routed
    )
    if attention == "materialised":
        moved += whole * d * 2  # dropout's masks on both branches
    kernels += len(weights) + len(scores) + _OTHER_KERNELS
    kernels += _MATERIALISED_KERNELS if attention == "materialised" else -1  # fused: both products are one kernel
    return Work(weights, scores, scores_moved, moved, kernels, experts)


def backward(work: Work, attention: Attention) -> Work:
    """The backward pass of what `work` did forwards."""
    weights = tuple(gradient for matmul in work.weights for gradient in matmul.gradients())
    scores = tuple(gradient for matmul in work.scores for gradient in matmul.gradients())
    if attention == "fused":
        scores = (*scores, work.scores[0])  # the scores were not kept
    factor = _SCORE_BYTES_BACKWARD / _SCORE_BYTES_FORWARD
    # A norm or an activation reads its input again besides the gradient: about a quarter more than forwards, over all.
    return Work(weights, scores, work.scores_moved * factor, work.moved * 5 / 4, 2 * work.kernels)


def recomputed(work: Work, remat: Remat, *, prunes: bool) -> Work:
    """What of `work` the backward pass does again first."""
    if remat in ("full", "stage"):
        layer = work._replace(weights=work.weights[:-1]) if prunes else work
        return layer if remat == "full" else _both(work, layer)
    if remat == "dots":
        return work._replace(weights=(), kernels=work.kernels - len(work.weights))
    return Work((), (), 0.0, 0.0, 0)


def _both(first: Work, second: Work) -> Work:
    """One after the other."""
    return Work(
        first.weights + second.weights,
        first.scores + second.scores,
        first.scores_moved + second.scores_moved,
        first.moved + second.moved,
        first.kernels + second.kernels,
        first.experts + second.experts,
    )


def layer(
    config: ModelConfig, kind: LayerKind, cut: Cut, remat: Remat, *, attention: Attention, size: int, prunes: bool
) -> LayerWork:
    """One layer in training."""
    there = forward(config, kind, cut, attention=attention, size=size)
    again = recomputed(there, remat, prunes=prunes)
    return LayerWork(there, again, backward(there, attention))


def head(config: ModelConfig, tokens: float, tp: int) -> Matmul:
    """The product that makes the logits."""
    return Matmul(tokens, config.padded_vocab / tp, config.embed)


def _norms(config: ModelConfig) -> int:
    norms = 4 if config.norm_placement == "both" else 2
    return norms - 1 if config.block == "shared" else norms


def _attention(
    config: ModelConfig, kind: LayerKind, cut: Cut, attention: Attention, size: int
) -> tuple[tuple[Matmul, ...], float]:
    """q k and (softmax) v, with the keys that are really multiplied, and the bytes moved between them."""
    queries = cut.sequence / cut.cp
    count = cut.rows * -(-config.heads // cut.tp)
    if attention == "materialised":
        keys = float(cut.sequence)  # masked afterwards
        moved = count * queries * keys * _SCORE_BYTES_FORWARD
    elif cut.met is not None:
        keys, apart = cut.met, cut.cp > 1 or heads_are_whole(config, cut.tp)
        wide = _WIDE_SCORE_BYTES_APART if apart else _WIDE_SCORE_BYTES_READING
        moved = count * queries * keys * (wide + _NARROW_SCORES * size)
    else:
        keys, moved = context_length(cut.sequence, kind.window, cut.context) / cut.parts, 0.0
    # Queries that share a key-value head stand side by side, so that keys are read once for all of them.
    shared = config.heads / config.kv_heads if cut.sequence == 1 else 1.0
    queries, count = queries * shared, count / shared
    return (Matmul(queries, keys, config.head_dim, count), Matmul(queries, config.head_dim, keys, count)), moved


def context_length(sequence: int, window: int | None, cached: float = 0.0) -> float:
    """How many keys a query of `sequence` new tokens looks at on average, behind `cached` older ones."""
    whole = cached + (sequence + 1) / 2
    if window is None or window >= cached + sequence:
        return whole
    if cached >= window:
        return float(window)
    ramp = window - cached  # the first queries see less than a window
    return (ramp * (cached + (ramp + 1) / 2) + (sequence - ramp) * window) / sequence


def training_flops(config: ModelConfig, workload: Workload, *, causal: bool = False, recomputed: bool = False) -> float:
    """FLOPs of the model in a training step, all devices together: the numerator of MFU.

    Six for each parameter that a token meets in a product, and the attention's: of all pairs of tokens as Megatron
    counts them, or with `causal` only of those that are not masked, as MaxText has counted since July 2025. What is
    recomputed is not counted, unless asked for as Narayanan et al. 2021 do (every layer once more, not the head).
    """
    forward = forward_flops(config, workload.seq_len, causal=causal) * workload.tokens
    head = 2.0 * config.vocab_size * config.embed * workload.tokens
    return 3.0 * forward + (forward - head if recomputed else 0.0)


@functools.lru_cache(maxsize=1024)
def forward_flops(config: ModelConfig, sequence: int, *, causal: bool = False) -> float:
    """FLOPs of one token's way through the model."""
    tables = 1 if config.tie_embeddings else 2
    vectors = _vector_parameters(config)
    products = active_parameters(config) - tables * config.vocab_size * config.embed - vectors
    attention = 0.0
    for kind in config.layer_kinds:
        keys = context_length(sequence, kind.window) if causal else min(sequence, kind.window or sequence)
        attention += 4.0 * keys * config.heads * config.head_dim
    return 2.0 * (products + config.vocab_size * config.embed) + attention


def _vector_parameters(config: ModelConfig) -> int:
    """Parameters that multiply nothing: norms and biases."""

    def is_vector(dims: tuple[str | None, ...]) -> bool:
        return len([dim for dim in dims if dim != "layers"]) < 2

    return sum(math.prod(tensor.shape) for tensor in tensors(config) if is_vector(tensor.dims))
