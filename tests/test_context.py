"""A sequence cut over cp gives what the whole one gives: by ring or gather, for every kind of attention and model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.layers import blocks, context
from tbjax.layers.attend import attend
from tbjax.layers.blocks import Keys, Scoring
from tbjax.layers.context import CutKeys, attend_over_context, ring_order
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, leaves
from tbjax.training import IGNORED, Batch, init_state, make_optimizer, make_step
from tbjax.training.evaluation import evaluate
from tbjax.training.step import gradients_of
from tests import tiny

ROWS, SEQUENCE = 4, 64
B, S, K, G, N = 2, 64, 2, 3, 8
SLOPES = ((0.0625, 0.03, 0.015), (0.008, 0.004, 0.002))
# Windows within a chunk, of several, and of one token: of 8 chunks of 8 tokens on cp=4.
SCORINGS = {
    "causal": Scoring(scale=0.25),
    "window": Scoring(scale=0.25, window=5),
    "wide-window": Scoring(scale=0.25, window=21),
    "window-of-one": Scoring(scale=0.25, window=1),
    "softcap-alibi": Scoring(scale=0.5, softcap=2.0, slopes=SLOPES),
}

# The attention.


# What runs in any case; the others take their time, and are marked slow.
ATTENTIONS = {("window", "ring"), ("softcap-alibi", "ring"), ("causal", "gather")}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in ATTENTIONS else pytest.mark.slow)
        for name in SCORINGS
        for method in ("ring", "gather")
    ],
)
def test_attention_in_parts_is_attention(name, method, monkeypatch):
    scoring = SCORINGS[name]
    # Blocks of 3 queries: they do not divide a chunk's 8.
    monkeypatch.setattr(context, "block_queries", lambda *_: 3)
    devices = {"cp": 4, "tp": 2}
    ours = values_and_gradients(cut_attention(scoring, method, devices, *documents()))
    for a, b in zip(ours, whole_attention(scoring), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_any_number_of_devices_gives_the_same(count):
    for scoring in (SCORINGS["causal"], SCORINGS["window"]):
        ours = values_and_gradients(cut_attention(scoring, "ring", {"cp": count}, *documents()))
        for a, b in zip(ours, whole_attention(scoring), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_the_order_gives_every_device_a_chunk_of_the_front_and_one_of_the_back():
    assert ring_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    sharding = on({"cp": 4})
    tokens = jnp.arange(2 * S).reshape(2, S)
    laid = context.to_ring_order(tokens, sharding)
    assert laid[1, :16].tolist() == [*range(S, S + 8), *range(2 * S - 8, 2 * S)]
    np.testing.assert_array_equal(context.to_natural_order(laid, sharding), tokens)


def test_the_ring_passes_keys_on_and_gathers_none():
    ring, gather = (program("ring", None), program("gather", None))
    assert "collective-permute" in ring
    assert "all-gather" not in ring
    assert "all-gather" in gather
    assert "reduce-scatter" in gather


def test_a_window_visits_only_the_neighbours_whose_keys_are_seen():
    # cp=8, chunks of 4: a window of 5 reaches one chunk back, which one neighbour or the other has.
    visited = program("ring", 5)
    hops = set(re.findall(r"collective-permute\(.*?source_target_pairs=\{\{0,(\d)\}", visited))
    assert hops == {"1", "6"}
    assert "while(" not in visited
    assert "while(" in program("ring", None)


def test_a_device_never_holds_all_keys():
    """Compiled for a long sequence, the ring's memory is that of its part of it."""
    held = {}
    for count in (2, 8):
        shapes = [(1, 16384, 1, 1, 16), (1, 16384, 1, 16), (1, 16384, 1, 16)]
        run = cut_attention(Scoring(scale=0.25), "ring", {"cp": count}, None, shapes=shapes)
        loss = jax.jit(jax.grad(lambda *operands, run=run: jnp.sum(jnp.sin(run(*operands))), argnums=(0, 1, 2)))
        sharding = on({"cp": count})
        laid = [
            jax.ShapeDtypeStruct(
                shape,
                jnp.float32,
                sharding=NamedSharding(sharding.mesh, PartitionSpec(None, "cp")),
            )
            for shape in shapes
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "SCORE_BYTES", 2**16)
            held[count] = loss.lower(*laid).compile().memory_analysis().temp_size_in_bytes
    assert held[8] < held[2] / 2.5


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(ValueError, match=r"30 tokens does not divide over cp=4.*multiple of 8; pad the rows to 32"):
        context.check(on({"cp": 4}), 30)
    with pytest.raises(ValueError, match="context='tree' is unknown: tbjax knows 'ring', 'gather'"):
        Sharding(on({"cp": 4}).mesh, context="tree")
    with pytest.raises(ValueError, match=r"context='ring' does not go with pp=2.*context='gather' would do"):
        on({"pp": 2, "cp": 4}, context="ring")


