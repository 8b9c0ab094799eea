"""The loss of a model on data that it does not learn from.

Every target weighs the same, whichever batch it stands in: losses and targets are summed over the batches, and divided
at the end. The routers' auxiliary loss is left out: it is of training alone, and perplexity is of the text.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tbjax.model import Decoder
from tbjax.training.batches import Feed, own_share
from tbjax.training.loss import cross_entropy
from tbjax.training.precision import DTYPES, Precision
from tbjax.training.state import Batch


class Evaluation(NamedTuple):
    """What an evaluation found."""

    loss: float  # mean over the targets, in nats
    targets: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def values(self) -> dict[str, float]:
        """As a log has it."""
        return {"evaluation_loss": self.loss, "perplexity": self.perplexity, "evaluation_targets": self.targets}


def evaluate(
    model: Decoder,
    data: Iterable[Any],
    *,
    precision: Precision = "mixed",
    batches: int | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """The mean loss of `model` over `data`, or over its first `batches`; `on_batch` is told how many are under way.

    A dataset of `tbjax.training.data` has no end; of it, all rows are taken once, in the same order every time.
    """
    given = own_share(data, model.sharding)
    if hasattr(given, "evaluation"):
        given = given.evaluation(batches)
    feed = Feed(given, model.sharding, model.config.vocab_size, "the evaluation data")
    loss, targets, before = 0.0, 0, None
    for count, batch in enumerate(itertools.islice(feed, batches), 1):
        on_batch(count)
        found = summed_loss(model, batch, precision)
        # One batch behind, as in training: the next is under way before this one's figures are waited for.
        if before is not None:
            loss, targets = loss + float(before[0]), targets + int(before[1])
        before = found
    if before is not None:
        loss, targets = loss + float(before[0]), targets + int(before[1])
    if targets == 0:
        raise ValueError("the evaluation data has no targets, so there is no loss.")
    return Evaluation(loss / targets, targets)


@functools.partial(jax.jit, static_argnums=2)
def summed_loss(model: Decoder, batch: Batch, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses of a batch, and the number of targets."""
    _, dtype = DTYPES[precision]
    hidden = model.hidden(batch.tokens, batch.mask, batch.positions, segments=batch.segments, dtype=dtype)
    return cross_entropy(model, hidden.states, batch.targets), jnp.sum(batch.targets >= 0)
