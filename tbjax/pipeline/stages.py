"""A decoder cut into pieces, and what the stage that holds some of them does with one microbatch.

The decoder's layers are stacked, and the mesh axis `pp` cuts the stack: a stage holds a run of layers as its part of
the same arrays that an unpipelined decoder has. What stands before the layers (the embedding) and after them (norm,
head, loss) is whole on every stage; the first piece uses the one and the last the other, and their gradients are
summed.

Between pieces goes a `Payload`: the residual stream, and the load of the experts so far, which the auxiliary loss needs
of all layers together. Its gradient comes back in the same form.

Gradients are summed in float32 over the microbatches, each layer's into its row as soon as it is there: a stage's
gradient of one microbatch never stands in memory as a whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.config import ModelConfig
from tbjax.layers.moe import RouterLoad
from tbjax.model import Decoder, Hidden, Surroundings, auxiliary_loss
from tbjax.pipeline.grid import Cell
from tbjax.pipeline.phases import Gradients, Phases, take_apart
from tbjax.remat import Remat
from tbjax.sharding import leaves


class Tokens(Protocol):
    """What a batch has at least: integers [B, S], and where real tokens stand (None: everywhere)."""

    @property
    def tokens(self) -> Any: ...

    @property
    def mask(self) -> Any: ...


class Payload(NamedTuple):
    """What one piece of the model hands to the next, or its gradient."""

    x: jax.Array  # [B, S, D]
    load: RouterLoad | None  # of all experts so far; None without experts


# The part of the loss that a microbatch has: (model, hidden states, microbatch) -> scalar.
Loss = Callable[[Decoder, Hidden, Any], jax.Array]


class Sums(NamedTuple):
    """Gradients under way, float32: of the layers' weights [layers, ...], and of the ends'."""

    layers: list[jax.Array]
    ends: list[jax.Array]


def check_cut(config: ModelConfig, stages: int, chunks: int) -> None:
    """Raise ValueError unless the decoder's layers can be cut into `chunks` equal pieces for each of the stages."""
    pieces = stages * chunks
    asked = f"pp={stages}" + (f" with {chunks} chunks a stage" if chunks > 1 else "")
    group, *others = config.groups
    if others:
        raise ValueError(
            f"{asked}: the {config.layers} layers of this model follow no single pattern, but "
            f"{len(config.groups)} one after the other, and a pipeline cuts one stack of equal repeats: use pp=1, with "
            "fsdp or tp in its place."
        )
    if group.repeats % pieces:
        unit = "layers" if len(group.pattern) == 1 else f"repeats of {len(group.pattern)} layers"
        fitting = [n for n in range(1, group.repeats + 1) if group.repeats % (n * chunks) == 0]
        hint = f"pp={' or '.join(map(str, fitting[-3:]))} would do" if fitting else "fewer chunks would do"
        raise ValueError(f"{asked}: {group.repeats} {unit} do not divide into {pieces} equal pieces; {hint}.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The work of one stage, on its own part of the decoder (inside the `shard_map` over pp)."""

    model: Decoder
    rows: int  # repeats of the pattern in one piece
    last: int  # the position of the last piece
    dtype: Any
    # For a stage that also runs backward.
    loss: Loss | None = None
    phases: Phases | None = None

    @property
    def layers(self) -> list[jax.Array]:
        """The layers' weights, the stage's rows of each."""
        return jax.tree.leaves(self._blocks)

    @property
    def ends(self) -> list[jax.Array]:
        """The weights of embedding, norm and head."""
        return [a for path, a in zip(_paths(self.model), jax.tree.leaves(self.model), strict=True) if _is_end(path)]

    @property
    def _blocks(self) -> list[Any]:
        return list(self.model.stacks[0])

    def differentiable(self, part: Tokens, *, remat: Remat, split: bool) -> "Stage":
        """The stage with its layers' backward pass. `part` is any microbatch."""
        around = self.model.surroundings(part.tokens, part.mask)
        payload = jax.eval_shape(lambda: self.enter(part))
        phases = take_apart(self._layer, self._row(0), around, payload, remat=remat, split=split)
        return dataclasses.replace(self, phases=phases)

    # Forwards.

    def enter(self, part: Tokens) -> Payload:
        """What the first piece begins with."""
        load = None
        if self.model.config.moe is not None:
            zeros = jnp.zeros(self.model.config.moe.experts, jnp.float32)
            load = RouterLoad(zeros, zeros, jnp.float32(0))
        return self.lay(Payload(self.model.start(part.tokens, self.dtype), load))

    def lay(self, payload: Payload) -> Payload:
        return payload._replace(x=self.model.sharding.residual(payload.x))

    def forward(self, cell: Cell, part: Tokens, payload: Payload) -> Payload:
        """The piece that the cell names, from what the piece before handed out."""
        around = self.model.surroundings(part.tokens, part.mask)
        first = cell.chunk * self.rows
        payload = self._input(cell, part, payload)
        return jax.lax.fori_loop(
            0, self.rows, lambda row, payload: self._layer(self._row(first + row), around, payload), payload
        )

    def _input(self, cell: Cell, part: Tokens, payload: Payload) -> Payload:
        return jax.lax.cond(cell.position == 0, lambda payload: self.enter(part), lambda payload: payload, payload)

    def _layer(self, blocks: Any, around: Surroundings, payload: Payload) -> Payload:
        x, _, loads = self.model.repeat(0, blocks, payload.x, around)
        return Payload(x, jax.tree.map(lambda *parts: sum(parts), payload.load, *loads) if loads else payload.load)

    def _row(self, row: Any) -> list[Any]:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, row, keepdims=False), self._blocks)

    # Backwards.

    def zeros(self) -> Sums:
        layers, ends = self._specs()
        return Sums(
            [_laid(jnp.zeros(a.shape, jnp.float32), spec) for a, spec in zip(self.layers, layers, strict=True)],
            [_laid(jnp.zeros(a.shape, jnp.float32), spec) for a, spec in zip(self.ends, ends, strict=True)],
        )

    def no_pairs(self, slots: int) -> tuple[jax.Array, ...]:
        """Room for the pairs of so many pieces."""
        return tuple(jnp.zeros((slots, self.rows, *a.shape), a.dtype) for a in self._apart.pairs)

    def backward(
        self,
        cell: Cell,
        part: Tokens,
        payload: Payload,
        gradient: Payload,
        sums: Sums,
        pairs: tuple[jax.Array, ...],
    ) -> tuple[Payload, jax.Array, Sums, tuple[jax.Array, ...]]:
        """A piece from its input and the gradient of its output.

        Returns the gradient of the input, the loss (of the last piece; else zero), and the sums and pairs with what
        this microbatch adds to them, the pairs in the slot that the cell names.
        """
        around = self.model.surroundings(part.tokens, part.mask)
        first, slot = cell.chunk * self.rows, jnp.maximum(cell.pairs, 0)
        payload = self._input(cell, part, payload)

        def ahead(payload: Payload, row: jax.Array) -> tuple[Payload, tuple[jax.Array, ...]]:
            return self._apart.forward(self._row(first + row), around, payload)

        rows = jnp.arange(self.rows)
        out, kept = jax.lax.scan(ahead, payload, rows)
        loss, gradient, ends = jax.lax.cond(
            cell.position == self.last,
            lambda out, gradient, ends: self._end(out, part, ends),
            lambda out, gradient, ends: (jnp.float32(0), gradient, ends),
            out,
            gradient,
            sums.ends,
        )

        def back(carry: Any, layer: Any) -> tuple[Any, None]:
            gradient, layers, pairs = carry
            row, kept = layer
            gradient, found, new = self._apart.backward(self._row(first + row), around, kept, gradient)
            layers = self._add(layers, first + row, found)
            pairs = tuple(pool.at[slot, row].set(a) for pool, a in zip(pairs, new, strict=True))
            return (gradient, layers, pairs), None

        (gradient, layers, pairs), _ = jax.lax.scan(back, (gradient, sums.layers, pairs), (rows, kept), reverse=True)
        ends = jax.lax.cond(
            cell.position == 0,
            lambda gradient, ends: self._begin(gradient, part, ends),
            lambda _, ends: ends,
            gradient,
            ends,
        )
        return self.lay(gradient), loss, Sums(layers, ends), pairs

    def weights(self, cell: Cell, part: Tokens, sums: Sums, pairs: tuple[jax.Array, ...]) -> Sums:
        """The sums with what the pairs in the cell's slot add to them."""
        around = self.model.surroundings(part.tokens, part.mask)
        first = cell.chunk * self.rows

        def add(row: jax.Array, layers: list[jax.Array]) -> list[jax.Array]:
            found = self._apart.weights(self._row(first + row), around, [pool[cell.pairs, row] for pool in pairs])
            return self._add(layers, first + row, found)

        return sums._replace(layers=jax.lax.fori_loop(0, self.rows, add, sums.layers))

    def _end(self, out: Payload, part: Tokens, sums: list[jax.Array]) -> tuple[jax.Array, Payload, list[jax.Array]]:
        """The loss, the gradient of what the last piece hands out, and the sums of the ends with their gradients."""

        loss_of = self.loss
        if loss_of is None:
            raise ValueError("this stage has no loss.")

        def loss(ends: list[jax.Array], out: Payload) -> jax.Array:
            model = self._with_ends(ends)
            return loss_of(model, finish(model, out), part)

        value, (ends, gradient) = jax.value_and_grad(loss, argnums=(0, 1))(self.ends, out)
        return value, self.lay(gradient), self._add_ends(sums, ends)

    def _begin(self, gradient: Payload, part: Tokens, sums: list[jax.Array]) -> list[jax.Array]:
        def enter(ends: list[jax.Array]) -> Payload:
            return dataclasses.replace(self, model=self._with_ends(ends)).enter(part)

        _, pull = jax.vjp(enter, self.ends)
        return self._add_ends(sums, *pull(gradient))

    def _add(self, layers: list[jax.Array], row: Any, gradients: Gradients) -> list[jax.Array]:
        """The sums with one layer's gradients added at its row."""
        specs, _ = self._specs()
        layers = list(layers)
        for leaf, gradient in gradients.items():
            gradient = _laid(gradient, PartitionSpec(*specs[leaf][1:])).astype(jnp.float32)
            total = jax.lax.dynamic_index_in_dim(layers[leaf], row, keepdims=False) + gradient
            layers[leaf] = jax.lax.dynamic_update_index_in_dim(layers[leaf], total, row, 0)
        return layers

    def _add_ends(self, sums: list[jax.Array], gradients: list[jax.Array]) -> list[jax.Array]:
        _, specs = self._specs()
        return [
            total + _laid(gradient, spec).astype(jnp.float32)
            for total, gradient, spec in zip(sums, gradients, specs, strict=True)
        ]

    def _specs(self) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
        """How gradients lie within a stage: as the strategy has them."""
        sharding = self.model.sharding
        layers, ends = [], []
        for path, dims, variable in leaves(self.model):
            own = tuple(dim for dim in dims if dim != "layers")
            shape = variable.shape[len(dims) - len(own) :]
            spec = sharding.parameter(own, shape, path, cut=sharding.strategy.cuts_gradients).spec
            if _is_end(path):
                ends.append(spec)
            else:
                layers.append(PartitionSpec(None, *spec))
        return layers, ends

    def _with_ends(self, ends: list[jax.Array]) -> Decoder:
        return join(self.model, Sums(self.layers, ends))

    @property
    def _apart(self) -> Phases:
        if self.phases is None:
            raise ValueError("this stage only runs forward: call differentiable() for one that runs backward.")
        return self.phases


def finish(model: Decoder, payload: Payload) -> Hidden:
    """What comes after the last piece, up to the head."""
    loads = [] if payload.load is None else [jax.tree.map(lambda a: a[None], payload.load)]
    return Hidden(model.final_norm(payload.x), None, auxiliary_loss(loads))


def join(model: Decoder, parts: Sums) -> Decoder:
    """`model` with other arrays in the place of its weights."""
    layers, ends = iter(parts.layers), iter(parts.ends)
    return jax.tree.unflatten(
        jax.tree.structure(model), [next(ends if _is_end(path) else layers) for path in _paths(model)]
    )


def specs(model: Decoder) -> Any:
    """How the pipeline's axis cuts the model, as `shard_map` takes it."""
    return jax.tree.unflatten(
        jax.tree.structure(model), [PartitionSpec() if _is_end(path) else PartitionSpec("pp") for path in _paths(model)]
    )


def _paths(model: Decoder) -> list[str]:
    return [leaf.path for leaf in leaves(model)]


def _is_end(path: str) -> bool:
    return not path.startswith("stacks.")


def _laid(value: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, spec)
