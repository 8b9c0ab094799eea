"""Compressed gradients: what was promised of each way arrives, in the bytes that were promised, and models learn."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tbjax.collectives import Peers
from tbjax.planner import hlo
from tbjax.training import Batch, abstract_state, compression, data, init_state, make_optimizer, make_step
from tbjax.training.compression import BLOCK, SCALED, Int8, RandomK, TopK, parse
from tbjax.training.saving import Saver
from tests.training.cases import ROWS, SEQUENCE, batch, born, config, farthest, on, same

PEERS = 8
# More than one block, and no multiple of anything.
ENTRIES = BLOCK + 1001
KINDS = [TopK(0.1), RandomK(0.1), Int8()]


# Sums of arrays.


@functools.cache
def sums(compression, peers=PEERS, group=1):
    """Of arrays [peers, n] and a key: each device's sum, and what it keeps."""
    mesh = jax.make_mesh((peers,), ("dp",), devices=jax.devices()[:peers], axis_types=(jax.sharding.AxisType.Auto,))

    def one(values, key):
        found, kept = compression.sum(values[0], Peers.along("dp").across(group), key)
        return found[None], None if kept is None else kept[None]

    spec = PartitionSpec("dp")
    return jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=(spec, spec), check_vma=False)
    )


@functools.cache
def gradients(entries=ENTRIES, peers=PEERS):
    return np.random.default_rng(0).standard_normal((peers, entries)).astype(np.float32)


def test_what_top_k_sends_and_what_it_keeps_is_the_gradient_exactly():
    given = gradients()
    found, kept = map(np.asarray, sums(TopK(0.01))(given, jax.random.key(0)))
    sent = np.where(kept == 0, given, 0)
    np.testing.assert_array_equal(sent + kept, given)
    assert 0.0099 < np.mean(sent != 0) < 0.0101
    # The largest, with their signs and in their places, summed device after device.
    assert np.any(sent < 0)
    assert np.abs(sent[sent != 0]).min() > 2.4  # the hundredth part of a normal distribution lies beyond 2.58
    total = functools.reduce(np.add, sent)
    for device in found:
        np.testing.assert_array_equal(device, total)


