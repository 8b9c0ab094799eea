"""Layers from where they are stored to the stages that run them, where those differ, and gradients back.

A model that was laid out for its schedule (`Sharding.cut`) stores every layer on the stage that runs it, and nothing is
exchanged. One that was not, say with its layers in order, runs by other schedules too: a step begins by sending layers
to their stages and ends by sending their gradients back. That moves a stage's weights and their gradients once in a
step, and takes the memory of a second copy of both.

Layers travel in blocks, as large as both cuts allow. Every stage sends as many blocks as it receives, counting empty
ones where a stage has rows to spare, so the way from one cut to the other is a regular graph, and falls apart into
rounds in each of which every stage sends one block and receives one: a permutation, which the devices do as one.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.cut import HOLE, Cut
from tbjax.pipeline.graph import NONE


class Round(NamedTuple):
    """One permutation: by sender, which of its blocks it sends and to whom; by receiver, where it puts what arrives."""

    block: tuple[int, ...]  # NONE: an empty one, which is not really sent
    receiver: tuple[int, ...]
    place: tuple[int, ...]  # NONE: nothing arrives


class Route(NamedTuple):
    """The way from one cut to another."""

    rows: int  # of a block
    blocks: tuple[int, int]  # that a stage has under the one cut and under the other
    rounds: tuple[Round, ...]  # none where the cuts are the same


def route(stored: Cut, run: Cut) -> Route:
    """How layers that lie by one cut come to lie by another."""
    stages = stored.stages
    rows = math.gcd(*(number for piece in (*stored.pieces, *run.pieces) for number in piece))
    before, after = stored.rows // rows, run.rows // rows
    if stored == run:
        return Route(rows, (before, after), ())
    degree = max(before, after)
    # Of every stage: what goes where, as (block, (receiver, place)), and what is still free.
    left: list[list[tuple[int, tuple[int, int]]]] = [[] for _ in range(stages)]
    free = [set(range(degree)) for _ in range(stages)]
    target = {run.order[row]: divmod(row, run.rows) for row in range(0, stages * run.rows, rows)}
    for row in range(0, stages * stored.rows, rows):
        if (layer := stored.order[row]) != HOLE:
            receiver, row_there = target[layer]
            left[row // stored.rows].append((row % stored.rows // rows, (receiver, row_there // rows)))
            free[receiver].remove(row_there // rows)
    spare = iter([stage for stage, places in enumerate(free) for _ in places])
    for sending in left:
        sending += [(NONE, (receiver, NONE)) for receiver in itertools.islice(spare, degree - len(sending))]
    found = []
    for _ in range(degree):
        chosen = _matching([[receiver for _, (receiver, _) in sending] for sending in left])
        block, place = [0] * stages, [NONE] * stages
        for sender, receiver in enumerate(chosen):
            index = next(i for i, (_, (to, _)) in enumerate(left[sender]) if to == receiver)
            block[sender], (_, place[receiver]) = left[sender].pop(index)
        found.append(Round(tuple(block), tuple(chosen), tuple(place)))
    return Route(rows, (before, after), tuple(found))


def table(way: Route, stages: int) -> np.ndarray:
    """[stages, rounds, 2]: the block that a stage sends in each round, and where it puts the one that it receives."""
    found = [[*zip(r.block, r.place, strict=True)] for r in way.rounds]
    return np.asarray(found, np.int32).reshape(len(way.rounds), stages, 2).swapaxes(0, 1)


class Exchange(NamedTuple):
    """A route as one stage sees it."""

    way: Route
    mine: jax.Array  # [1, rounds, 2]: the stage's own part of the `table`

    def there(self, layers: list[jax.Array]) -> list[jax.Array]:
        """Arrays [rows, ...] as they are stored, as they are run."""
        return self._send(layers, back=False)

    def back(self, layers: list[jax.Array]) -> list[jax.Array]:
        """And the other way."""
        return self._send(layers, back=True)

    def _send(self, layers: list[jax.Array], *, back: bool) -> list[jax.Array]:
        return [self._sent(array, back) for array in layers] if self.way.rounds else layers

    def _sent(self, array: jax.Array, back: bool) -> jax.Array:
        rest = array.shape[1:]
        blocks = array.reshape(-1, self.way.rows, *rest)
        result = jnp.zeros((self.way.blocks[0 if back else 1], self.way.rows, *rest), array.dtype)
        for number, (sent_blocks, receivers, _) in enumerate(self.way.rounds):
            take, put = self.mine[0, number, 1 if back else 0], self.mine[0, number, 0 if back else 1]
            full = [(sender, to) for sender, to in enumerate(receivers) if sent_blocks[sender] != NONE]
            pairs = [(to, sender) for sender, to in full] if back else full
            moved = jax.lax.ppermute(_at(blocks, take), "pp", pairs)
            result = jax.lax.dynamic_update_index_in_dim(
                result, jnp.where(put == NONE, _at(result, put), moved), jnp.maximum(put, 0), 0
            )
        return result.reshape(-1, *rest)


def _at(blocks: jax.Array, place: jax.Array) -> jax.Array:
    """A block; anything at all where the place is NONE."""
    return jax.lax.dynamic_index_in_dim(blocks, jnp.maximum(place, 0), keepdims=False)


def _matching(edges: Sequence[Sequence[int]]) -> list[int]:
    """A receiver for every sender, all different, along the edges. There is one where every receiver has as many."""
    taken: dict[int, int] = {}

    def find(sender: int, tried: set[int]) -> bool:
        for receiver in edges[sender]:
            if receiver not in tried:
                tried.add(receiver)
                if receiver not in taken or find(taken[receiver], tried):
                    taken[receiver] = sender
                    return True
        return False

    for sender in range(len(edges)):
        find(sender, set())
    return [receiver for _, receiver in sorted((sender, receiver) for receiver, sender in taken.items())]
