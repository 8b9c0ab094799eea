"""Cross entropy over a vocabulary cut by tp, without the logits ever standing in memory.

The logits of a batch are its largest array by far (4096 tokens of a 128k vocabulary take 2 GiB in float32), and the
loss needs them only for a moment. So each device walks through its tokens in chunks: logits, loss and the gradients of
both factors, then on to the next chunk. That the gradients are taken on the way, scaled later by whatever multiplies
the loss, saves computing the logits again in the backward pass.

Each tp device scores its part of the vocabulary; the parts meet in three numbers a token (the maximum, the sum of
exponentials, the target's score). The gradient of the head's weight is summed over the chunks in float32 on each
device, and over the devices once at the end. All of this is per device on purpose (`shard_map`): left to the
partitioner, the sum over devices would happen in every chunk.

The z-loss (PaLM, section 5) is z times the square of each token's log of the sum of exponentials, which keeps the
scores from drifting. It costs nothing: the number is at hand, and its gradient is the softmax once more.

T tokens on a device, C tokens in a chunk, D embed, V vocabulary on a device.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.model import Decoder
from tbjax.sharding import Sharding, axes_of

# A target that has no loss, as transformers and PyTorch write it. Every negative target is taken as one.
IGNORED = -100

# Of what gradients are taken on the way, and how many results there are with the loss.
Gradients: TypeAlias = Literal["states", "both"]
_RESULTS: Mapping[Gradients, int] = {"states": 2, "both": 3}

# Float32 logits of one chunk on one device: large enough for efficient matmuls, small beside everything else.
CHUNK_BYTES = 128 * 2**20

# On a CPU smaller chunks are as efficient. With these, the loss of 4 x 512 tokens of a 49k vocabulary no longer decides
# the peak of a model of 135 M parameters: the layers' backward passes do.
CHUNK_BYTES_ON_CPU = 32 * 2**20


class Head(NamedTuple):
    """What the loss needs to know of the model's head."""

    vocab_size: int  # without the padding of the table
    softcap: float | None
    sharding: Sharding
    z_loss: float