@pytest.mark.parametrize("group", [1, 2])
def test_what_was_kept_counts_on_whatever_device_it_lies(group):
    """So that a run may go on with another dp: sent and kept are all gradients and all that was kept before."""
    mesh = jax.make_mesh((4,), ("dp",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec, way = PartitionSpec("dp"), TopK(0.1, group=group)

    def one(gradient, residual, key):
        found, kept = compression._through(way, gradient[0], residual[0], key)
        return found[None], kept[None]

    through = jax.shard_map(
        one, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=(spec, spec), check_vma=False
    )
    given, before = gradients(1001, 4), 3 * np.random.default_rng(1).standard_normal((4, 1001)).astype(np.float32)
    found, kept = map(np.asarray, jax.jit(through)(given, before, jax.random.key(0)))
    assert np.any(found[0] != 0)
    np.testing.assert_allclose(found[0] + kept.sum(0), (given + before).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "compression",
    [
        TopK(1.0),
        RandomK(1.0),
        RandomK(1.0, algorithm="ring"),
        RandomK(1.0, algorithm="tree"),
    ],
    ids=str,
)
def test_all_of_it_is_the_plain_sum(compression):
    given = gradients(1001)
    found, kept = sums(compression)(given, jax.random.key(0))
    np.testing.assert_allclose(found, np.broadcast_to(given.sum(0), given.shape), atol=2e-6)
    assert kept is None or not np.any(kept)


@pytest.mark.parametrize("compression", [RandomK(0.1), Int8()], ids=str)
def test_on_average_the_sum_is_right(compression):
    """Of so many draws the mean of each entry lies within five of its standard deviations, which are known."""
    draws, given = 400, gradients(1001)
    exact = given.astype(np.float64).sum(0)
    step = sums(compression)
    found = np.stack([np.asarray(step(given, jax.random.key(draw))[0][0], np.float64) for draw in range(draws)])
    if isinstance(compression, RandomK):
        # One of m entries, scaled by m; runs have 9 or 10.
        deviation = np.abs(exact) * np.sqrt(10 - 1)
    else:
        # Rounding to a multiple of s at random has at most the deviation s / 2: once on each device, once of the sum.
        steps = [np.abs(given).max() / 127] * PEERS + [(np.abs(exact).max() + 1) / 127]
        deviation = np.full(exact.shape, np.linalg.norm(steps) / 2)
    bound = 5 * deviation / np.sqrt(draws)
    assert np.all(np.abs(found.mean(0) - exact) <= bound)
    # The bound is no formality: single draws are far off.
    assert np.mean(np.abs(found[0] - exact) > bound) > 0.5


@pytest.mark.parametrize("compression", KINDS, ids=str)
def test_every_device_decodes_the_same_bits(compression):
    found, _ = sums(compression)(gradients(1001), jax.random.key(3))
    assert all(np.array_equal(found[0], other) for other in found)


@pytest.mark.parametrize("compression", KINDS, ids=str)
def test_only_what_was_promised_travels(compression):
    """Bytes of the collectives in the program of eight devices, beside four an entry that an all-reduce sends twice."""
    shape = jax.ShapeDtypeStruct((PEERS, 2 * BLOCK), jnp.float32)
    text = sums(compression).lower(shape, jax.random.key(0)).compile().as_text()
    found = {c.kind: c.bytes for c in hlo.read(text, {"dp": PEERS}).collectives}
    chosen = 2 * -(-BLOCK // 10)  # in each of two blocks
    if isinstance(compression, TopK):
        assert found == {"all-gather": PEERS * chosen * (4 + 2)}
    elif isinstance(compression, RandomK):
        assert found == {"all-reduce": chosen * 4}
    else:
        there = 2 * BLOCK + 4 * 2 * BLOCK // SCALED
        assert found == {"all-to-all": there, "all-gather": there}


# Steps of training.

OPTIMIZER = optax.adamw(1e-2, eps=1e-3)
OPTIONS = {"precision": "float32", "on_nonfinite": "skip"}


@functools.cache
def text_batches(count):
    """Consecutive pieces of the help texts that come with Python, a character a token."""
    letters = np.frombuffer("".join(data.python_topics()).encode(), np.uint8).astype(np.int32)
    rows = np.clip(letters - 32, 0, 95)[: count * ROWS * (SEQUENCE + 1)].reshape(count, ROWS, SEQUENCE + 1)
    return [Batch(part[:, :-1].copy(), part[:, 1:].copy()) for part in rows]


@functools.cache
def program(mesh, compression, **options):
    """The compiled step and a state to begin with."""
    sharding = on(mesh)
    options = {**OPTIONS, **options, "compression": compression}
    make = lambda: init_state(born("llama", sharding, layers=1), OPTIMIZER, **options)  # noqa: E731
    state = make()
    return make_step(OPTIMIZER, **options, remat="none").lower(state, batch("llama")).compile(), make


def run(mesh, compression, batches):
    step, make = program(mesh, compression)
    state, losses = make(), []
    for rows in batches:
        state, metrics = step(state, rows)
        losses.append(float(metrics.loss))
    return losses, state


@functools.cache
def reference():
    return run((1, 1, 1), None, [batch("llama", seed=seed) for seed in range(3)])


@pytest.mark.parametrize(
    ("mesh", "compression"),
    [
        ((2, 2, 2), TopK(1.0)),
        pytest.param((8, 1, 1), TopK(1.0, group=2), marks=pytest.mark.slow),
        pytest.param((2, 2, 2), RandomK(1.0), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), TopK(1.0), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), RandomK(1.0, algorithm="ring", group=4), marks=pytest.mark.slow),
        pytest.param((4, 1, 2), TopK(1.0), marks=pytest.mark.slow),
        pytest.param((4, 2, 1), RandomK(1.0, algorithm="tree"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_with_all_entries_sent_a_step_is_that_of_one_device(mesh, compression):
    losses, state = run(mesh, compression, [batch("llama", seed=seed) for seed in range(3)])
    wanted_losses, wanted = reference()
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert farthest(state.model, wanted.model)[0] <= 1e-5


@pytest.mark.parametrize(
    "compression",
    [TopK(0.1), *(pytest.param(kind, marks=pytest.mark.slow) for kind in (RandomK(0.1), Int8()))],
    ids=str,
)
def test_a_model_learns_text_as_fast_within_a_margin_and_sends_less(compression):
    """The loss of the last ten of 60 steps, beside that of uncompressed training: 3.13 at the end, from 4.56."""
    batches = text_batches(60)
    plain, _ = run((8, 1, 1), None, batches)
    losses, _ = run((8, 1, 1), compression, batches)
    at_first, wanted, found = plain[0], np.mean(plain[-10:]), np.mean(losses[-10:])
    assert wanted < at_first - 1
    assert found <= wanted + MARGINS[type(compression)] * (at_first - wanted)
    # An all-reduce sends every entry of four bytes twice. Entries of top-k go to all devices, with two bytes of place.
    sent, all_of_it = (traffic(program((8, 1, 1), kind)[0]) for kind in (compression, None))
    share = {TopK: 0.1 * PEERS * (4 + 2) / (2 * 4), RandomK: 0.1, Int8: (1 + 4 / SCALED) / 4}[type(compression)]
    # Small tensors are rounded up to whole entries, or to whole blocks of eight bits.
    assert share <= sent / all_of_it <= share * (2.6 if compression == Int8() else 1.02)


# How much of what uncompressed training gains by the end may be missing.
MARGINS = {TopK: 0.03, RandomK: 0.03, Int8: 0.01}


def traffic(program):
    """The bytes that each device sends in a step."""
    return sum(c.sent for c in hlo.read(program.as_text(), {"dp": PEERS}).collectives)


def test_a_run_goes_on_with_what_was_not_sent(tmp_path):
    """A state from the disk gives the same bits, residuals included."""
    step, _ = program((8, 1, 1), TopK(0.1))
    batches = text_batches(60)[:4]
    _, state = run((8, 1, 1), TopK(0.1), batches[:2])
    with Saver(tmp_path, keep=1) as saver:
        saver.save(state, 2, data=None, config=None)
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
        resumed = saver.restore(like)
    assert any(np.any(np.asarray(a)) for a in jax.tree.leaves(resumed.residual))
    for rows in batches[2:]:
        (state, _), (resumed, _) = step(state, rows), step(resumed, rows)
    assert same(resumed, state)


def test_a_step_that_is_skipped_leaves_what_was_not_sent():
    step, _ = program((8, 1, 1), TopK(0.1))
    _, state = run((8, 1, 1), TopK(0.1), text_batches(60)[:1])
    before = jax.tree.map(np.asarray, state.residual)
    state, metrics = step(state._replace(model=jax.tree.map(lambda a: a * np.nan, state.model)), text_batches(60)[1])
    assert metrics.skipped
    assert same(state.residual, before)


def test_residuals_lie_as_they_are_planned():
    sharding = on((2, 2, 2))
    model = born("llama", sharding)
    state = init_state(model, OPTIMIZER, compression="top-k:0.1")
    planned = abstract_state(config("llama"), sharding, lambda model: OPTIMIZER, compression=TopK(0.1))
    for found, wanted in zip(jax.tree.leaves(state.residual), jax.tree.leaves(planned.residual), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    assert init_state(model, OPTIMIZER, compression="int8").residual is None


# Words.


def test_compressions_are_named_by_words():
    assert parse(None) is None
    assert parse("top-k:0.01") == TopK(0.01)
    assert parse("random-k:0.1") == RandomK(0.1)
    assert parse("int8") == Int8()
    assert parse(Int8(group=4)) == Int8(group=4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("zip", "compression='zip' is unknown: tbjax knows 'top-k:0.01'"),
        ("top-k", "compression='top-k' is unknown"),
        ("top-k:many", "compression='top-k:many': could not convert"),
        ("random-k:1.5", "RandomK.ratio=1.5: it is the share of a gradient that is sent"),
    ],
)
def test_other_words_are_refused(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(asked)


def test_groups_have_members():
    with pytest.raises(ValueError, match=r"Int8\.group=0"):
        Int8(group=0)


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        ({"pp": 2, "dp": 2, "tp": 2}, {}, "is not for pipelines"),
        ({"fsdp": 8}, {}, "the mesh has dp=1"),
        ({"dp": 8}, {"compression": TopK(0.1, group=3)}, "groups of 3 do not divide dp=8"),
        ({"dp": 8}, {"compression": TopK(0.1, group=8)}, "groups of 8 do not divide dp=8 into two or more"),
        ({"dp": 8}, {"offload": ("parameters",)}, "gradients of parameters in the host's memory"),
    ],
)
def test_meshes_and_options_that_do_not_go_with_it_are_refused(mesh, options, message):
    def rule(model):
        return make_optimizer("adamw", model)

    with pytest.raises(ValueError, match=re.escape(message)):
        abstract_state(config("llama"), on(mesh), rule, **{"compression": "int8", **options})


def test_a_state_made_without_is_refused():
    model = born("llama", on((8, 1, 1)), layers=1)
    step = make_step(OPTIMIZER, compression="top-k:0.1")
    with pytest.raises(ValueError, match="the state does not have what compression keeps"):
        step.lower(init_state(model, OPTIMIZER), batch("llama"))
