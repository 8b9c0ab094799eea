"""Token embeddings cut over tp, by vocabulary or by embedding.

A vocabulary that does not divide is padded with rows of zeros, inside and nowhere visible: the padded rows are never
looked up, never exported, and `logits` drops their scores.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tbjax.config import VOCAB_MULTIPLE
from tbjax.layers.linear import as_sharding, parameter
from tbjax.sharding import Sharding


class TensorParallelEmbedding(nnx.Module):
    """Rows of a table by token id; the same table read the other way scores the tokens (`logits`).

    `split="vocab"` gives each tp device some tokens: a lookup is summed over tp. `split="embedding"` gives each some
    features of every token.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mesh: Mesh | Sharding | None = None,
        *,
        split: Literal["vocab", "embedding"] = "vocab",
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        if split not in ("vocab", "embedding"):
            raise ValueError(f"split={split!r}: an embedding is split by 'vocab' or by 'embedding'.")
        self.sharding = as_sharding(mesh)
        self.num_embeddings = num_embeddings
        self.split = split
        # "mlp" stands for any feature dimension that tp cuts.
        rows, dims = num_embeddings, (None, "mlp")
        if split == "vocab":
            rows, dims = -(-num_embeddings // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, ("vocab", "embed")
        key = jax.random.key(0) if key is None else key
        self.weight = parameter(key, (rows, embedding_dim), dims, dtype, self.sharding)
        if rows != num_embeddings:
            value = self.weight[...]
            self.weight[...] = jnp.where(jnp.arange(rows)[:, None] < num_embeddings, value, jnp.zeros_like(value))

    def __call__(self, tokens: jax.Array, dtype: Any = None) -> jax.Array:
        """The rows of `tokens` [B, S], in `dtype` (default: the table's)."""
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [batch, sequence], not {tokens.dtype}{list(tokens.shape)}.")
        return self.sharding.residual(self.sharding.lookup(tokens, self.weight, dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """The score of every token: x [B, S, D] against each row."""
        if x.ndim != 3:
            raise ValueError(f"x must be [batch, sequence, features], not {list(x.shape)}.")
        scores = self.sharding.project(x, self.weight)
        scores = self.sharding.constrain(scores, "batch", "sequence", "vocab" if self.split == "vocab" else None)
        return scores[..., : self.num_embeddings]
