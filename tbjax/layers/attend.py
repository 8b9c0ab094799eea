"""Attention itself: weighted sums of values, in the form that suits the size and the device.

    plain      all scores at once
    blockwise  a block of queries at a time (`tbjax.layers.blocks`), so that scores never stand in memory as a whole
    cudnn      NVIDIA's fused kernel, for what it knows
    splash     TPU's (`tbjax.layers.splash`), likewise

Each computes the same function. `implementation=None` takes the device's kernel where it serves, and otherwise as large
a block as a fixed budget of scores allows, which for the one query of decoding is all. No form keeps scores for the
backward pass; all compute them again from queries and keys. What attention gave can be kept ("attended" to
`tbjax.remat`): a kernel computes it again all the same, for the sums that it alone knows.

B batch, S queries, T keys, K key-value heads, G queries per key-value head, N head dimension.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from tbjax.layers.blocks import ATTENDED, Keys, Scoring, bands_of, block_queries, blockwise
from tbjax.sharding import Sharding

Implementation: TypeAlias = Literal["plain", "blockwise", "cudnn", "splash"]

# What cuDNN's fused attention takes, as jax.nn.dot_product_attention checks it; wider heads only on newer devices.
CUDNN_CAPABILITY = 8.0
CUDNN_HEAD_DIM = 128

# Splash attention's blocks of queries and keys are multiples of a TPU's lanes, and whole ones must make the sequence.
SPLASH_MULTIPLE = 128


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
                return checkpoint_name(_by_kernel(kernel, query, key, value, keys, scoring, sharding), ATTENDED)
            if implementation == name:
                raise ValueError(f"implementation={name!r} does not serve here: {reason}.")
    on_device = sharding.shard_shape(("batch", None, "kv_heads", None, None), query.shape)
    rows, _, heads, group, _ = on_device
    queries, bands = query.shape[1], ()
    if implementation == "plain":
        return blockwise(scoring, queries, bands, query, key, value, keys)
    if keys.valid is None:
        bands = bands_of(queries, scoring.window)
        queries = bands[0].last
    # Bands do not wait for each other, so the budget is that of all of them.
    block = block_queries(queries, key.shape[1], rows * heads * group * max(1, len(bands)))
    if implementation == "blockwise":
        block = min(block, max(1, query.shape[1] // 2))
    return blockwise(scoring, block, bands, query, key, value, keys)


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
