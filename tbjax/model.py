"""One decoder for every family: embed, scan over blocks, norm, head.

Layers that repeat the same pattern of kinds are stacked, one array for all, and the decoder scans over the stack, so
that neither the program nor its compile time grows with depth. `scan=False` runs the same weights as a Python loop.
Paths of parameters read `stacks.<group>.<position in pattern>.attention.query.weight`, with the layers in front of the
shape.

A `Decoder` is a plain pytree: `jax.jit`, `jax.grad` and `jax.tree.map` take it as it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from tbjax.config import LayerKind, ModelConfig
from tbjax.cut import HOLE
from tbjax.layers import context, rope
from tbjax.layers.attention import Attention
from tbjax.layers.blocks import Keys
from tbjax.layers.cache import KVCache
from tbjax.layers.context import CutKeys
from tbjax.layers.embedding import TensorParallelEmbedding
from tbjax.layers.linear import as_sharding
from tbjax.layers.mlp import MLP
from tbjax.layers.moe import MixtureOfExperts, RouterLoad
from tbjax.layers.norm import LayerNorm, RMSNorm
from tbjax.layers.ring import cache_dims
from tbjax.remat import Remat, rematerialised, row_of
from tbjax.sharding import Sharding, to_device
from tbjax.views import Layers

Angles = tuple[jax.Array, jax.Array] | None


class Output(NamedTuple):
    """Everything a forward pass gives."""

    logits: jax.Array  # [B, S, V]
    cache: KVCache | None
    auxiliary_loss: jax.Array | None  # of the routers, unweighted; None without experts


class Hidden(NamedTuple):
    """A forward pass up to the head."""

    states: jax.Array  # [B, S, D], normalised
    cache: KVCache | None
    auxiliary_loss: jax.Array | None


class Surroundings(NamedTuple):
    """What every layer has to know of the tokens."""

    keys: Keys | CutKeys
    valid: jax.Array  # [B, S] marks real tokens
    angles: Angles
    window_angles: Angles  # of layers with a window


class Block(nnx.Module):
    """One layer: attention and MLP (or experts) around the residual stream."""

    def __init__(self, config: ModelConfig, kind: LayerKind, sharding: Sharding, *, dtype: Any, key: Any) -> None:
        self.config = config
        self.sharding = sharding
        keys = jax.random.split(key, 2)
        self.attention = Attention(config, kind, sharding, dtype=dtype, key=keys[0])
        mlp = MixtureOfExperts if kind.sparse else MLP
        self.mlp = mlp(config, sharding, dtype=dtype, key=keys[1])
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        make = lambda wanted: make_norm(config, sharding, dtype, key) if wanted else None  # noqa: E731
        self.attention_norm = make(before)
        self.mlp_norm = make(before and config.block != "shared")
        self.attention_post_norm = make(after)
        self.mlp_post_norm = make(after)

    def __call__(
        self, x: jax.Array, keys: Keys | CutKeys, angles: Angles, valid: jax.Array, cache: Any = None
    ) -> tuple[jax.Array, Any, RouterLoad | None]:
        """The next residual stream, the layer's cache, the load of its experts. `valid` [B, S] marks real tokens."""
        x = checkpoint_name(x, "layer_input")
        normed = self._apply(self.attention_norm, x)
        attended, cache = self.attention(normed, keys, angles, cache)
        attended = checkpoint_name(self._apply(self.attention_post_norm, attended), "attention")
        if self.config.block == "sequential":
            x = self.sharding.residual(x + attended)
            out, load = self._mlp(self._apply(self.mlp_norm, x), valid)
            return self.sharding.residual(x + out), cache, load
        out, load = self._mlp(normed if self.config.block == "shared" else self._apply(self.mlp_norm, x), valid)
        return self.sharding.residual(x + attended + out), cache, load

    def _mlp(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, RouterLoad | None]:
        out, load = self.mlp(x, valid) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(x), None)
        return checkpoint_name(self._apply(self.mlp_post_norm, out), "mlp"), load

    def _apply(self, norm: Any, x: jax.Array) -> jax.Array:
        return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only language model over a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | Sharding | None = None,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
        scan: bool = True,
    ) -> None:
        self.config = config
        self.sharding = as_sharding(mesh)
        self.scan = scan
        keys = jax.random.split(jax.random.key(0) if key is None else key, 3)
        made = {"dtype": dtype}
        self.embedding = TensorParallelEmbedding(config.vocab_size, config.embed, self.sharding, key=keys[0], **made)
        self.stacks = nnx.List()
        for group in config.groups:
            stack = nnx.List()
            rows = np.asarray(self.sharding.stack(group.repeats).order)
            for position, kind in enumerate(group.pattern):
                layers = group.first + position + len(group.pattern) * jnp.asarray(np.maximum(rows, 0))
                layer_keys = jax.vmap(jax.random.fold_in, (None, 0))(keys[1], layers)
                blocks = jax.vmap(lambda k, kind=kind: Block(config, kind, self.sharding, key=k, **made))(layer_keys)
                stack.append(blocks if HOLE not in rows else jax.tree.map(partial(with_holes, rows), blocks))
            self.stacks.append(stack)
        self.final_norm = make_norm(config, self.sharding, dtype, keys[2])
        head = (config.vocab_size, config.embed, self.sharding)
        self.head = None if config.tie_embeddings else TensorParallelEmbedding(*head, key=keys[2], **made)

    @property
    def mesh(self) -> Mesh:
        return cast(Mesh, self.sharding.mesh)

    @property
    def dtype(self) -> Any:
        return self.embedding.weight.dtype

    @property
    def layers(self) -> Layers:
        """The layers one by one, to look at."""
        return Layers(self)

    def __repr__(self) -> str:
        """One line; `model.layers[0]` shows a layer's parts, `nnx.display(model)` in a notebook all of them."""
        from tbjax.planner import words  # which is about the same configs, and no part of the model

        mesh = words.spelled_sizes(self.mesh.shape)
        return (
            f"<{type(self).__name__}: {words.model(self.config)}, {self.config.layers} layers, {self.dtype}, on {mesh}>"
        )

    def __str__(self) -> str:  # Flax has one of its own, of all parts
        return repr(self)

    def __call__(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, S, V] of the next token after each of `tokens` [B, S].

        `attention_mask` [B, S] marks real tokens with 1 (padding may stand left or right); `positions` default to
        0, 1, 2..., as in transformers. `segments` [B, S] says which of the documents packed in a row a token belongs
        to: 1, 2, ..., and 0 for padding. Attention stays inside a document, and positions restart with each.
        """
        return self.forward(tokens, attention_mask, positions, segments=segments).logits

    def forward(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        segments: jax.Array | None = None,
    ) -> Output:
        """As a call, with the cache that continues this one and the routers' auxiliary loss."""
        hidden = self.hidden(tokens, attention_mask, positions, cache, segments=segments)
        return Output(self.logits(hidden.states), hidden.cache, hidden.auxiliary_loss)

    def logits(self, states: jax.Array) -> jax.Array:
        """The head: logits [B, S, V] of hidden states [B, S, D]."""
        scores = (self.embedding if self.head is None else self.head).logits(states)
        cap = self.config.logits_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def hidden(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        segments: jax.Array | None = None,
        dtype: Any = None,
        remat: Remat | str | None = None,
        ring_order: bool = False,
        layers: Sequence[Sequence[Sequence[Block]]] | None = None,
    ) -> Hidden:
        """Everything but the head. With a cache, `tokens` follow those that it holds.

        `dtype` is that of the matmuls and activations (default: the parameters'). `remat` is for training: what the
        backward pass computes again rather than keeps, see `tbjax.remat`. `ring_order` leaves the states in the order
        in which cp cuts the sequence (`tbjax.layers.context`): for a loss, which does not care, and then not the
        tokens' own. `layers` are the blocks of each group and repeat, where they are to be taken from arrays of their
        own in place of the stacks (`tbjax.generate.layers`); the cache is then one of single layers too.
        """
        if ring_order:
            context.check(self.sharding, jnp.shape(tokens)[1])
        around = self.surroundings(tokens, attention_mask, positions, cache, segments=segments)
        cut = isinstance(around.keys, CutKeys)
        x = self.start(context.to_ring_order(tokens, self.sharding) if cut else tokens, dtype)
        loads, caches = [], []
        for group, stack in enumerate(self.stacks):
            old = None if cache is None else cache.layers[group]
            if layers is None:
                x, new, load = self._run(group, stack, x, around, old, remat)
            else:
                x, new, load = self._run_singly(group, layers[group], x, around, old)
            caches.append(new)
            loads += load
        if cache is not None:
            cache = KVCache(caches, cast(jax.Array, around.keys.valid), cache.length + x.shape[1])
        states = self.final_norm(x)
        if cut and not ring_order:
            states = context.to_natural_order(states, self.sharding)
        return Hidden(states, cache, auxiliary_loss(loads))

    def start(self, tokens: jax.Array, dtype: Any = None) -> jax.Array:
        """What the first layer gets."""
        # XLA gathers by few integer dtypes: token files' uint16 is not among them.
        x = self.embedding(jnp.asarray(tokens).astype(jnp.int32), dtype)
        scale = self.config.embed_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def surroundings(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        segments: jax.Array | None = None,
        ring_order: bool = False,
    ) -> Surroundings:
        """What the layers have to know of `tokens`, having checked them.

        Over cp it is laid in ring order; with `ring_order`, the arguments already are (`context.arranged`).
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [batch, sequence], not {tokens.dtype}{list(tokens.shape)}.")
        valid = jnp.ones(tokens.shape, bool) if attention_mask is None else _truths(attention_mask)
        for name, array in (("attention_mask", valid), ("positions", positions), ("segments", segments)):
            if array is not None and jnp.shape(array) != tokens.shape:
                raise ValueError(f"{name} has shape {list(jnp.shape(array))}, tokens {list(tokens.shape)}.")
        if segments is not None:
            segments = jnp.asarray(segments)
            if cache is not None:
                raise ValueError(
                    "segments are of documents packed in a row, which no cache continues: give one of both."
                )
            if not jnp.issubdtype(segments.dtype, jnp.integer):
                raise ValueError(f"segments must be integers (0 for padding), not {segments.dtype}.")
            valid &= segments != 0
        cut = cache is None and context.cuts(self.sharding, tokens.shape[1])
        slots = jnp.arange(tokens.shape[1])
        known = valid
        if cache is not None:
            slots = slots + cache.length
            known = jax.lax.dynamic_update_slice_in_dim(cache.valid, valid, cache.length, axis=1)
        whole = attention_mask is None and cache is None
        config, lengths = self.config, None
        if cut and ring_order:
            context.check_arranged(config, attention_mask, positions, segments)
            slots = jnp.asarray(context.ring_order(tokens.shape[1], self.sharding.size("cp")))
            counted = jnp.broadcast_to(slots, tokens.shape) if segments is None else jnp.asarray(positions)
        elif segments is None:
            counted = jnp.maximum(jnp.cumsum(known, axis=1) - 1, 0) * known
        else:
            counted, lengths = rope.within(segments), rope.lengths_within(segments)
        # Of documents, padding is one more: it needs no mask of its own.
        keys: Keys | CutKeys = Keys(slots, None if whole else known, counted, segments)
        if positions is None:
            positions = jnp.broadcast_to(slots, tokens.shape) if segments is None else counted
        places = jnp.asarray(positions)
        if cut:
            keys = CutKeys(keys.valid, counted, segments)
        if cut and not ring_order:
            lay = partial(context.to_ring_order, sharding=self.sharding)
            keys, valid, places, lengths = jax.tree.map(lay, (keys, valid, places, lengths))

        def turn(table: rope.Rope | None) -> Angles:
            return None if table is None else rope.angles(table, config.head_dim, places, lengths)

        angles = turn(config.rope)
        return Surroundings(keys, valid, angles, angles if config.window_rope is None else turn(config.window_rope))

    def repeat(
        self,
        group: int,
        blocks: Sequence[Block],
        x: jax.Array,
        around: Surroundings,
        cache: Any = None,
        remats: Sequence[Remat] | None = None,
        row: int | None = None,
    ) -> tuple[jax.Array, Any, list[RouterLoad]]:
        """One repeat of a group's pattern, of which `blocks` are the layers and `remats` their policies.

        With a `row`, the blocks are stacks of which it is the one: it is taken out where the layer runs, so that of
        the weights no more is kept than the stacks.
        """

        def run(block: Block, *args: Any) -> Any:
            own = block if row is None else jax.tree.map(lambda a: row_of(a, row), block)
            return to_device(own)(*args)  # weights in the host's memory come here, and again in the backward pass

        new, loads = [], []
        for position, (block, kind) in enumerate(zip(blocks, self.config.groups[group].pattern, strict=True)):
            angles = around.window_angles if kind.window else around.angles
            old = None if cache is None else cache[position]
            remat = None if remats is None else remats[position]
            x, kv, load = rematerialised(run, remat)(block, x, around.keys, angles, around.valid, old)
            new.append(kv)
            loads += [] if load is None else [load]
        return x, None if cache is None else new, loads

    def _run(
        self, group: int, stack: Any, x: jax.Array, around: Surroundings, cache: Any, remat: Remat | str | None
    ) -> tuple[jax.Array, Any, list[RouterLoad]]:
        """All repeats of one group."""
        pattern, repeats, _ = self.config.groups[group]
        # Layers that differ in what is kept of them are spelled out in the scan's body: `several` repeats at a time.
        cycle = None if remat is None else Remat.parse(remat).cycle(repeats, len(pattern))
        several = 1 if cycle is None else len(cycle) // len(pattern)

        # The cache is carried, not scanned over: what is carried is written where it lies, while what goes in layer by
        # layer and comes out layer by layer stands in memory twice.
        def once(
            carry: tuple[jax.Array, Any], layer: tuple[Any, Any]
        ) -> tuple[tuple[jax.Array, Any], list[RouterLoad]]:
            (x, cache), (blocks, index) = carry, layer
            old = None if cache is None else [stack._replace(row=index) for stack in cache]
            x, new, loads = self.repeat(group, blocks, x, around, old, cycle)
            if cache is not None:
                cache = [jax.tree.map(self._kept, stack._replace(row=None)) for stack in new]
            return (x, cache), loads

        def spelled_out(carry: tuple[jax.Array, Any], layers: Any) -> tuple[tuple[jax.Array, Any], list[RouterLoad]]:
            (x, _), (blocks, _), loads = carry, layers, []
            for n in range(several):
                remats = cycle and cycle[n * len(pattern) : (n + 1) * len(pattern)]
                x, _, found = self.repeat(group, blocks, x, around, None, remats, row=n)
                loads += found
            return (x, None), loads

        xs = (self._in_order(list(stack), repeats), jnp.arange(repeats))
        step = once
        if several > 1:
            step, xs = spelled_out, jax.tree.map(lambda a: a.reshape(-1, several, *a.shape[1:]), xs)
        if self.scan:
            (x, cache), loads = jax.lax.scan(step, (x, cache), xs)
            return x, cache, loads
        outs = []
        for index in range(repeats // several):
            (x, cache), out = step((x, cache), jax.tree.map(lambda a, index=index: a[index], xs))
            outs.append(out)
        return x, cache, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    def _run_singly(
        self, group: int, rows: Sequence[Sequence[Block]], x: jax.Array, around: Surroundings, cache: Any
    ) -> tuple[jax.Array, Any, list[RouterLoad]]:
        """All repeats of one group, each from blocks of its own, which are no row of a stack."""
        loads, caches = [], []
        for number, blocks in enumerate(rows):
            old = None if cache is None else [singles[number] for singles in cache]
            x, new, load = self.repeat(group, blocks, x, around, old)
            caches.append(new)
            loads.append(load)
        cache = None if cache is None else [list(singles) for singles in zip(*caches, strict=True)]
        return x, cache, jax.tree.map(lambda *a: jnp.stack(a), *loads)

    def _in_order(self, stack: list[Any], repeats: int) -> list[Any]:
        """The layers one after the other, wherever a pipeline has them."""
        cut = self.sharding.stack(repeats)
        return stack if cut.plain else jax.tree.map(lambda a: a[np.asarray(cut.places)], stack)

    def _kept(self, cache: jax.Array) -> jax.Array:
        """A stack of keys or values [R, B, K, T, N], in that order in memory: attention would like others best, and the
        compiler would turn the whole stack to please it."""
        return self.sharding.in_order(cache, None, *cache_dims(self.config, self.sharding))


def with_holes(rows: np.ndarray, stack: jax.Array) -> jax.Array:
    """The stack with zeros in the rows that stand for no layer."""
    return jnp.where((rows != HOLE).reshape(-1, *[1] * (stack.ndim - 1)), stack, 0)


def _truths(mask: Any) -> jax.Array:
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(
            f"attention_mask is {mask.dtype}: it marks real tokens with 1 or True, and is not added to the scores."
        )
    return mask.astype(bool)


def auxiliary_loss(loads: list[RouterLoad]) -> jax.Array | None:
    """The load-balancing loss of Switch Transformer, over the tokens of all layers together, as transformers has it."""
    if not loads:
        return None
    total = jax.tree.map(lambda *parts: sum(jnp.sum(part, axis=0) for part in parts), *loads)
    experts = total.assignments.shape[0]
    return experts * jnp.sum(total.assignments * total.probabilities) / jnp.square(total.tokens)


def make_norm(config: ModelConfig, sharding: Sharding, dtype: Any, key: Any) -> RMSNorm | LayerNorm:
    """The normalisation that the architecture uses."""
    if config.norm == "layer":
        return LayerNorm(config.embed, sharding, epsilon=config.norm_epsilon, dtype=dtype, key=key)
    return RMSNorm(config.embed, sharding, epsilon=config.norm_epsilon, offset=config.norm_offset, dtype=dtype, key=key)
