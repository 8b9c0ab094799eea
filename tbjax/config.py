"""One architecture, in our own words.

Every family of checkpoints is translated into a `ModelConfig` (see `interop/families`); the decoder, the planner and
the loader read nothing else. A field stands here only if it changes what the network computes or a weight's shape.

Layers need not be alike: a `LayerKind` says what may differ from one layer to the next, and `ModelConfig.groups` finds
the repeating pattern in them, so that the decoder can stack equal layers and scan over the stacks however the kinds
alternate.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

from tbjax.shown import changed

# Weights over the vocabulary are padded to a multiple of this, so that every usual degree of tensor parallelism divides
# them and their shape does not depend on the mesh (most large families' vocabularies are multiples already).
VOCAB_MULTIPLE = 128

# A pattern longer than this is not worth compiling as one scan body; such layers are grouped as runs of equal kinds.
LONGEST_PATTERN = 8


RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "both"]
BlockKind = Literal["sequential", "parallel", "shared"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
QKNorm = Literal["head", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: the base, the part of a head that turns, how frequencies stretch beyond the trained length."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    fraction: float = 1.0  # of head_dim that is rotated
    factor: float = 1.0  # linear, dynamic, yarn, llama3: the stretch
    original_positions: int = 0  # all but default and linear: the length before the stretch
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are multiplied by it
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whether the correction range is rounded to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope, one per frequency, up to original_positions
    long_factors: tuple[float, ...] = ()  # longrope, beyond

    __repr__ = changed

    def __post_init__(self) -> None:
        _known("Rope", "kind", self.kind, RopeKind)
        if self.kind not in ("default", "linear") and self.original_positions < 1:
            raise ValueError(
                f"Rope.original_positions={self.original_positions}: {self.kind} stretches from a trained length."
            )
        if self.kind == "longrope" and not (self.short_factors and len(self.short_factors) == len(self.long_factors)):
            raise ValueError(
                f"Rope.short_factors and long_factors have {len(self.short_factors)} and {len(self.long_factors)} "
                "values: longrope needs as many of each, one for each frequency."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts: dropless, `experts_per_token` of `experts` chosen by a softmax router."""

    experts: int
    experts_per_token: int
    mlp: int  # the width of one expert
    normalize_weights: bool = True  # whether the chosen experts' weights are made to sum to one
    auxiliary_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("experts", "experts_per_token", "mlp"):
            _positive("MoE", name, getattr(self, name))
        if self.experts_per_token > self.experts:
            raise ValueError(f"MoE.experts_per_token={self.experts_per_token} exceeds MoE.experts={self.experts}.")


class LayerKind(NamedTuple):
    """What may differ from layer to layer."""

    window: int | None = None  # sliding-window attention over so many positions, the token itself included
    sparse: bool = False  # a mixture of experts in place of the dense MLP


class Group(NamedTuple):
    """`pattern` repeated `repeats` times, starting at layer `first`: one scan of the decoder."""

    pattern: tuple[LayerKind, ...]
    repeats: int
    first: int


class LayerPlace(NamedTuple):
    """Where a layer's weights lie: row `repeat` of the stack at `position` in the pattern of group `group`."""

    group: int
    position: int
    repeat: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model."""

    family: str
    vocab_size: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_kinds: tuple[LayerKind, ...]
    max_positions: int

    # Blocks.
    norm: Norm = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # Gemma stores its scales minus one
    # "pre": x + f(norm(x)). "post": x + norm(f(x)) (OLMo 2). "both": x + norm(f(norm(x))) (Gemma 2, 3).
    norm_placement: NormPlacement = "pre"
    # "sequential": attention, then MLP. "parallel": each from its own norm of x, "shared": both from one (Falcon).
    block: BlockKind = "sequential"
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    moe: MoE | None = None

    # Attention.
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    window_rope: Rope | None = None  # for layers with a window, where it differs (Gemma 3)
    alibi: bool = False
    qk_norm: QKNorm | None = None  # queries and keys, per head (Qwen 3, Gemma 3) or over all heads at once (OLMo 2)
    query_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None

    # Ends.
    embed_scale: float | None = None
    tie_embeddings: bool = False
    logits_softcap: float | None = None

    dtype: str = "float32"  # of the checkpoint

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed", "mlp", "heads", "kv_heads", "head_dim", "max_positions"):
            _positive("ModelConfig", name, getattr(self, name))
        for name, kind in (
            ("norm", Norm), ("norm_placement", NormPlacement), ("block", BlockKind), ("activation", Activation),
        ):  # fmt: skip
            _known("ModelConfig", name, getattr(self, name), kind)
        if self.qk_norm is not None:
            _known("ModelConfig", "qk_norm", self.qk_norm, QKNorm)
        if not self.layer_kinds:
            raise ValueError("ModelConfig.layer_kinds is empty: a decoder needs at least one layer.")
        if self.heads % self.kv_heads:
            raise ValueError(f"ModelConfig.heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.moe is None and any(kind.sparse for kind in self.layer_kinds):
            raise ValueError("ModelConfig.layer_kinds has sparse layers but ModelConfig.moe is None.")
        for index, kind in enumerate(self.layer_kinds):
            if kind.window is not None:
                _positive(f"ModelConfig.layer_kinds[{index}]", "window", kind.window)
        for name in ("rope", "window_rope"):
            rope = getattr(self, name)
            if rope is not None and int(self.head_dim * rope.fraction) % 2:
                raise ValueError(
                    f"ModelConfig.head_dim={self.head_dim}: {name} turns features in pairs, so the part that it turns "
                    f"(a share of {rope.fraction}) must be even."
                )

    def __repr__(self) -> str:
        kinds = " + ".join(f"{group.pattern!r} * {group.repeats}" for group in self.groups)
        return changed(self, layer_kinds=kinds)

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def experts(self) -> MoE:
        """The mixture of experts of a model that has one."""
        if self.moe is None:
            raise ValueError(f"this {self.family} model has no experts.")
        return self.moe

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers as few repeated patterns: one group for most models, a second for a remainder."""
        return tuple(_groups(self.layer_kinds, 0))

    def place(self, layer: int) -> LayerPlace:
        """Where the weights of `layer` lie in the stacks."""
        for g, group in enumerate(self.groups):
            offset = layer - group.first
            if offset < group.repeats * len(group.pattern):
                index, position = divmod(offset, len(group.pattern))
                return LayerPlace(g, position, index)
        raise IndexError(f"layer {layer} of a model with {self.layers} layers")


def _positive(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}.{name} must be a positive integer, not {value!r}.")


def _known(owner: str, name: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{owner}.{name}={value!r} is unknown: tbjax knows {', '.join(map(repr, get_args(kind)))}.")


def _groups(kinds: tuple[LayerKind, ...], first: int) -> list[Group]:
    if not kinds:
        return []
    for period in range(1, min(LONGEST_PATTERN, len(kinds)) + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))) and (
            len(kinds) >= 2 * period or period == 1
        ):
            used = len(kinds) // period * period
            return [Group(kinds[:period], used // period, first), *_groups(kinds[used:], first + used)]
    run = next(i for i in range(1, len(kinds) + 1) if i == len(kinds) or kinds[i] != kinds[0])
    return [Group(kinds[:1], run, first), *_groups(kinds[run:], first + run)]