# Models.

MODELS = {
    # name: (case, mesh, method, kind of batch)
    "dense": ("llama", {"cp": 4, "tp": 2}, "ring", "whole"),
    "packed": ("llama", {"fsdp": 2, "cp": 2, "tp": 2}, "ring", "packed"),
    "padded": ("llama", {"cp": 8}, "ring", "padded"),
    "gathered": ("llama", {"cp": 4, "tp": 2}, "gather", "packed"),
    "window": ("mistral", {"cp": 8}, "ring", "packed"),
    "tied-windows-softcap": ("gemma2", {"fsdp": 2, "cp": 2, "tp": 2}, "ring", "whole"),
    "experts": ("mixtral", {"fsdp": 2, "cp": 2, "tp": 2}, "ring", "padded"),
    "experts-cut": ("mixtral", {"ep": 2, "cp": 4}, "ring", "packed"),
    "alibi": ("falcon-rw", {"cp": 4}, "ring", "padded"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("packed", "experts") else pytest.mark.slow) for name in MODELS]
)
def test_logits_loss_and_gradients_are_those_of_one_device(name):
    case, mesh, method, kind = MODELS[name]
    sharding = on(mesh, context=method)
    logits, loss, gradients = forward_and_back(case, sharding, kind)
    wanted_logits, wanted_loss, wanted = one_device(case, kind)
    real = np.ones((ROWS, SEQUENCE), bool) if batch(case, kind).mask is None else batch(case, kind).mask.astype(bool)
    assert distance(logits[real], wanted_logits[real]) <= 1e-5
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    largest = max(np.linalg.norm(g) for g in wanted.values())
    for path, gradient in wanted.items():
        # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
        if np.linalg.norm(gradient) > 1e-7 * largest:
            assert distance(gradients[path], gradient) <= 1e-5, path


@pytest.mark.slow
def test_documents_packed_in_a_row_are_what_they_are_alone():
    model = born("llama-dynamic", on({"cp": 4}))  # its rope stretches with the length of the document
    tokens = np.asarray(batch("llama-dynamic", "packed").tokens)
    packed = jax.jit(lambda model, tokens, segments: model(tokens, segments=segments))
    segments = np.array([[1] * 30 + [2] * 24 + [0] * 10], np.int32)
    logits = np.asarray(packed(model, tokens[:1], segments))
    alone = born("llama-dynamic", on({"dp": 1}))
    assert distance(logits[:, :30], alone(tokens[:1, :30])) <= 1e-5
    assert distance(logits[:, 30:54], alone(tokens[:1, 30:54])) <= 1e-5


@pytest.mark.slow
def test_steps_of_training_are_those_of_one_device():
    def run(sharding):
        model = born("llama", sharding)
        rule = make_optimizer("adamw", model, learning_rate=3e-4)
        state, step, losses = init_state(model, rule), make_step(rule, precision="float32", microbatches=2), []
        for _ in range(3):
            state, metrics = step(state, batch("llama", "packed"))
            losses.append(float(metrics.loss))
        return losses, state.model

    ours, wanted = run(on({"fsdp": 2, "cp": 4})), run(on({"dp": 1}))
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    assert wanted[0][-1] < wanted[0][0]
    for leaf, a, b in zip(leaves(ours[1]), jax.tree.leaves(ours[1]), jax.tree.leaves(wanted[1]), strict=True):
        assert distance(a, b) <= 1e-5, leaf.path


@pytest.mark.slow
def test_a_pipeline_cuts_sequences_too():
    sharding = on({"pp": 2, "cp": 4})
    loss, gradients, _ = jax.jit(
        lambda model, batch: gradients_of(model, batch, dtype=jnp.float32, remat="full", microbatches=2)
    )(born("llama", sharding), batch("llama", "packed"))
    _, wanted_loss, wanted = one_device("llama", "packed")
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for path, gradient in wanted.items():
        assert distance(gradients[path], gradient) <= 1e-5, path


@pytest.mark.parametrize("mesh", [{"cp": 4, "tp": 2}, {"pp": 2, "cp": 2, "fsdp": 2}], ids=["cp x tp", "pp x cp x fsdp"])
def test_an_evaluation_finds_the_loss_of_one_device(mesh):
    data = [batch("llama", "packed")] * 2
    ours, wanted = (evaluate(born("llama", on(devices)), data, precision="float32") for devices in (mesh, {"dp": 1}))
    assert ours.targets == wanted.targets
    np.testing.assert_allclose(ours.loss, wanted.loss, rtol=1e-6)


