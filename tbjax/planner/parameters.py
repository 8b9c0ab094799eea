"""The parameters of a model, tensor by tensor, from its `ModelConfig` alone, and what one device holds of them.

The planner prices tens of thousands of layouts and must not build a model for any of them. So this file says again, as
arithmetic, which tensors a `Decoder` has and how `Sharding.parameter` cuts them; the tests hold both against the real
ones, path by path and byte by byte.

Tensors that are cut alike are summed once per model (`Shard`), so that a layout costs a handful of multiplications.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.workload import Layout
from tbjax.quantize import recipe
from tbjax.sharding import PARAMETER_AXES, Dims

# A TPU stores the two innermost dimensions of a 32-bit array in tiles of so many rows and columns, the last of them
# filled up.
TILE = (8, 128)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of the decoder: stacked over the layers that repeat, its vocabulary padded."""

    path: str
    dims: Dims
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the layers of a stack are its first dimension."""
        return self.dims[0] == "layers"

    @property
    def routed(self) -> bool:
        """Whether it belongs to experts, of which a token meets only some."""
        return "experts" in self.dims


class Shard(NamedTuple):
    """The elements of a model's parameters that are cut alike, whole and on one device."""

    axes: tuple[str, ...]  # the mesh axes that cut them
    stacked: bool  # layers of a stack, rather than the ends of the model
    matrix: bool  # two dimensions or more in one layer, as factored and orthogonal optimizers ask
    elements: int  # of the whole model
    local: int  # of one device
    tiled: int  # of one device where arrays are stored in tiles, as on TPU: see `tiled`
    largest: int  # of one device, of the largest single tensor


@functools.lru_cache(maxsize=256)
def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every parameter of the decoder, in the order of its tree."""
    table = ("vocab", "embed"), (config.padded_vocab, config.embed)
    found = [Tensor("embedding.weight", *table)]
    found += _norm("final_norm", config, config.embed)
    if not config.tie_embeddings:
        found.append(Tensor("head.weight", *table))
    for g, group in enumerate(config.groups):
        for position, kind in enumerate(group.pattern):
            found += [
                Tensor(f"stacks.{g}.{position}.{tensor.path}", ("layers", *tensor.dims), (group.repeats, *tensor.shape))
                for tensor in layer_tensors(config, kind)
            ]
    return tuple(found)


@functools.lru_cache(maxsize=256)
def layer_tensors(config: ModelConfig, kind: LayerKind) -> tuple[Tensor, ...]:
    """The parameters of one layer, not stacked, in the order of its tree."""
    d, q, kv = config.embed, config.heads * config.head_dim, config.kv_heads * config.head_dim
    found: list[Tensor] = []

    def linear(name: str, dims: Dims, out: int, into: int, bias: bool) -> None:
        if bias:
            # A bias follows the rows of its matrix; that of a row-parallel layer (rows `embed`) is held whole.
            found.append(Tensor(f"{name}.bias", (None if dims[0] == "embed" else dims[0],), (out,)))
        found.append(Tensor(f"{name}.weight", dims, (out, into)))

    def head_norm(name: str, features: int) -> None:
        if config.qk_norm:
            size = config.head_dim if config.qk_norm == "head" else features
            found.append(Tensor(f"{name}.weight", (None,), (size,)))

    linear("attention.key", ("kv_heads", "embed"), kv, d, config.qkv_bias)
    head_norm("attention.key_norm", kv)
    linear("attention.output", ("embed", "heads"), d, q, config.attention_out_bias)
    linear("attention.query", ("heads", "embed"), q, d, config.qkv_bias)
    head_norm("attention.query_norm", q)
    linear("attention.value", ("kv_heads", "embed"), kv, d, config.qkv_bias)
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    if before:
        found += _norm("attention_norm", config, d)
    if after:
        found += _norm("attention_post_norm", config, d)
    if kind.sparse:
        e, f = config.experts.experts, config.experts.mlp
        found.append(Tensor("mlp.down", ("experts", "mlp", "embed"), (e, f, d)))
        found.append(Tensor("mlp.gate", ("experts", "embed", "mlp"), (e, d, f)))
        found.append(Tensor("mlp.router.weight", (None, "embed"), (e, d)))
        found.append(Tensor("mlp.up", ("experts", "embed", "mlp"), (e, d, f)))
    else:
        linear("mlp.down", ("embed", "mlp"), d, config.mlp, config.mlp_bias)
        if config.gated_mlp:
            linear("mlp.gate", ("mlp", "embed"), config.mlp, d, config.mlp_bias)
        linear("mlp.up", ("mlp", "embed"), config.mlp, d, config.mlp_bias)
    if before and config.block != "shared":
        found += _norm("mlp_norm", config, d)
    if after:
        found += _norm("mlp_post_norm", config, d)
    return tuple(found)


def _norm(name: str, config: ModelConfig, features: int) -> list[Tensor]:
    parts = ("bias", "weight") if config.norm == "layer" else ("weight",)
    return [Tensor(f"{name}.{part}", (None,), (features,)) for part in parts]


@functools.lru_cache(maxsize=256)
def parameters(config: ModelConfig) -> int:
    """How many parameters the model has, the padding of its vocabulary not counted."""
    return sum(tensor.count for tensor in tensors(config)) - _padding(config)


@functools.lru_cache(maxsize=256)
def active_parameters(config: ModelConfig) -> int:
    """How many of them a token meets: of the experts, only those that it is sent to."""
    idle = 0
    if config.moe is not None:
        routed = sum(tensor.count for tensor in tensors(config) if tensor.routed)
        idle = routed * (config.moe.experts - config.moe.experts_per_token) // config.moe.experts
    return parameters(config) - idle


def _padding(config: ModelConfig) -> int:
    tables = 1 if config.tie_embeddings else 2
    return tables * (config.padded_vocab - config.vocab_size) * config.embed


def shards(config: ModelConfig, layout: Layout, *, cut: bool | None = None) -> tuple[Shard, ...]:
    """The parameters as `Sharding.parameter` lays them on the layout's mesh, those that are cut alike together.

    `cut` says whether fsdp cuts them; by default the strategy says, and optimizer state, for one, asks otherwise.
    Raises where a dimension does not divide, save for layers over pp: the fullest stage counts.
    """
    cut = layout.strategy.cuts_parameters if cut is None else cut
    return _shards(config, layout.pp, layout.fsdp, layout.ep, layout.tp, cut)


@functools.lru_cache(maxsize=4096)
def _shards(config: ModelConfig, pp: int, fsdp: int, ep: int, tp: int, cut: bool) -> tuple[Shard, ...]:
    sizes = {"pp": pp, "fsdp": fsdp, "ep": ep, "tp": tp}
    sums: dict[tuple[tuple[str, ...], bool, bool], list[int]] = {}
    for tensor in tensors(config):
        ways = _ways(tensor, sizes, cut)
        axes = tuple(axis for axes in ways for axis in axes)
        # Layers need not divide over the stages: the fullest stage counts.
        held = [
            -(-size // math.prod(sizes[axis] for axis in axes)) for size, axes in zip(tensor.shape, ways, strict=True)
        ]
        layers, rest = (held[0], held[1:]) if tensor.stacked else (1, held)
        total = sums.setdefault((axes, tensor.stacked, len(rest) > 1), [0, 0, 0, 0])
        total[0] += tensor.count
        total[1] += math.prod(held)
        total[2] += layers * tiled(rest)
        total[3] = max(total[3], math.prod(held))
    return tuple(Shard(*key, *values) for key, values in sums.items())


def tiled(shape: Sequence[int]) -> int:
    """The elements that an array takes in tiles of 8 x 128, as TPUs store what a program computes."""
    if len(shape) < 2:
        return math.prod(shape)
    *outer, rows, columns = shape
    return math.prod(outer) * (-(-rows // TILE[0]) * TILE[0]) * (-(-columns // TILE[1]) * TILE[1])


def _ways(tensor: Tensor, sizes: dict[str, int], cut: bool) -> list[tuple[str, ...]]:
    """The mesh axes that cut each dimension of a tensor: `Sharding.parameter` again, on sizes alone."""
    axes_of = {dim: PARAMETER_AXES.get(dim or "", ()) for dim in tensor.dims}
    if not cut:
        axes_of["embed"] = ()
    firsts = {axes[0]: dim for dim, axes in axes_of.items() if axes}
    result = []
    for dim, size in zip(tensor.dims, tensor.shape, strict=True):
        mine = tuple(a for a in axes_of[dim] if firsts.setdefault(a, dim) == dim and sizes.get(a, 1) > 1)
        degree = math.prod(sizes[axis] for axis in mine)
        if size % degree and dim == "kv_heads":
            mine = ()  # few key-value heads are held by every tp device
        elif size % degree and dim != "layers":
            raise ValueError(
                f"{tensor.path}: dimension {dim!r} of size {size} does not divide over {'*'.join(mine)}={degree}"
            )
        result.append(mine)
    return result


def bytes_per_device(config: ModelConfig, layout: Layout, each: float, quantization: str | None) -> int:
    """What one device's parameters take, of `each` bytes where they are not quantised."""
    cut = layout.strategy.cuts_parameters
    return _bytes_per_device(config, layout.pp, layout.fsdp, layout.ep, layout.tp, cut, each, quantization)


