"""Splash attention on one device: the kernel for TPUs that JAX ships, written in Pallas.

Scores stay in the chip's vector memory, a block of queries times a block of keys at a time, and a block that no query
sees is not computed at all: of a causal square about half, of a window's all but a band. So it costs half the products
of attention that masks what it has computed, and nothing but queries, keys, values and sums passes through HBM.

What it takes the place of: attention in blocks of queries, with its gradients, for one sequence of 4096 tokens and 16
heads of 128, libtpu puts at 9.1 ms on a v5p (35.6 ms for 8192), a ninth of the chip's peak, since scores go to HBM and
back. Of kernels it gives no estimate. Its peak of memory falls from 180 to 89 MiB (8192: from 264 to 177), and on a v5e
from 153 to 112 (197 to 192).

`tbjax.layers.attend` says when it serves. The kernel takes one sequence, its heads in front, and does not scale.

B batch, S queries and keys, K key-value heads, G queries per key-value head, N head dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tbjax.layers.attend import SPLASH_MULTIPLE
from tbjax.layers.blocks import Scoring

# Queries and keys of a block: the largest that divides the sequence. The wider, the more often what has been fetched is
# used, and the more vector memory is taken; 512 is MaxText's default (`sa_block_q` and its like in its base.yml).
BLOCKS = (512, 256, SPLASH_MULTIPLE)


def attention(
    scoring: Scoring,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """What queries [B, S, K, G, N] sum of values [B, S, K, N]. `interpret` runs the kernel where there is no TPU."""
    b, s, k, g, n = query.shape
    block = next(size for size in BLOCKS if s % size == 0)
    mask = splash.CausalMask((s, s))
    if scoring.window is not None and scoring.window < s:
        mask = splash.LocalMask((s, s), window_size=(scoring.window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * (k * g)),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block,  # forwards
            block_q_dkv=block, block_kv_dkv=block,  # the gradients of keys and values
            block_q_dq=block, block_kv_dq=block,  # that of queries
        ),
        attn_logits_soft_cap=scoring.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    scaled = (query.astype(jnp.float32) * scoring.scale).astype(query.dtype)
    heads_first = (jnp.moveaxis(a, 1, 2) for a in (scaled.reshape(b, s, k * g, n), key, value))
    documents = None if segments is None else splash.SegmentIds(q=segments, kv=segments)
    out: Any = jax.vmap(kernel)(*heads_first, documents)
    return jnp.moveaxis(out, 1, 2).reshape(query.shape)
