"""Attention itself: weighted sums of values, in the form that suits the size and the device.

    plain      all scores at once: short sequences, and decoding, where there is one query
    blockwise  a block of queries at a time, forwards and backwards, so that scores never stand in memory as a whole
    cudnn      NVIDIA's fused kernel, for what it knows
    splash     TPU's (`tbjax.layers.splash`), likewise

Each computes the same function. `implementation=None` takes the device's kernel where it serves, and otherwise as large
a block as a fixed budget of scores allows, which for short sequences is all queries: plain. No form keeps scores for
the backward pass; all compute them again from queries and keys.

B batch, S queries, T keys, K key-value heads, G queries per key-value head, N head dimension, Q queries of a block.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tbjax.sharding import Sharding

Implementation: TypeAlias = Literal["plain", "blockwise", "cudnn", "splash"]
Arrays = TypeVar("Arrays")

# A masked score: finite, so that a row which may attend to nothing (left padding) stays finite too.
MASKED = -1e30

# Float32 scores on one device at a time: small beside a layer's activations at training lengths, and still large enough
# for efficient matmuls.
SCORE_BYTES = 64 * 2**20

# A block's queries are a multiple of this where not all of them fit: the width of the matrix units of TPUs, and a
# multiple of every tile of NVIDIA's.
BLOCK_MULTIPLE = 128

# What cuDNN's fused attention takes, as jax.nn.dot_product_attention checks it; wider heads only on newer devices.
CUDNN_CAPABILITY = 8.0
CUDNN_HEAD_DIM = 128

# Splash attention's blocks of queries and keys are multiples of a TPU's lanes, and whole ones must make the sequence.
SPLASH_MULTIPLE = 128


class Keys(NamedTuple):
    """What a query may look at, and from where."""

    query_slots: jax.Array  # [S] place of each query in the sequence of keys
    valid: (
        jax.Array | None
    )  # [B, T] bool: a real token stands there; None: everywhere, and queries and keys are the same
    positions: jax.Array  # [B, T] position of each key among its row's (or its document's) real tokens
    segments: jax.Array | None = None  # [B, T] the document of each key, which only its own queries see; None: one
    slots: jax.Array | None = None  # [T] place of each key in its sequence; None: they stand in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores are made of queries and keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[tuple[float, ...], ...] | None = None  # ALiBi's, [K, G]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Keys,
    scoring: Scoring,
    sharding: Sharding,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The values [B, T, K, N] that each query [B, S, K, G, N] attends to by the keys [B, T, K, N], summed."""
    if implementation not in (None, *get_args(Implementation)):
        known = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r} is unknown: tbjax knows {known}.")
    for name, kernel in KERNELS.items():
        if implementation in (None, name):
            reason = kernel.refuses(query, keys, scoring, sharding)
            if not reason:
                return _by_kernel(kernel, query, key, value, keys, scoring, sharding)
            if implementation == name:
                raise ValueError(f"implementation={name!r} does not serve here: {reason}.")
    on_device = sharding.shard_shape(("batch", None, "kv_heads", None, None), query.shape)
    rows, _, heads, group, _ = on_device
    block = block_queries(query.shape[1], key.shape[1], rows * heads * group)
    if implementation == "plain":
        block = query.shape[1]
    elif implementation == "blockwise":
        block = min(block, max(1, query.shape[1] // 2))
    return _blockwise(scoring, block, query, key, value, keys)


def block_queries(queries: int, keys: int, heads: int) -> int:
    """How many of `queries` are scored at once on a device with so many `heads`, over all of its rows."""
    fitting = SCORE_BYTES // (4 * keys * heads)
    if fitting >= queries:
        return queries
    blocks = math.ceil(queries / max(BLOCK_MULTIPLE, fitting))
    return min(queries, math.ceil(queries / blocks / BLOCK_MULTIPLE) * BLOCK_MULTIPLE)


# The kernels of devices.


class Kernel(NamedTuple):
    """Attention of one device's rows and heads, as a vendor wrote it."""

    # Why it does not serve, in words; empty where it does.
    refuses: Callable[[jax.Array, Keys, Scoring, Sharding], str]
    # The arguments are how scores are made, queries, keys, values and documents.
    run: Callable[[Scoring, jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def _by_kernel(
    kernel: Kernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Keys,
    scoring: Scoring,
    sharding: Sharding,
) -> jax.Array:
    dims = "batch", None, "kv_heads", None
    like_queries, like_keys = (sharding.activation(d, a.shape) for d, a in (((*dims, None), query), (dims, key)))
    rows = PartitionSpec(like_queries[0], None)
    # Per device: the compiler would otherwise ask JAX how to cut the kernel, which fails in a pipeline stage.
    run = sharding.per_device(partial(kernel.run, scoring), (like_queries, like_keys, like_keys, rows), like_queries)
    return run(query, key, value, keys.segments)


def _device(sharding: Sharding) -> Any:
    """One of the mesh's devices; None where it has but their number."""
    return sharding.mesh.devices.flat[0] if isinstance(sharding.mesh, Mesh) else None


def _padding_refused(keys: Keys) -> str:
    return "" if keys.valid is None else "it is used where queries and keys are the same tokens, without padding"


def _cudnn_refuses(query: jax.Array, keys: Keys, scoring: Scoring, sharding: Sharding) -> str:
    device = _device(sharding)
    if device is None or device.platform not in ("gpu", "cuda"):
        return "the mesh is not of NVIDIA GPUs"
    if float(getattr(device, "compute_capability", 0)) < CUDNN_CAPABILITY:
        return f"it needs compute capability {CUDNN_CAPABILITY}, {device.device_kind} is older"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs 16 bits, not {query.dtype}"
    if query.shape[-1] > CUDNN_HEAD_DIM or query.shape[-1] % 8:
        return f"it needs a head dimension up to {CUDNN_HEAD_DIM} and a multiple of 8, not {query.shape[-1]}"
    if scoring.softcap is not None or scoring.slopes is not None:
        return "it knows neither a cap of scores nor ALiBi"
    if keys.segments is not None:
        return "it knows no documents packed in a row (segments), but by a mask of all queries times all keys"
    return _padding_refused(keys)


def _cudnn(
    scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None
) -> jax.Array:
    b, s, k, g, n = query.shape
    out = jax.nn.dot_product_attention(
        query.reshape(b, s, k * g, n),
        key,
        value,
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if scoring.window is None else (scoring.window - 1, 0),
        implementation="cudnn",
    )
    return out.reshape(query.shape)


def _splash_refuses(query: jax.Array, keys: Keys, scoring: Scoring, sharding: Sharding) -> str:
    device = _device(sharding)
    if device is None or device.platform != "tpu":
        return "the mesh is not of TPUs"
    if query.dtype == jnp.float16:
        return "TPUs compute in bfloat16 or float32, not float16"
    if query.shape[1] % SPLASH_MULTIPLE:
        return f"it needs a sequence that is a multiple of {SPLASH_MULTIPLE}, not {query.shape[1]}"
    if scoring.slopes is not None:
        return "it knows no ALiBi"
    return _padding_refused(keys)


def _splash(
    scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None
) -> jax.Array:
    from tbjax.layers import splash  # Pallas takes long to import, and serves on TPUs alone

    return splash.attention(scoring, query, key, value, segments)


KERNELS: Mapping[str, Kernel] = {
    "cudnn": Kernel(_cudnn_refuses, _cudnn),
    "splash": Kernel(_splash_refuses, _splash),
}


# Blocks of queries. Written with its own backward pass: taken apart by the compiler's differentiation, a policy that
# keeps what it finds would keep the scores.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> jax.Array:
    if block >= query.shape[1]:
        return _block(scoring, query, key, value, keys)

    def step(_: None, queries: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, _block(scoring, queries[0], key, value, keys._replace(query_slots=queries[1]))

    _, out = jax.lax.scan(step, None, in_blocks(block, (query, keys.query_slots)))
    return joined(out, query.shape[1])


def _blockwise_forward(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> Any:
    return _blockwise(scoring, block, query, key, value, keys), (query, key, value, keys)


def _blockwise_backward(scoring: Scoring, block: int, kept: Any, of_out: jax.Array) -> Any:
    query, key, value, keys = kept

    def step(carry: Any, queries: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        query, slots, of_out = queries
        part = partial(_block, scoring, keys=keys._replace(query_slots=slots))
        _, pull = jax.vjp(part, query, key, value)
        of_query, *of_rest = pull(of_out)
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, tuple(of_rest)), of_query

    if block >= query.shape[1]:
        _, pull = jax.vjp(partial(_block, scoring, keys=keys), query, key, value)
        return *pull(of_out), None
    # Summed over the blocks in float32, whatever the precision of keys and values.
    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (key, value))
    queries = in_blocks(block, (query, keys.query_slots, of_out))
    (of_key, of_value), of_query = jax.lax.scan(step, zeros, queries)
    return joined(of_query, query.shape[1]), of_key.astype(key.dtype), of_value.astype(value.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _block(scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys) -> jax.Array:
    """Some of the queries [B, Q, K, G, N], all scores at once."""
    scores = _products(query, key) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores = scores + scoring.scale * alibi(scoring.slopes, keys.positions)
    scores = jnp.where(_visible(scoring, keys, key.shape[1]), scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return _sums(weights, value)


# Of a single query, as in decoding, products are spelled out in the order in which a cache lies, heads first. Given an
# einsum, XLA for the CPU puts keys and values first and turns all of them round, for every token anew.
_EACH_HEAD = ((0, 1), (0, 1))


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, K, G, Q, T], float32"""
    if query.shape[1] > 1:
        return jnp.einsum("bqkgn,btkn->bkgqt", query, key, preferred_element_type=jnp.float32)
    dims = ((3,), (3,)), _EACH_HEAD
    return jax.lax.dot_general(query[:, 0], key.swapaxes(1, 2), dims, preferred_element_type=jnp.float32)[:, :, :, None]


def _sums(weights: jax.Array, value: jax.Array) -> jax.Array:
    """[B, Q, K, G, N]"""
    if weights.shape[3] > 1:
        return jnp.einsum("bkgqt,btkn->bqkgn", weights, value)
    return jax.lax.dot_general(weights[:, :, :, 0], value.swapaxes(1, 2), (((3,), (2,)), _EACH_HEAD))[:, None]


def _visible(scoring: Scoring, keys: Keys, count: int) -> jax.Array:
    """[B, 1, 1, Q, T], or 1 for B: which keys each query may attend to."""
    distance = keys.query_slots[:, None] - (jnp.arange(count) if keys.slots is None else keys.slots)
    visible = distance >= 0
    if scoring.window is not None:
        visible &= distance < scoring.window
    visible = visible[None] if keys.valid is None else visible & keys.valid[:, None]
    if keys.segments is not None:
        visible &= keys.segments[:, keys.query_slots, None] == keys.segments[:, None]
    return visible[:, None, None]


def alibi(slopes: Any, positions: jax.Array) -> jax.Array:
    """[B, K, G, 1, T]: each head's slope [K, G] times the key's position, rounded to bfloat16 as Falcon was trained."""
    bias = jnp.asarray(slopes, jnp.bfloat16)[..., None] * positions.astype(jnp.bfloat16)[:, None, None]
    return bias[:, :, :, None].astype(jnp.float32)


def in_blocks(block: int, arrays: Arrays) -> Arrays:
    """Each [B, S, ...] or [S] as [blocks, B, Q, ...] or [blocks, Q]; what is missing in the last block is zeros."""

    def split(a: jax.Array) -> jax.Array:
        axis = min(1, a.ndim - 1)
        a = jnp.pad(a, [(0, -a.shape[axis] % block if i == axis else 0) for i in range(a.ndim)])
        shape = (*a.shape[:axis], -1, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    return jax.tree.map(split, arrays)


def joined(blocks: jax.Array, queries: int) -> jax.Array:
    """[blocks, B, Q, ...] as [B, S, ...]"""
    a = jnp.moveaxis(blocks, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :queries]