@functools.lru_cache(maxsize=4096)
def _bytes_per_device(
    config: ModelConfig, pp: int, fsdp: int, ep: int, tp: int, cut: bool, each: float, quantization: str | None
) -> int:
    sizes, rules, total = {"pp": pp, "fsdp": fsdp, "ep": ep, "tp": tp}, recipe(quantization), 0.0
    for tensor in tensors(config):
        ways = [math.prod(sizes[axis] for axis in axes) for axes in _ways(tensor, sizes, cut)]
        held = [-(-size // degree) for size, degree in zip(tensor.shape, ways, strict=True)]
        encoding = None if rules is None else rules.encoding(tensor.path)
        inputs = 1 + tensor.stacked
        if encoding is None or len(held) <= inputs:
            total += each * math.prod(held)
            continue
        total += encoding.bits / 8 * math.prod(held)
        groups = encoding.groups(tensor.shape[inputs], tensor.path)
        # A cut that goes through a group leaves scales and offsets whole.
        held[inputs] = groups if groups == 1 or groups % ways[inputs] else groups // ways[inputs]
        total += encoding.frame_bytes * math.prod(held)
    return round(total)


@functools.lru_cache(maxsize=4096)
def stage_layers(config: ModelConfig, stages: int, pieces: int = 1) -> int:
    """Layers of the fullest stage of a pipeline, `pieces` of the model on each: all pieces as long as the longest.

    A piece has whole repeats of the model's pattern, as `tbjax.cut` has it.
    """
    if stages == 1:
        return config.layers
    return sum(-(-group.repeats // (stages * pieces)) * len(group.pattern) * pieces for group in config.groups)


def elements_per_device(config: ModelConfig, layout: Layout, *, cut: bool | None = None) -> int:
    """Parameters that one device holds, the most of any pipeline stage."""
    return sum(shard.local for shard in shards(config, layout, cut=cut))