def test_a_step_refuses_a_sequence_that_does_not_divide():
    model = born("llama", on({"cp": 4}))
    tokens = np.zeros((2, 20), np.int32)
    with pytest.raises(ValueError, match="a sequence of 20 tokens does not divide over cp=4"):
        gradients_of(model, Batch(tokens, tokens), dtype=jnp.float32, remat="full", microbatches=1)
    # Without a loss it is read all the same, whole on every device.
    assert jax.eval_shape(model, tokens).shape == (2, 20, tiny.VOCABULARY)


def operands():
    random = np.random.default_rng(0)
    shapes = (B, S, K, G, N), (B, S, K, N), (B, S, K, N)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def documents():
    """Two rows: one of several documents, the other of one."""
    segments = np.stack((np.repeat([1, 2, 3], [7, 30, 27]), np.ones(S, int)))
    return (jnp.asarray(segments),)


def cut_attention(scoring, method, mesh, segments, shapes=None):
    """Attention of operands in ring order where they come compiled, in natural order otherwise."""
    sharding = on(mesh, context=method)
    order = ring_order(S, sharding.size("cp"))
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))

    def run(*operands):
        if shapes is not None:
            keys = CutKeys(None, jnp.zeros(operands[0].shape[:2], int), None)
            return attend_over_context(*operands, keys, scoring, sharding)
        lay = lambda a: None if a is None else a[:, order]  # noqa: E731
        keys = CutKeys(None, lay(positions), lay(segments))
        out = attend_over_context(*map(lay, operands), keys, scoring, sharding)
        return context.to_natural_order(out, sharding)

    return run


def values_and_gradients(function):
    def total(*operands):
        out = function(*operands)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*operands())
    return out, *gradients


@functools.cache
def whole_attention(scoring):
    keys = Keys(jnp.arange(S), None, jnp.broadcast_to(jnp.arange(S), (B, S)), *documents())
    return values_and_gradients(lambda *operands: attend(*operands, keys, scoring, on({"dp": 1}), "plain"))


@functools.cache
def program(method, window):
    """The text of attention and its gradients over cp=8, compiled."""
    shapes = [(B, S, K, G, N), (B, S, K, N), (B, S, K, N)]
    run = cut_attention(Scoring(scale=0.25, window=window), method, {"cp": 8}, None, shapes=shapes)
    sharding = on({"cp": 8})
    laid = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(sharding.mesh, PartitionSpec(None, "cp")))
        for shape in shapes
    ]
    loss = jax.grad(lambda *operands: jnp.sum(jnp.sin(run(*operands))), argnums=(0, 1, 2))
    return jax.jit(loss).lower(*laid).compile().as_text()


@functools.cache
def batch(case, kind):
    random = np.random.default_rng(0)
    tokens = random.integers(3, tiny.VOCABULARY, (ROWS, SEQUENCE + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:9] = IGNORED
    if kind == "whole":
        return Batch(tokens[:, :-1], targets)
    if kind == "padded":
        mask = (np.arange(SEQUENCE) >= np.array([[0], [11], [40], [3]])).astype(np.int32)
        return Batch(tokens[:, :-1], np.where(mask, targets, IGNORED), mask)
    segments = np.ones((ROWS, SEQUENCE), np.int32)
    segments[0] = np.repeat([1, 2, 3, 0], [20, 31, 9, 4])
    segments[1, 33:] = 2
    return Batch(tokens[:, :-1], np.where(segments, targets, IGNORED), segments=segments)


def forward_and_back(case, sharding, kind):
    """Logits, loss and gradients by path."""

    @jax.jit
    def run(model, batch):
        logits = model(batch.tokens, batch.mask, batch.positions, segments=batch.segments)
        return logits, *gradients_of(model, batch, dtype=jnp.float32, remat="full", microbatches=1)

    logits, loss, gradients, _ = run(born(case, sharding), batch(case, kind))
    return np.asarray(logits), float(loss), {path: np.asarray(g) for path, g in gradients.items()}


@functools.cache
def one_device(case, kind):
    return forward_and_back(case, on({"dp": 1}), kind)


def born(case, sharding):
    config = tiny.our_config(tiny.BY_NAME[case])
    if config.moe:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, auxiliary_loss_weight=0.1))
    make = lambda: Decoder(config, sharding, key=jax.random.key(1))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


def on(mesh, **options):
    return Sharding(make_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values())))]), **options)


def distance(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-30)
