"""Layers from where they are stored to the stages that run them, where those differ, and gradients back.

The stack of layers lies cut over the stages in order, as checkpoints and optimizers have it. Where a stage holds
several pieces of the model that do not follow each other (interleaved, ZB-V), a step begins by sending each piece to
its stage and ends by sending its gradients back. That moves a stage's weights and their gradients once in a step, and
takes the memory of a second copy of the weights.

Each stage stores as many pieces as it runs, so the way from one to the other is a graph with as many edges out of every
stage as into it, and falls apart into that many rounds in each of which every stage sends one piece and receives one: a
permutation, which the devices do as one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.pipeline.schedule import Schedule


class Round(NamedTuple):
    """One permutation: by sender, which of its pieces it sends and to whom; by receiver, as which of its chunks."""

    piece: tuple[int, ...]
    receiver: tuple[int, ...]
    place: tuple[int, ...]


def rounds(schedule: Schedule, stages: int) -> tuple[Round, ...]:
    """How the pieces get from the stages that store them to those that run them; none where those are the same."""
    chunks = schedule.chunks
    runs = {
        schedule.position(stage, chunk, stages): (stage, chunk) for stage in range(stages) for chunk in range(chunks)
    }
    if all(runs[position] == divmod(position, chunks) for position in runs):
        return ()
    left = [{piece: runs[stage * chunks + piece] for piece in range(chunks)} for stage in range(stages)]
    found = []
    for _ in range(chunks):
        chosen = _matching([[stage for stage, _ in pieces.values()] for pieces in left])
        piece, place = [0] * stages, [0] * stages
        for sender, receiver in enumerate(chosen):
            piece[sender] = next(p for p, (stage, _) in left[sender].items() if stage == receiver)
            place[receiver] = left[sender].pop(piece[sender])[1]
        found.append(Round(tuple(piece), tuple(chosen), tuple(place)))
    return tuple(found)


def table(exchange: Sequence[Round], stages: int) -> np.ndarray:
    """[stages, rounds, 2]: the piece that a stage sends in each round, and where it puts the one that it receives."""
    found = [[*zip(r.piece, r.place, strict=True)] for r in exchange]
    return np.asarray(found, np.int32).reshape(len(exchange), stages, 2).swapaxes(0, 1)


class Exchange(NamedTuple):
    """An exchange as one stage sees it."""

    rounds: tuple[Round, ...]
    mine: jax.Array  # [1, rounds, 2]: the stage's own part of the `table`

    def there(self, layers: list[jax.Array]) -> list[jax.Array]:
        """Arrays [pieces * rows, ...] as they are stored, as they are run."""
        return self._send(layers, back=False)

    def back(self, layers: list[jax.Array]) -> list[jax.Array]:
        """And the other way."""
        return self._send(layers, back=True)

    def _send(self, layers: list[jax.Array], *, back: bool) -> list[jax.Array]:
        return [self._sent(array, back) for array in layers] if self.rounds else layers

    def _sent(self, array: jax.Array, back: bool) -> jax.Array:
        pieces = array.reshape(len(self.rounds), -1, *array.shape[1:])
        result = jnp.zeros_like(pieces)
        for number, (_, receiver, _) in enumerate(self.rounds):
            take, put = self.mine[0, number, 1 if back else 0], self.mine[0, number, 0 if back else 1]
            pairs = [(to, sender) if back else (sender, to) for sender, to in enumerate(receiver)]
            moved = jax.lax.ppermute(jax.lax.dynamic_index_in_dim(pieces, take, keepdims=False), "pp", pairs)
            result = jax.lax.dynamic_update_index_in_dim(result, moved, put, 0)
        return result.reshape(array.shape)


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
