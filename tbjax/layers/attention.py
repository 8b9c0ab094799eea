"""Grouped-query attention, cut over tp by whole heads whatever their number.

Queries are grouped by the key-value head they read: q [B, S, K, G, N] against k, v [B, T, K, N]. To give each tp device
whole heads, a `HeadLayout` repeats key-value heads (8 heads on tp=16: each twice, with half of its queries) or pads
them (3 heads on tp=2: one of zeros), whichever costs less; where tp divides the heads, as is usual, it does nothing.
The weights keep the checkpoint's heads either way: repeating and padding happen to activations, so export never sees
them.

B batch, S queries, T keys, K key-value heads, G queries per key-value head, N head dimension.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tbjax import native
from tbjax.config import LayerKind, ModelConfig
from tbjax.layers.attend import attend
from tbjax.layers.blocks import Keys, Scoring
from tbjax.layers.context import CutKeys, attend_over_context
from tbjax.layers.linear import ColumnParallelLinear, RowParallelLinear
from tbjax.layers.norm import RMSNorm
from tbjax.layers.ring import LayerCache
from tbjax.layers.rope import rotate
from tbjax.room import heads_are_whole
from tbjax.sharding import Sharding


class HeadLayout(NamedTuple):
    """How K key-value heads with G queries each are laid out over tp: (kv_heads * repeat + padding) x group."""

    kv_heads: int
    queries: int  # per key-value head, before repeating
    repeat: int  # copies of each key-value head, which share its queries out
    padding: int  # key-value heads of zeros

    @classmethod
    def fit(cls, heads: int, kv_heads: int, tp: int) -> "HeadLayout":
        """The layout with the fewest key-value heads, then the fewest query heads, on each device."""
        queries = heads // kv_heads

        def cost(repeat: int) -> tuple[int, int, int]:
            on_device = -(-kv_heads * repeat // tp)
            return on_device, on_device * -(-queries // repeat), repeat

        repeat = min(range(1, queries + 1), key=cost)
        return cls(kv_heads, queries, repeat, -kv_heads * repeat % tp)

    @classmethod
    def stored(cls, heads: int, kv_heads: int) -> "HeadLayout":
        """As the weights have them."""
        return cls(kv_heads, heads // kv_heads, 1, 0)

    @property
    def plain(self) -> bool:
        """Whether heads are laid out as the weights have them."""
        return self.repeat == 1 and not self.padding

    @property
    def group(self) -> int:
        return -(-self.queries // self.repeat)

    @property
    def total(self) -> int:
        return self.kv_heads * self.repeat + self.padding

    def spread_queries(self, q: jax.Array) -> jax.Array:
        """[B, S, H, N] -> [B, S, total, group, N]"""
        b, s, _, n = q.shape
        q = q.reshape(b, s, self.kv_heads, self.queries, n)
        q = _pad(q, 3, self.repeat * self.group - self.queries)
        return _pad(q.reshape(b, s, self.kv_heads * self.repeat, self.group, n), 2, self.padding)

    def spread_keys(self, k: jax.Array) -> jax.Array:
        """[B, T, K, N] -> [B, T, total, N]"""
        if self.repeat > 1:
            k = jnp.repeat(k, self.repeat, axis=2)
        return _pad(k, 2, self.padding)

    def collect(self, out: jax.Array) -> jax.Array:
        """[B, S, total, group, N] -> [B, S, H, N], the inverse of `spread_queries`."""
        b, s, *_, n = out.shape
        out = out[:, :, : self.kv_heads * self.repeat].reshape(b, s, self.kv_heads, self.repeat * self.group, n)
        return out[:, :, :, : self.queries].reshape(b, s, self.kv_heads * self.queries, n)


class Attention(nnx.Module):
    """Projections, rotary positions or ALiBi, the attention itself, and the projection back."""

    def __init__(self, config: ModelConfig, kind: LayerKind, sharding: Sharding, *, dtype: Any, key: Any) -> None:
        self.config = config
        self.kind = kind
        self.sharding = sharding
        self.layout = HeadLayout.fit(config.heads, config.kv_heads, sharding.size("tp"))
        d, q, kv = config.embed, config.heads * config.head_dim, config.kv_heads * config.head_dim
        keys = jax.random.split(key, 4)
        column = {"gather_output": False, "use_bias": config.qkv_bias, "dtype": dtype}
        self.query = ColumnParallelLinear(d, q, sharding, features="heads", key=keys[0], **column)
        self.key = ColumnParallelLinear(d, kv, sharding, features="kv_heads", key=keys[1], **column)
        self.value = ColumnParallelLinear(d, kv, sharding, features="kv_heads", key=keys[2], **column)
        self.output = RowParallelLinear(
            q, d, sharding, use_bias=config.attention_out_bias, input_is_parallel=True,
            features="heads", dtype=dtype, key=keys[3],
        )  # fmt: skip
        norm = {"epsilon": config.norm_epsilon, "offset": config.norm_offset, "dtype": dtype, "key": key}
        normed = (config.head_dim,) * 2 if config.qk_norm == "head" else (q, kv)
        self.query_norm = RMSNorm(normed[0], sharding, **norm) if config.qk_norm else None
        self.key_norm = RMSNorm(normed[1], sharding, **norm) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        keys: Keys | CutKeys,
        angles: tuple[jax.Array, jax.Array] | None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The attention's output for x [B, S, D], and the layer's cache with x's keys and values written in."""
        query, key, value = (
            checkpoint_name(made(x), name)
            for made, name in ((self.query, "query"), (self.key, "key"), (self.value, "value"))
        )
        if self.config.qk_norm == "full":
            query, key = self._norm(query, key)
        as_stored = cache is not None and heads_are_whole(self.config, self.sharding.size("tp"))
        query, key, value = (self._whole(a, always=as_stored) for a in (query, key, value))
        query, key, value = (a.reshape(*a.shape[:2], -1, self.config.head_dim) for a in (query, key, value))
        if self.config.qk_norm == "head":
            query, key = self._norm(query, key)
        if angles is not None:
            query, key = native.laid_heads_first(rotate(query, *angles)), rotate(key, *angles)
        # Only where attention takes it in parts does the sequence stay cut.
        sequence = "sequence" if isinstance(keys, CutKeys) else None
        layout = HeadLayout.stored(self.config.heads, self.config.kv_heads) if as_stored else self.layout
        query = self._over_heads(layout.spread_queries(query), sequence)
        key, value = (self._over_heads(layout.spread_keys(a), sequence) for a in (key, value))
        scoring = self._scoring(layout)
        if isinstance(keys, CutKeys):
            out = attend_over_context(query, key, value, keys, scoring, self.sharding)
        else:
            if cache is not None:
                cache, key, value, keys = cache.write(key, value, keys, self.config, self.sharding)
            out = attend(query, key, value, keys, scoring, self.sharding)
        out = layout.collect(self._whole(self._over_heads(out, sequence)))
        return self.output(native.heads_joined(out, x.dtype)), cache

    def _whole(self, a: jax.Array, *, always: bool = False) -> jax.Array:
        """All heads on every tp device: `always`, or in a pipeline stage where they are laid out unlike the weights.

        What a device has of the features may end within a head. The compiler would fetch the rest from neighbours, once
        for each half that rope turns (nine permutes and all-to-alls a layer of Falcon-180B over tp=16 on TPU), and in a
        pipeline by permutes for which all stages have to wait, whatever they do.
        """
        if not always and (self.layout.plain or not self.sharding.in_stage):
            return a
        return self.sharding.constrain(a, "batch", "sequence", *[None] * (a.ndim - 2))

    def _norm(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)

    def _scoring(self, layout: HeadLayout) -> Scoring:
        config = self.config
        slopes = None
        if config.alibi:
            with jax.ensure_compile_time_eval():
                spread = layout.spread_queries(jnp.asarray(alibi_slopes(config.heads)).reshape(1, 1, -1, 1))
                slopes = tuple(tuple(group) for group in np.asarray(spread)[0, 0, :, :, 0].tolist())
        return Scoring(
            scale=config.head_dim**-0.5 if config.query_scale is None else config.query_scale,
            window=self.kind.window,
            softcap=config.attention_softcap,
            slopes=slopes,
        )

    def _over_heads(self, a: jax.Array, sequence: str | None) -> jax.Array:
        return self.sharding.constrain(a, "batch", sequence, "kv_heads", *[None] * (a.ndim - 3))


def alibi_slopes(heads: int) -> list[float]:
    """A geometric series over the heads; beyond a power of two, every other term of the series for the next."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    return slopes + [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole) + 1, 2)]


def _pad(a: jax.Array, axis: int, amount: int) -> jax.Array:
    return jnp.pad(a, [(0, amount if i == axis else 0) for i in range(a.ndim)]) if amount else a
