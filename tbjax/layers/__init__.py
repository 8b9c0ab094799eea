"""The layers that the decoder is made of, for building with."""

from tbjax.layers.attention import Attention
from tbjax.layers.embedding import TensorParallelEmbedding
from tbjax.layers.linear import ColumnParallelLinear, RowParallelLinear
from tbjax.layers.mlp import MLP
from tbjax.layers.moe import MixtureOfExperts
from tbjax.layers.norm import LayerNorm, RMSNorm

__all__ = [
    "MLP",
    "Attention",
    "ColumnParallelLinear",
    "LayerNorm",
    "MixtureOfExperts",
    "RMSNorm",
    "RowParallelLinear",
    "TensorParallelEmbedding",
]
