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


class _Sums(NamedTuple):
    """What the softmax of each query [B, S, K, G] was made of, from which its weights are known again."""

    highest: jax.Array  # of its scores
    share: jax.Array  # one over the sum of the exponentials of its scores less the highest; zero of no query


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> jax.Array:
    return _summed_blockwise(scoring, block, query, key, value, keys)[0]


def _summed_blockwise(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> tuple[jax.Array, _Sums]:
    if block >= query.shape[1]:
        return _block(scoring, query, key, value, keys)

    def step(_: None, queries: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, _Sums]]:
        return None, _block(scoring, queries[0], key, value, keys._replace(query_slots=queries[1]))

    _, blocks = jax.lax.scan(step, None, in_blocks(block, (query, keys.query_slots)))
    return jax.tree.map(lambda a: joined(a, query.shape[1]), blocks)


def _blockwise_forward(
    scoring: Scoring, block: int, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys
) -> Any:
    out, sums = _summed_blockwise(scoring, block, query, key, value, keys)
    return out, (query, key, value, keys, out, sums)


def _blockwise_backward(scoring: Scoring, block: int, kept: Any, of_out: jax.Array) -> Any:
    query, key, value, keys, *rest = kept

    def pull(query: jax.Array, slots: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _block_gradients(scoring, query, key, value, keys._replace(query_slots=slots), *rest)

    if block >= query.shape[1]:
        return *pull(query, keys.query_slots, *rest, of_out), None

    def step(carry: Any, queries: Any) -> Any:
        of_query, *of_rest = pull(*queries)
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, tuple(of_rest)), of_query

    # Summed over the blocks in float32, whatever the precision of keys and values.
    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (key, value))
    queries = in_blocks(block, (query, keys.query_slots, *rest, of_out))
    (of_key, of_value), of_query = jax.lax.scan(step, zeros, queries)
    return joined(of_query, query.shape[1]), of_key.astype(key.dtype), of_value.astype(value.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# Products are spelled out in the order in which a cache lies, heads first. Given an einsum for the one query of
# decoding, XLA for the CPU puts keys and values first and turns all of them round, for every token anew.
_EACH_HEAD = ((0, 1), (0, 1))


def _block(scoring: Scoring, query: jax.Array, key: jax.Array, value: jax.Array, keys: Keys) -> tuple[jax.Array, _Sums]:
    """Some of the queries [B, Q, K, G, N], all scores at once."""
    (query,), (key, value) = _heads_first(query), _keys_heads_first(key, value)
    scores = _scored(scoring, keys, _products(query, key))
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - highest)
    share = 1 / jnp.sum(exponentials, axis=-1, keepdims=True)
    weights = (exponentials * share).astype(value.dtype)
    out = jax.lax.dot_general(weights, value, (((4,), (2,)), _EACH_HEAD))
    return jnp.moveaxis(out, 3, 1), _Sums(*(jnp.moveaxis(a[..., 0], 3, 1) for a in (highest, share)))


def _block_gradients(
    scoring: Scoring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: Keys,
    out: jax.Array,
    sums: _Sums,
    of_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of `_block`'s queries, keys and values. Of a softmax's gradient the part that sums over all keys is the
    product of what came out and its gradient, so nothing is summed over the scores."""
    (query, of_out), (key, value) = _heads_first(query, of_out), _keys_heads_first(key, value)
    scores, pull = jax.vjp(partial(_scored, scoring, keys), _products(query, key))
    highest, share = (a[..., None] for a in _heads_first(*sums))
    weights = jnp.exp(scores - highest) * share
    of_weights = jnp.einsum("bkgqn,bktn->bkgqt", of_out, value, preferred_element_type=jnp.float32)
    shared = jnp.sum(_heads_first(out)[0].astype(jnp.float32) * of_out.astype(jnp.float32), axis=-1, keepdims=True)
    (of_products,) = pull(weights * (of_weights - shared))
    of_products, weights = of_products.astype(query.dtype), weights.astype(value.dtype)
    of_query = jnp.einsum("bkgqt,bktn->bkgqn", of_products, key)
    # Written so that where a CPU has to turn an operand it is not the scores.
    of_key = jnp.einsum("bkgqn,bkgqt->bknt", query, of_products)
    of_value = jnp.einsum("bkgqn,bkgqt->bknt", of_out, weights)
    return jnp.moveaxis(of_query, 3, 1), jnp.moveaxis(of_key, 3, 1), jnp.moveaxis(of_value, 3, 1)


def _heads_first(*queries: jax.Array) -> list[jax.Array]:
    """Each [B, Q, K, G, ...] as [B, K, G, Q, ...]. Otherwise a CPU would turn the scores, which are far larger."""
    return [jnp.moveaxis(a, 1, 3) for a in queries]


def _keys_heads_first(*keys: jax.Array) -> list[jax.Array]:
    """Each [B, T, K, N] as [B, K, T, N]."""
    return [jnp.moveaxis(a, 1, 2) for a in keys]


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """[B, K, G, Q, T], float32"""
    return jax.lax.dot_general(query, key, (((4,), (3,)), _EACH_HEAD), preferred_element_type=jnp.float32)


def _scored(scoring: Scoring, keys: Keys, products: jax.Array) -> jax.Array:
    """The scores that the products of queries and keys give."""
    scores = products * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    if scoring.slopes is not None:
        scores = scores + scoring.scale * alibi(scoring.slopes, keys.positions)
    return jnp.where(_visible(scoring, keys, products.shape[-1]), scores, MASKED)


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
