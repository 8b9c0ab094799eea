"""The cache: what each device holds of it, and that what is written stands where it is looked for."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax import LayerKind, ModelConfig, room
from tbjax.generate import decode, prefill
from tbjax.generate.sampling import Rows
from tbjax.layers.blocks import Keys
from tbjax.layers.cache import grown, make_cache
from tbjax.layers.linear import as_sharding
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.planner import hlo
from tbjax.planner.hardware import cluster
from tbjax.planner.memory import memory
from tbjax.planner.workload import Layout, Workload

CONFIG = ModelConfig(
    family="llama",
    vocab_size=256,
    embed=64,
    mlp=64,
    heads=8,
    kv_heads=2,
    head_dim=16,
    layer_kinds=(LayerKind(), LayerKind(window=5)) * 2,
    max_positions=512,
)
ROWS, CAPACITY = 4, 50


def sharding_of(**axes):
    return as_sharding(make_mesh(axes, jax.devices()[: int(np.prod([*axes.values()]))]))


@pytest.mark.parametrize(
    ("axes", "slots", "ways"),
    [
        ({"tp": 2, "dp": 2}, (50, 5), 4),  # by heads
        ({"tp": 8}, (56, 8), 8),  # by tokens: of a head, each of four devices would hold all
        ({"cp": 2, "tp": 2}, (50, 6), 4),  # by both
        ({"cp": 2, "tp": 4}, (56, 8), 8),
        ({"fsdp": 2, "tp": 4}, (52, 8), 8),
    ],
    ids=str,
)
def test_no_device_holds_what_another_does(axes, slots, ways):
    sharding = sharding_of(**axes)
    cache = jax.jit(lambda: make_cache(CONFIG, sharding, ROWS, CAPACITY, jnp.float32, chunk=1))()
    for size, layer in zip(slots, cache.layers[0], strict=True):
        for a in (layer.keys, layer.values):
            assert a.shape == (2, ROWS, CONFIG.kv_heads, size, CONFIG.head_dim)
            assert {shard.data.nbytes * ways for shard in a.addressable_shards} == {a.nbytes}
    assert cache.valid.shape == (ROWS, slots[0])


@pytest.mark.parametrize("axes", [{"tp": 1}, {"tp": 2}, {"tp": 8}, {"cp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_what_is_written_stands_where_it_is_looked_for(axes, window):
    """Chunks of three, then single tokens, round a ring several times."""
    sharding, length = sharding_of(**axes), 30
    config = dataclasses.replace(CONFIG, layer_kinds=(LayerKind(window=window),))
    made = jax.jit(lambda: make_cache(config, sharding, 2, length + 2, jnp.float32, chunk=3, stacked=False))()
    (layer,), known = made.layers[0][0], jnp.zeros(made.valid.shape, bool)
    tokens = jax.random.normal(jax.random.key(0), (2, length, CONFIG.kv_heads, CONFIG.head_dim))
    write = jax.jit(lambda layer, new, keys: layer.write(new, -new, keys, CONFIG, sharding))
    first = 0
    while first < length:
        count = 3 if first < 18 else 1
        places = jnp.arange(first, first + count)
        known = known.at[:, places].set(True)
        positions = jnp.broadcast_to(jnp.arange(known.shape[1]), known.shape)
        layer, key, value, keys = write(layer, tokens[:, first : first + count], Keys(places, known, positions))
        first += count
        slots = np.arange(known.shape[1]) if keys.slots is None else np.asarray(keys.slots)
        there = np.asarray(keys.valid[0]) & (slots >= max(0, first - (window or length)))
        assert sorted(slots[there]) == list(range(max(0, first - (window or length)), first))
        np.testing.assert_array_equal(np.asarray(key)[:, there], np.asarray(tokens)[:, slots[there]])
        np.testing.assert_array_equal(np.asarray(value)[:, there], -np.asarray(tokens)[:, slots[there]])


def test_a_cache_of_a_prompt_grows_into_rings():
    sharding, length = sharding_of(tp=8), 21
    cache = make_cache(CONFIG, sharding, ROWS, length, jnp.float32)
    numbers = jnp.arange(length, dtype=jnp.float32)[:, None]
    filled = jax.tree.map(lambda a: a.at[..., :length, :].set(numbers), cache.layers)
    more = grown(CONFIG, sharding, cache._replace(layers=filled, length=jnp.int32(length)), length, CAPACITY)
    whole, ring = (np.asarray(layer.keys)[0, 0, 0, :, 0] for layer in more.layers[0])
    assert whole.tolist() == [*range(length), *[0] * (56 - length)]
    assert ring.tolist() == [16, 17, 18, 19, 20, 13, 14, 15]  # slot s at place s % 8


@pytest.mark.parametrize(
    ("axes", "changed", "prompt"),
    [
        ({"dp": 2, "tp": 2}, {}, 40),  # grouped queries, windows
        ({"dp": 2, "tp": 2}, {"heads": 9, "kv_heads": 3}, 40),  # a head of zeros
        ({"tp": 8}, {}, 40),  # more devices than heads
        ({"cp": 2, "tp": 4}, {}, 40),
        ({"tp": 8}, {}, 4 * room.SMALLEST_CHUNK),  # in chunks, to which rings have to be larger
    ],
    ids=str,
)
def test_the_planner_prices_what_is_allocated(axes, changed, prompt):
    config = dataclasses.replace(CONFIG, max_positions=4096, **changed)
    rows, new = ROWS, 10
    sharding = sharding_of(**axes)
    made = jax.eval_shape(lambda: Decoder(config, sharding, dtype=jnp.bfloat16))
    shapes: Any = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows, prompt))]
    of_rows, tokens = shapes
    given = {}, Rows(written=of_rows, least=of_rows), np.asarray([-1], np.int32), np.zeros(rows, bool)
    _, state = jax.eval_shape(partial(prefill, capacity=prompt + new), made, tokens, tokens, *given)
    allocated = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.cache.layers))
    workload = Workload(task="inference", global_batch=rows, seq_len=prompt + new, new_tokens=new, precision="bfloat16")
    planned = memory(config, workload, Layout(**axes), cluster("h100:8").hardware).parts["KV cache"]
    assert planned * sharding.mesh.size == allocated


def test_a_step_sends_numbers_for_each_head_and_never_the_cache():
    made = tbjax.from_config(CONFIG, make_mesh((1, 1, 8)))
    tokens, ends = np.ones((ROWS, 32), np.int32), np.asarray([-1], np.int32)
    none, rows = np.zeros(ROWS, bool), Rows(written=jnp.zeros(ROWS, jnp.int32), least=jnp.zeros(ROWS, jnp.int32))
    _, state = prefill(made, tokens, tokens, {}, rows, ends, none, capacity=64)
    cache = state.cache.layers[0][0].keys
    assert {shard.data.nbytes * 8 for shard in cache.addressable_shards} == {cache.nbytes}
    compiled = decode.lower(made, state, {}, ends, np.int32(4), room=4).compile()
    sent = hlo.read(compiled.as_text() or "", made.mesh.shape).collectives
    assert sent
    # A layer's keys are far larger than the states of the token that they are looked through for.
    states = ROWS * CONFIG.heads * CONFIG.head_dim * 4
    assert max(one.bytes / one.count for one in sent) <= states < cache.nbytes / 2 / 4
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(a.nbytes for a in jax.tree.leaves(state.cache.layers)) // 8  # in place