def cross_entropy(model: Decoder, states: jax.Array, targets: jax.Array, *, z_loss: float = 0.0) -> jax.Array:
    """The sum of the losses of `targets` [B, S] for hidden states [B, S, D]; negative targets have none.

    `z_loss` is the weight of the z-loss in it.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} rewards what it is to prevent: a weight is 0 or more.")
    table = model.embedding if model.head is None else model.head
    head = Head(model.config.vocab_size, model.config.logits_softcap, model.sharding, float(z_loss))
    return _summed(head, states, table.weight[...], targets)


def chunk_tokens(tokens: int, vocabulary: int, *, on_cpu: bool = False) -> int:
    """How many of a device's tokens are scored at once against its part of the vocabulary: even chunks of them."""
    largest = min(CHUNK_BYTES, CHUNK_BYTES_ON_CPU) if on_cpu else CHUNK_BYTES
    chunks = max(1, math.ceil(4 * tokens * vocabulary / largest))
    return math.ceil(tokens / chunks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(head: Head, states: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
    return _over_devices(head, states, weight, targets)


def _forward(head: Head, states: Any, weight: Any, targets: Any) -> Any:
    """Each argument comes with whether a gradient of it is wanted: a frozen table has none."""
    wanted: Gradients = "both" if weight.perturbed else "states"
    loss, *kept = _over_devices(head, states.value, weight.value, targets.value, gradients=wanted)
    return loss, tuple(kept)


def _backward(head: Head, kept: Any, cotangent: jax.Array) -> Any:
    found = [gradient * cotangent.astype(gradient.dtype) for gradient in kept]
    return found[0], found[1] if len(found) > 1 else None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_devices(
    head: Head, states: jax.Array, weight: jax.Array, targets: jax.Array, *, gradients: Gradients | None = None
) -> Any:
    sharding = head.sharding
    stored = sharding.parameter(("vocab", "embed"), weight.shape, "head").spec
    used = PartitionSpec(stored[0], None)
    batch = sharding.activation(("batch", "sequence", None), states.shape)
    run = partial(
        _on_device,
        head=head,
        over_tokens=axes_of(batch[0]) + axes_of(batch[1]),
        over_vocabulary=axes_of(stored[0]),
        over_embed=axes_of(stored[1]),
        gradients=gradients,
    )
    # The table is cast before it is gathered: the gather then moves half the bytes.
    operands = (states, weight.astype(states.dtype), targets)
    if sharding.mesh.size == 1:
        result = run(*operands)
    else:
        result = sharding.per_device(
            run,
            in_specs=(batch, used, PartitionSpec(*batch[:2])),
            out_specs=(PartitionSpec(), batch, stored)[: _RESULTS[gradients]] if gradients else PartitionSpec(),
        )(*operands)
    if not gradients:
        return result
    # All of it before anything of the backward pass, or the whole gradient waits until the end to be cut.
    loss, of_states, *of_weight = jax.lax.optimization_barrier(result)
    return loss, of_states, *(gradient.astype(weight.dtype) for gradient in of_weight)


def _on_device(
    states: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    *,
    head: Head,
    over_tokens: tuple[str, ...],
    over_vocabulary: tuple[str, ...],
    over_embed: tuple[str, ...],
    gradients: Gradients | None,
) -> Any:
    """The loss of this device's tokens and, of its part of the vocabulary, the gradients."""
    rows = states.reshape(-1, states.shape[-1])
    size = chunk_tokens(rows.shape[0], weight.shape[0], on_cpu=head.sharding.platform == "cpu")
    padding = -rows.shape[0] % size
    chunks = (
        jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, rows.shape[1]),
        jnp.pad(targets.reshape(-1), (0, padding), constant_values=IGNORED).reshape(-1, size),
    )
    first = jax.lax.axis_index(over_vocabulary) * weight.shape[0] if over_vocabulary else 0
    tokens = first + jnp.arange(weight.shape[0])  # which token each row of this part of the table is

    def step(carry: Any, chunk: Any) -> Any:
        loss, of_weight = carry
        rows, targets = chunk
        scores = jnp.einsum("cd,vd->cv", rows, weight, preferred_element_type=jnp.float32)
        slope = None
        if head.softcap is not None:
            scores = jnp.tanh(scores / head.softcap)
            scores, slope = head.softcap * scores, 1 - jnp.square(scores)
        scores = jnp.where(tokens < head.vocab_size, scores, -jnp.inf)
        highest = _collective(jax.lax.pmax, jnp.max(scores, axis=1), over_vocabulary)
        exponentials = jnp.exp(scores - highest[:, None])
        total = _collective(jax.lax.psum, jnp.sum(exponentials, axis=1), over_vocabulary)
        hit = tokens == targets[:, None]
        score = _collective(jax.lax.psum, jnp.sum(jnp.where(hit, scores, 0), axis=1), over_vocabulary)
        counted = targets >= 0
        normaliser = jnp.log(total) + highest
        of_token = normaliser - score
        if head.z_loss:
            of_token += head.z_loss * jnp.square(normaliser)
        loss += jnp.sum(jnp.where(counted, of_token, 0))
        if not gradients:
            return (loss, of_weight), None
        softmax = exponentials / total[:, None]
        if head.z_loss:
            softmax *= 1 + 2 * head.z_loss * normaliser[:, None]
        of_scores = jnp.where(counted[:, None], softmax - hit, 0)
        of_scores = (of_scores if slope is None else of_scores * slope).astype(rows.dtype)
        if gradients == "both":
            of_weight += jnp.einsum("cv,cd->vd", of_scores, rows, preferred_element_type=jnp.float32)
        return (loss, of_weight), jnp.einsum("cv,vd->cd", of_scores, weight)

    # Not touched where no gradient of it is taken: the scan then carries an empty array.
    of_weight = jnp.zeros(weight.shape if gradients == "both" else (0,), jnp.float32)
    (loss, of_weight), of_rows = jax.lax.scan(step, (jnp.float32(0), of_weight), chunks)
    loss = _collective(jax.lax.psum, loss, over_tokens)
    if not gradients:
        return loss
    of_rows = of_rows.reshape(-1, rows.shape[1])[: rows.shape[0]].reshape(states.shape)
    of_rows = _collective(jax.lax.psum, of_rows, over_vocabulary)
    if gradients == "states":
        return loss, of_rows
    # The gradient's sum over the tokens' devices: to each its part where they hold the table in parts, in the precision
    # of the matmuls like every other weight's. A sum over tokens is beyond what float16 holds.
    if not (head.sharding.sums_wide(rows.dtype) or rows.dtype == jnp.float16):
        of_weight = of_weight.astype(rows.dtype)
    if over_embed:
        of_weight = jax.lax.psum_scatter(of_weight, over_embed, scatter_dimension=1, tiled=True)
    return loss, of_rows, _collective(jax.lax.psum, of_weight, tuple(a for a in over_tokens if a not in over_embed))


def _collective(operation: Any, value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return operation(value, axes) if axes else value
