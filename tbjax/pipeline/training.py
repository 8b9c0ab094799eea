"""What a stage does in training: forwards that keep what the backward needs, backwards, and gradients summed up.

What is kept of a microbatch from its forward to its backward is the remat policy's to say: of every layer its input
("full"), what its matmuls gave ("dots") or all of it ("none"); or of the whole stage its input alone ("stage"), from
which the backward then runs the stage again. Weights are never among it, gathered or not.

Gradients are summed in float32 over the microbatches, each layer's into its row as soon as it is there: a stage's
gradient of one microbatch never stands in memory as a whole.

All that grows is in one `State`, and tasks are loops of one turn or none (`when`). They could be branches, but what
passes through a branch XLA copies, and with a loop it does not: a copy of all gradients, in time and memory. A loop has
a price of its own: what does not depend on the turn the compiler makes before it, turn or no turn. So a task reads by
way of the turn's number, which is always zero, whatever it alone needs.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.model import Decoder, Hidden
from tbjax.pipeline.grid import Cell
from tbjax.pipeline.phases import Gradients, Phases, take_apart
from tbjax.pipeline.stages import Payload, Stage, Tokens, Weights, finish, is_end, join, split
from tbjax.remat import Policy
from tbjax.sharding import leaves

StageRemat: TypeAlias = Policy | Literal["stage"]
Carried = TypeVar("Carried")

# The part of the loss that a microbatch has: (model, hidden states, microbatch) -> scalar.
Loss = Callable[[Decoder, Hidden, Any], jax.Array]


class State(NamedTuple):
    """What tasks add to."""

    sums: Weights  # gradients, float32
    kept: tuple[jax.Array, ...]  # for backwards, [slots, rows of a piece, ...]
    pairs: tuple[jax.Array, ...]  # for weight gradients, but those that stand among the kept, [slots, rows, ...]
    loss: jax.Array


def when(condition: jax.Array, task: Callable[[jax.Array, Carried], Carried], carried: Carried) -> Carried:
    """`task(turn, carried)` if the condition holds, else `carried`: in place, as a loop of one turn or none."""
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), task, carried)


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """A stage that runs backward too."""

    stage: Stage
    loss: Loss
    phases: Phases
    saves: bool  # whether forwards keep anything; otherwise backwards run forward first

    @classmethod
    def make(cls, stage: Stage, loss: Loss, part: Tokens, *, remat: StageRemat, splits: bool) -> "TrainingStage":
        """For microbatches like `part`; `splits` says that weight gradients are tasks of their own."""
        payload = jax.eval_shape(stage.enter, part.tokens)
        policy: Policy = "full" if remat == "stage" else remat
        saves = remat != "stage"
        layer = stage.layer, stage.row(0), stage.around(part), payload
        return cls(stage, loss, take_apart(*layer, remat=policy, split=splits, stays=saves), saves)

    def start(self, slots: int) -> State:
        """The state before the first task. A slot is for one microbatch in one piece, from its forward to its last
        gradient."""

        def room(slots: int, shapes: Iterable[jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros((slots, self.stage.rows, *a.shape), a.dtype) for a in shapes)

        weights, laid = split(self.stage.model), self._specs()
        sums = jax.tree.map(lambda a, spec: _laid(jnp.zeros(a.shape, jnp.float32), spec), weights, laid)
        # A backward that runs forward itself needs room for as long as it takes.
        kept = room(slots if self.saves else 1, self.phases.kept)
        placed = zip(self.phases.pairs, self.phases.places, strict=True)
        return State(sums, kept, room(slots, (pair for pair, place in placed if place is None)), jnp.float32(0))

    def forward(self, cell: Cell, part: Tokens, payload: Payload, state: State) -> tuple[State, Payload]:
        """A piece, keeping what its backward needs; of the last piece, the gradient of what it hands out."""
        is_last = cell.position == self.stage.last
        if self.saves:
            state, out = self._ahead(cell, part, payload, state)
            return when(is_last, lambda _, carried: self._end(part, *carried), (state, out))
        # Its backward runs forward again: of the last piece nobody else needs the result.
        return state, when(~is_last, lambda _, payload: self.stage.forward(cell, part, payload), payload)

    def backward(
        self, cell: Cell, part: Tokens, payload: Payload, gradient: Payload, state: State
    ) -> tuple[State, Payload]:
        """A piece backwards, from the gradient of what it handed out to that of its input."""
        if not self.saves:
            state, out = self._ahead(cell, part, payload, state)
            out = jax.tree.map(lambda a, b: jnp.where(cell.position == self.stage.last, a, b), out, gradient)
            is_last = cell.position == self.stage.last
            state, gradient = when(is_last, lambda _, carried: self._end(part, *carried), (state, out))
        around, (first, count) = self.stage.around(part), self.stage.span(cell)

        def back(turn: jax.Array, carry: tuple[Payload, State]) -> tuple[Payload, State]:
            (gradient, state), row = carry, count - 1 - turn
            kept = self._kept(cell, row, state)
            if any(place is not None for place in self.phases.places):
                # All is read before anything takes its place, or the compiler makes a copy of all that is kept.
                kept, gradient = jax.lax.optimization_barrier((kept, gradient))
            gradient, found, pairs = self.phases.backward(self.stage.row(first + row), around, kept, gradient)
            sums = state.sums._replace(layers=self._add(state.sums.layers, first + row, found))
            return gradient, self._put_pairs(cell, row, pairs, state._replace(sums=sums))

        gradient, state = jax.lax.fori_loop(0, count, back, (self.stage.lay(gradient), state))

        def begin(turn: jax.Array, ends: list[jax.Array]) -> list[jax.Array]:
            return self._begin(gradient, part.tokens + turn, ends)

        ends = when(cell.position == 0, begin, state.sums.ends)
        return state._replace(sums=state.sums._replace(ends=ends)), gradient

    def weights(self, cell: Cell, part: Tokens, state: State) -> State:
        """The weight gradients of a piece, from its pairs."""
        around, (first, count) = self.stage.around(part), self.stage.span(cell)

        def add(row: jax.Array, layers: list[jax.Array]) -> list[jax.Array]:
            kept, pairs = self._kept(cell, row, state), self._pairs(cell, row, state)
            found = self.phases.weights(self.stage.row(first + row), around, kept, pairs)
            return self._add(layers, first + row, found)

        layers = jax.lax.fori_loop(0, count, add, state.sums.layers)
        return state._replace(sums=state.sums._replace(layers=layers))

    def _ahead(self, cell: Cell, part: Tokens, payload: Payload, state: State) -> tuple[State, Payload]:
        """A piece, with what its backward needs of each layer in the slot for it."""
        around, (first, count), slot = self.stage.around(part), self.stage.span(cell), self._kept_slot(cell)

        def layer(row: jax.Array, carry: tuple[Payload, tuple[jax.Array, ...]]) -> Any:
            payload, pools = carry
            payload, kept = self.phases.forward(self.stage.row(first + row), around, payload)
            return payload, tuple(pool.at[slot, row].set(a) for pool, a in zip(pools, kept, strict=True))

        carry = self.stage.arrive(cell, part, payload), state.kept
        out, kept = jax.lax.fori_loop(0, count, layer, carry)
        return state._replace(kept=kept), out

    def _kept_slot(self, cell: Cell) -> Any:
        return jnp.maximum(cell.kept, 0) if self.saves else 0

    def _kept(self, cell: Cell, row: jax.Array, state: State) -> list[jax.Array]:
        return [pool[self._kept_slot(cell), row] for pool in state.kept]

    def _pairs(self, cell: Cell, row: jax.Array, state: State) -> list[jax.Array]:
        kept, others = self._kept(cell, row, state), iter(state.pairs)
        return [next(others)[cell.kept, row] if place is None else kept[place] for place in self.phases.places]

    def _put_pairs(self, cell: Cell, row: jax.Array, pairs: Iterable[jax.Array], state: State) -> State:
        kept, others = list(state.kept), []
        rest = iter(state.pairs)
        for pair, place in zip(pairs, self.phases.places, strict=True):
            if place is None:
                others.append(next(rest).at[cell.kept, row].set(pair))
            else:
                kept[place] = kept[place].at[self._kept_slot(cell), row].set(pair)
        return state._replace(kept=tuple(kept), pairs=tuple(others))

    def _end(self, part: Tokens, state: State, out: Payload) -> tuple[State, Payload]:
        """The loss of what the last piece hands out, and its gradient."""

        def loss(ends: list[jax.Array], out: Payload) -> jax.Array:
            model = self._with_ends(ends)
            return self.loss(model, finish(model, out), part)

        ends = split(self.stage.model).ends
        value, (found, gradient) = jax.value_and_grad(loss, argnums=(0, 1))(ends, out)
        sums = state.sums._replace(ends=self._add_ends(state.sums.ends, found))
        return state._replace(sums=sums, loss=state.loss + value), self.stage.lay(gradient)

    def _begin(self, gradient: Payload, tokens: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        """The sums of the ends' gradients, with the embedding's."""

        def enter(ends: list[jax.Array]) -> Payload:
            return dataclasses.replace(self.stage, model=self._with_ends(ends)).enter(tokens)

        _, pull = jax.vjp(enter, split(self.stage.model).ends)
        return self._add_ends(sums, *pull(gradient))

    def _with_ends(self, ends: list[jax.Array]) -> Decoder:
        return join(self.stage.model, split(self.stage.model)._replace(ends=ends))

    def _add(self, layers: list[jax.Array], row: Any, gradients: Gradients) -> list[jax.Array]:
        """The sums with one layer's gradients added at its row."""
        laid, layers = self._specs().layers, list(layers)
        for leaf, gradient in gradients.items():
            gradient = _laid(gradient, PartitionSpec(*laid[leaf][1:])).astype(jnp.float32)
            total = jax.lax.dynamic_index_in_dim(layers[leaf], row, keepdims=False) + gradient
            layers[leaf] = jax.lax.dynamic_update_index_in_dim(layers[leaf], total, row, 0)
        return layers

    def _add_ends(self, sums: list[jax.Array], gradients: list[jax.Array]) -> list[jax.Array]:
        laid = self._specs().ends
        return [
            total + _laid(gradient, spec).astype(jnp.float32)
            for total, gradient, spec in zip(sums, gradients, laid, strict=True)
        ]

    def _specs(self) -> Any:
        """How gradients lie within a stage: as the strategy has them."""
        sharding, laid = self.stage.model.sharding, Weights([], [])
        for path, dims, variable in leaves(self.stage.model):
            own = tuple(dim for dim in dims if dim != "layers")
            shape = variable.shape[len(dims) - len(own) :]
            spec: Any = sharding.parameter(own, shape, path, cut=sharding.strategy.cuts_gradients).spec
            if is_end(path):
                laid.ends.append(spec)
            else:
                laid.layers.append(PartitionSpec(None, *spec))  # pyright: ignore[reportArgumentType]
        return laid


def _laid(value: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, spec)
