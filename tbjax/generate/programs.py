"""The two programs of generation: one reads the prompts, the other writes tokens, both wholly on the device.

Prompts of different lengths are padded on the left, so that all rows end in the same slot; padding is masked, so a
row's tokens do not depend on its neighbours. Lengths, batches and caches come in few sizes (`tbjax.room`), and every
number that a call may change is an argument, so that a new call seldom compiles anew. A long prompt is read a chunk at
a time, from the chunk in which the longest row begins.

Writing is a loop on the device, which ends when every row has: one dispatch writes as many tokens as are asked for.
What it goes on from is a `State`, whose cache is given to each dispatch and written in place.

A model that lies over pipeline stages has a form of both of its own (`tbjax.pipeline.inference`).

B batch, S tokens of a prompt, T capacity of the cache.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from tbjax.generate.layers import Singles
from tbjax.generate.sampling import Chosen, Rows, Rules, choose
from tbjax.layers.cache import KVCache, grown, make_cache
from tbjax.model import Decoder
from tbjax.native import where_it_serves
from tbjax.pipeline import inference
from tbjax.room import tokens_at_once


class State(NamedTuple):
    """What writing goes on from."""

    cache: KVCache
    token: jax.Array  # [B] the last one chosen, which the cache has not yet
    done: jax.Array  # [B] the row has ended
    rows: Rows


def chunk_of(model: Decoder, rows: int, length: int) -> int:
    """How many tokens of each row are read at once, of prompts padded to `length`."""
    sharding = model.sharding
    on_device = -(-rows // sharding.size("dp", "fsdp", "ep"))
    return tokens_at_once(model.config, on_device, length, pp=sharding.size("pp"))


@partial(jax.jit, static_argnames=("capacity", "log_probabilities"))
def prefill(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    rules: Rules,
    rows: Rows,
    eos: jax.Array,
    done: jax.Array,
    layers: Singles | None = None,
    *,
    capacity: int,
    log_probabilities: bool = False,
) -> tuple[Chosen, State]:
    """The first token after each prompt [B, S], and what writing goes on from. Rows that are `done` do not count."""
    pick = partial(choose, rules, eos=eos, sharding=model.sharding, log_probabilities=log_probabilities)
    if inference.runs_in_stages(model):
        chosen, rows, cache = inference.prefill(model, tokens, mask, capacity, pick, rows)
    else:
        with where_it_serves(model.sharding):
            states, cache = _read(model, tokens, mask, layers, capacity)
            scores = model.logits(states)[:, 0]
        chosen, rows = pick(scores, rows)
    chosen = _everywhere(model, chosen)
    return chosen, State(cache, chosen.token, done | jnp.isin(chosen.token, eos), rows)


def _read(
    model: Decoder, tokens: jax.Array, mask: jax.Array, layers: Singles | None, capacity: int
) -> tuple[jax.Array, KVCache]:
    """The last state of each prompt, [B, 1, D], and the cache that holds the prompts."""
    batch, length = tokens.shape
    chunk = chunk_of(model, batch, length)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    blocks = None if layers is None else layers.blocks()
    make = partial(make_cache, model.config, model.sharding, batch, dtype=model.dtype, stacked=layers is None)
    if chunk == length:
        # Attention over the prompt alone, and room for what follows behind it.
        hidden = model.hidden(tokens, mask, positions, make(length), layers=blocks)
        return hidden.states[:, -1:], grown(model.config, model.sharding, cast(KVCache, hidden.cache), length, capacity)

    def read(number: jax.Array, carry: Any) -> Any:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=number * chunk, slice_size=chunk, axis=1)
        hidden = model.hidden(cut(tokens), cut(mask), cut(positions), carry[1], layers=blocks)
        return hidden.states[:, -1:], hidden.cache

    # Chunks in which no row has begun are passed over.
    first = jnp.argmax(jnp.any(mask, axis=0)) // chunk
    cache = make(capacity, chunk=chunk)._replace(length=first * chunk)
    states = jnp.zeros((batch, 1, model.config.embed), model.dtype)
    return jax.lax.fori_loop(first, length // chunk, read, (states, cache))


@partial(jax.jit, static_argnames=("room", "log_probabilities"), donate_argnames="state")
def decode(
    model: Decoder,
    state: State,
    rules: Rules,
    eos: jax.Array,
    count: jax.Array,
    layers: Singles | None = None,
    *,
    room: int,
    log_probabilities: bool = False,
) -> tuple[Chosen, State]:
    """The next `count` tokens of each row, [B, room], or fewer if every row has ended before."""
    pick = partial(choose, rules, eos=eos, sharding=model.sharding, log_probabilities=log_probabilities)
    batch = state.token.shape[0]
    written = Chosen(
        jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch, room), jnp.float32) if log_probabilities else None
    )
    if inference.runs_in_stages(model):
        written, state = inference.decode(model, state, written, pick, eos, count)
        return _everywhere(model, written), state

    blocks = None if layers is None else layers.blocks()

    def unfinished(carry: Any) -> jax.Array:
        number, _, state = carry
        return (number < count) & ~jnp.all(state.done)

    def step(carry: Any) -> Any:
        number, written, state = carry
        position = jnp.sum(state.cache.valid, axis=1, keepdims=True)
        with where_it_serves(model.sharding):
            hidden = model.hidden(state.token[:, None], None, position, state.cache, layers=blocks)
            scores = model.logits(hidden.states)[:, 0]
        chosen, rows = pick(scores, state.rows)
        written = jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, number, 1), written, chosen)
        done = state.done | jnp.isin(chosen.token, eos)
        return number + 1, written, State(cast(KVCache, hidden.cache), chosen.token, done, rows)

    _, written, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), written, state))
    return _everywhere(model, written), state


def _everywhere(model: Decoder, chosen: Chosen) -> Chosen:
    """What every process is to read, whole on every device."""
    return jax.tree.map(lambda a: model.sharding.constrain(a, *[None] * a.ndim), chosen)
