"""What quantising costs: bytes, perplexity, and the divergence from the model in full, of SmolLM2-135M on real text.

    python -m benchmarks.quantize                     every row
    python -m benchmarks.quantize --only int8,int4    some of them

The text is the reference in every CPython (`tbjax.training.data.python_topics`), cut into windows. The divergence is
Kullback and Leibler's, KL(full || quantised), in nats, of the next token's distribution, averaged over all tokens.

Two things to know of this model. Its table serves as its head too, so by the rules neither is quantised; the rows
`head ...` quantise the head alone, as a model whose head is its own would have it. And its file has been through 4 bits
in groups of 32 (GGUF's Q4_1), each with a smallest number and a step: groups of 32 with an offset find that grid again,
which flatters them. The rows `off the grid` therefore quantise, and compare with, a model that computes the same from
other weights: each feature that a projection takes is made larger or smaller by a factor, and what gives it, a norm or
another projection, the other way. (Noise as large as half a step of the grid would leave it too, but to compare with a
model that noise has brought from perplexity 17.8 to 23.8 says little; the divergences are about the same.)
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tbjax
from benchmarks.checkpoints import SMOLLM2
from tbjax.dtypes import nbytes
from tbjax.quantize import Encoding, convert, recipe
from tbjax.quantize.rules import PROJECTIONS
from tbjax.quantize.weight import Parts, decoded, encoded
from tbjax.sharding import by_path, with_arrays
from tbjax.training.data import python_topics

WINDOWS, WINDOW = 2, 512

# Off the grid features are made larger or smaller by up to the root of two: the outer numbers of a group move by steps.
SPREAD = 0.5


class Row(NamedTuple):
    """What became of one way of keeping the weights."""

    name: str
    nbytes: int  # of all parameters
    perplexity: float
    divergence: float


def windows(tokenizer: Any, count: int = WINDOWS, length: int = WINDOW) -> np.ndarray:
    """Tokens [count, length] from the beginning of the text."""
    found: list[int] = []
    for text in python_topics():
        found += tokenizer(text)["input_ids"]
        if len(found) >= count * length:
            break
    return np.asarray(found[: count * length]).reshape(count, length)


def log_probabilities(model: Any, tokens: np.ndarray) -> jax.Array:
    """Of every next token [B, S, V], float32."""
    return _log_probabilities(model, tokens)


@jax.jit
def _log_probabilities(model: Any, tokens: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model.logits(model.hidden(tokens).states).astype(jnp.float32))


def divergence(full: jax.Array, other: jax.Array) -> float:
    """KL(full || other), a token."""
    return float(jnp.mean(jnp.sum(jnp.exp(full) * (full - other), axis=-1)))


def perplexity(found: jax.Array, tokens: np.ndarray) -> float:
    """Of the tokens after the first of each window."""
    said = jnp.take_along_axis(found[:, :-1], jnp.asarray(tokens)[:, 1:, None], axis=-1)
    return float(jnp.exp(-jnp.mean(said)))


def size(model: Any) -> int:
    """Bytes of all parameters."""
    return sum(nbytes(array.shape, array.dtype) for array in jax.tree.leaves(model))


def measured(model: Any, rules: Mapping[str, Callable[[], Any]], tokens: np.ndarray) -> Iterator[Row]:
    """Rows beside `model`, each of what its function makes."""
    full = log_probabilities(model, tokens)
    for name, make in rules.items():
        other = make()
        found = log_probabilities(other, tokens)
        yield Row(name, size(other), perplexity(found, tokens), divergence(full, found))


def ways(model: Any) -> dict[str, Callable[[], Any]]:
    """Ways of keeping the weights of `model`, by name."""

    def by(rules: Any) -> Callable[[], Any]:
        return lambda: jax.jit(lambda m: convert.quantized(m, recipe(rules), m.sharding))(model)

    names = ("int8", "int8:64", "int8:channel", "int4")
    return {name: by(name if name in ("int8", "int8:channel", "int4") else {PROJECTIONS: name}) for name in names}


def rescaled(model: Any, seed: int = 0) -> Any:
    """The function that `model` is, of weights that lie off the grid of 16 numbers that its file had for each group."""
    arrays, rng = {path: np.asarray(array) for path, array in by_path(model).items()}, np.random.default_rng(seed)

    def scale(giver: str, *takers: str, copies: int = 1) -> None:
        """Divide what a giver gives, and multiply the columns that take it; `copies` heads take a key-value head's."""
        factors = np.exp2(rng.uniform(-SPREAD, SPREAD, arrays[giver].shape[:2])).astype(np.float32)
        arrays[giver] = arrays[giver] / (factors[..., None] if arrays[giver].ndim == 3 else factors)
        heads = np.repeat(factors.reshape(len(factors), -1, 1, model.config.head_dim), copies, axis=2)
        for taker in takers:
            arrays[taker] = arrays[taker] * heads.reshape(len(factors), 1, -1)

    block, each = "stacks.0.0", model.config.heads // model.config.kv_heads
    attention, mlp = f"{block}.attention", f"{block}.mlp"
    scale(f"{attention}_norm.weight", *(f"{attention}.{name}.weight" for name in ("query", "key", "value")))
    scale(f"{attention}.value.weight", f"{attention}.output.weight", copies=each)
    scale(f"{mlp}_norm.weight", f"{mlp}.gate.weight", f"{mlp}.up.weight")
    scale(f"{mlp}.up.weight", f"{mlp}.down.weight")
    return with_arrays(model, {path: jnp.asarray(array) for path, array in arrays.items()})


def heads(model: Any, tokens: np.ndarray) -> Iterator[Row]:
    """The head alone."""
    full = log_probabilities(model, tokens)
    states = jax.jit(lambda m, t: m.hidden(t).states)(model, tokens)
    table = model.embedding.weight[...]
    for text in ("int8", "int8:channel", "int4"):
        parts = jax.jit(lambda table, text=text: encoded(table, -1, Encoding.parse(text)))(table)
        found = jax.nn.log_softmax(states @ decoded(parts, "float32").T[:, : model.config.vocab_size])
        held = sum(nbytes(a.shape, a.dtype) for a in Parts(*parts) if a is not None)
        yield Row(f"head {text}", size(model) - table.nbytes + held, perplexity(found, tokens), divergence(full, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of names, with commas between them")
    wanted = [part for part in parser.parse_args().only.split(",") if part]
    model = tbjax.load(SMOLLM2, (1, 1, 1), dtype="float32", progress=False)
    tokens = windows(model.tokenizer)
    chosen = lambda name: not wanted or any(part in name for part in wanted)  # noqa: E731

    def show(rows: Iterator[Row]) -> None:
        for row in rows:
            print(f"{row.name:28} {row.nbytes / 1e6:8.1f} MB  {row.perplexity:8.3f}  {row.divergence:.2e}", flush=True)

    print(f"{'':28} {'bytes':>11}  perplexity  divergence from float32")
    rounded = {"bfloat16": lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)}
    every = {"float32": lambda: model, **rounded, **ways(model)}
    show(measured(model, {name: make for name, make in every.items() if chosen(name)}, tokens))
    if chosen("head"):
        show(heads(model, tokens))
    if chosen("off the grid"):
        other = rescaled(model)
        every = {"float32": lambda: other, **ways(other)}
        show(measured(other, {f"off the grid, {name}": make for name, make in every.items()}, tokens))


if __name__ == "__main__":
    main()
