"""Attention in blocks is attention: the same values and gradients in every form, and no scores that stand in memory."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.config import LayerKind, ModelConfig
from tbjax.layers import attend as attend_module
from tbjax.layers import blocks, splash
from tbjax.layers.attend import KERNELS, attend
from tbjax.layers.blocks import Keys, Scoring, bands_of, block_queries
from tbjax.mesh import make_mesh
from tbjax.planner.compilers import installed
from tbjax.planner.verify import verify
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import Sharding

B, S, K, G, N = 2, 300, 2, 3, 16
ONE = Sharding(make_mesh((1, 1, 1), jax.devices()[:1]))
SCORINGS = {
    "causal": Scoring(scale=0.25),
    "window": Scoring(scale=0.25, window=37),
    "softcap": Scoring(scale=0.5, softcap=2.0),
    "alibi": Scoring(scale=0.25, slopes=((0.0625, 0.03, 0.015), (0.008, 0.004, 0.002))),
}


def operands():
    random = np.random.default_rng(0)
    shapes = (B, S, K, G, N), (B, S, K, N), (B, S, K, N)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def keys(row: str = "whole") -> Keys:
    valid = np.ones((B, S), bool)
    if row == "padded":
        valid[0, :70] = False
        valid[1, 250:] = False
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0) * valid
    segments = jnp.asarray([np.repeat([1, 2, 0], [110, 170, 20]), np.ones(S, int)], jnp.int32)
    return Keys(
        jnp.arange(S),
        jnp.asarray(valid) if row == "padded" else None,
        jnp.asarray(positions),
        segments if row == "packed" else None,
    )


@pytest.mark.parametrize("row", ["whole", "padded", "packed"])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_blocks_give_the_values_and_gradients_of_all_scores_at_once(scoring, row, monkeypatch):
    # Four bands of 96 queries, the last of 12, in blocks of 64: neither divides what it cuts.
    monkeypatch.setattr(blocks, "BLOCK_MULTIPLE", 32)
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * S * B * K * G * 4 * 50)

    def out_and_gradients(implementation):
        def total(*operands):
            out = attend(*operands, keys(row), scoring, ONE, implementation)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*operands())
        return out, *gradients

    for ours, wanted in zip(out_and_gradients("blockwise"), out_and_gradients("plain"), strict=True):
        # A sum of terms that nearly cancel keeps their rounding: four units in the last place of the largest.
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=4 * np.spacing(np.max(np.abs(wanted))))


def test_queries_that_fill_up_a_block_have_no_gradient(monkeypatch):
    """What they would see has scores that float32 cannot exponentiate: steep slopes, in a window."""
    monkeypatch.setattr(blocks, "BLOCK_MULTIPLE", 32)
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * S * B * K * G * 4 * 50)  # blocks of 64 in bands of 96
    steep = Scoring(scale=0.35, window=20, slopes=((3.0, 1.0, 0.5), (2.0, 0.25, 0.1)))

    def gradients(implementation):
        total = lambda *operands: jnp.sum(jnp.sin(attend(*operands, keys(), steep, ONE, implementation)))  # noqa: E731
        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*operands())

    for ours, wanted in zip(gradients("blockwise"), gradients("plain"), strict=True):
        # Scores of some hundreds are rounded in the fifth place.
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_plain_attention_is_what_the_formula_says():
    query, key, value = operands()
    out = attend(query, key, value, keys(), Scoring(scale=0.25, window=5), ONE, "plain")
    b, s, k, g = 1, 200, 1, 2
    scores = [0.25 * float(query[b, s, k, g] @ key[b, t, k]) for t in range(s - 4, s + 1)]
    weights = np.exp(scores) / np.sum(np.exp(scores))
    np.testing.assert_allclose(out[b, s, k, g], weights @ np.asarray(value[b, s - 4 : s + 1, k]), rtol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_policy_keeps_the_scores(remat):
    from tbjax.remat import rematerialised

    scoring, sequence = Scoring(scale=0.25), 4096
    shapes = [(1, sequence, 4, 2, N), (1, sequence, 4, N), (1, sequence, 4, N)]

    def layer(query, key, value):
        slots = jnp.arange(sequence)
        return attend(query, key, value, Keys(slots, None, slots[None]), scoring, ONE)

    loss = lambda *operands: jnp.sum(jnp.sin(rematerialised(layer, remat)(*operands)))  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    )
    whole = 4 * 8 * sequence * sequence
    assert compiled.compile().memory_analysis().temp_size_in_bytes < whole / 2


def test_bands_compute_five_eighths_of_all_pairs_and_of_a_window_what_it_shows():
    bands = bands_of(4096, None)
    assert sum((band.last - band.first) * (band.last - band.begin) for band in bands) == 4096**2 * 5 // 8
    assert max(band.last - band.begin for band in bands_of(4096, 100)) == 1024 + 99
    assert len(bands_of(128, None)) == 1


def test_what_attention_gave_can_be_kept_so_that_it_is_computed_once():
    from tbjax.remat import rematerialised

    def exponentials(remat):
        def layer(*operands):
            return jnp.sin(attend(*operands, keys(), SCORINGS["causal"], ONE))

        loss = lambda *operands: jnp.sum(rematerialised(layer, remat)(*operands))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(*operands())).count(" exp ")

    assert exponentials("save(attended)") < exponentials("full")


def test_a_block_is_all_queries_where_they_fit_and_even_parts_of_them_where_not():
    assert block_queries(24, 24, 64) == 24
    assert block_queries(1, 1 << 20, 1 << 10) == 1  # decoding: one query, however many keys
    block = block_queries(4096, 4096, 64)
    assert block % 128 == 0
    assert 4 * block * 4096 * 64 <= 2 * blocks.SCORE_BYTES
    assert block_queries(4096, 4096, 10_000) == blocks.BLOCK_MULTIPLE


# Kernels.


@pytest.mark.parametrize(
    "scoring", [Scoring(scale=0.25), Scoring(scale=0.5, window=150, softcap=2.0)], ids=["causal", "window, softcap"]
)
def test_splash_attention_is_attention(scoring):
    """Of documents in a row, with three blocks each way; the kernel is interpreted, as there is no TPU."""
    sequence, random = 384, np.random.default_rng(0)
    shapes = (2, sequence, 2, 2, N), (2, sequence, 2, N), (2, sequence, 2, N)
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    segments = jnp.asarray([np.repeat([1, 2, 0], [100, 250, 34]), np.ones(sequence, int)], jnp.int32)
    keys = Keys(jnp.arange(sequence), None, jnp.broadcast_to(jnp.arange(sequence), segments.shape), segments)

    def out_and_gradients(function):
        def total(*operands):
            out = function(*operands)
            return jnp.sum(jnp.sin(out)), out

        gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return out, *gradients

    ours = out_and_gradients(lambda *operands: splash.attention(scoring, *operands, segments, interpret=True))
    wanted = out_and_gradients(lambda *operands: attend(*operands, keys, scoring, ONE, "plain"))
    for a, b in zip(ours, wanted, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_what_does_not_serve_is_refused_by_name():
    with pytest.raises(ValueError, match="'flash' is unknown: tbjax knows 'plain', 'blockwise', 'cudnn', 'splash'"):
        attend(*operands(), keys(), SCORINGS["causal"], ONE, "flash")
    with pytest.raises(ValueError, match="'cudnn' does not serve here: the mesh is not of NVIDIA GPUs"):
        attend(*operands(), keys(), SCORINGS["causal"], ONE, "cudnn")
    with pytest.raises(ValueError, match="'splash' does not serve here: the mesh is not of TPUs"):
        attend(*operands(), keys(), SCORINGS["causal"], ONE, "splash")


@pytest.mark.parametrize(
    ("kernel", "sequence", "dtype", "change", "reason"),
    [
        ("splash", 384, "bfloat16", {}, ""),
        ("splash", 384, "float32", {"scoring": "softcap", "segments": True}, ""),
        ("splash", 384, "bfloat16", {"scoring": "window"}, ""),
        ("splash", 300, "bfloat16", {}, "a sequence that is a multiple of 128, not 300"),
        ("splash", 384, "float16", {}, "not float16"),
        ("splash", 384, "bfloat16", {"scoring": "alibi"}, "no ALiBi"),
        ("splash", 384, "bfloat16", {"padded": True}, "without padding"),
        ("cudnn", 300, "bfloat16", {"scoring": "window"}, ""),
        ("cudnn", 300, "float32", {}, "needs 16 bits, not float32"),
        ("cudnn", 300, "float16", {"scoring": "softcap"}, "neither a cap of scores nor ALiBi"),
        ("cudnn", 300, "float16", {"segments": True}, "no documents packed in a row"),
        ("cudnn", 300, "float16", {"padded": True}, "without padding"),
    ],
)
def test_a_kernel_serves_where_it_knows_all_that_is_asked(kernel, sequence, dtype, change, reason, monkeypatch):
    """The rules ask nothing of a device but what it is."""
    platform = {"splash": "tpu", "cudnn": "gpu"}[kernel]
    device = SimpleNamespace(platform=platform, compute_capability="9.0", device_kind="a kind")
    monkeypatch.setattr(attend_module, "_device", lambda _: device)
    query = jax.ShapeDtypeStruct((1, sequence, K, G, N), jnp.dtype(dtype))
    row = jnp.zeros((1, sequence), jnp.int32)
    asked = Keys(row[0], row == 0 if "padded" in change else None, row, row if "segments" in change else None)
    said = KERNELS[kernel].refuses(query, asked, SCORINGS[change.get("scoring", "causal")], ONE)
    assert bool(said) == bool(reason)
    assert reason in said


@pytest.mark.slow
@pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed: tbjax[verify]")
@pytest.mark.parametrize(
    ("cluster", "kind", "layout", "sequence", "runs"),
    [
        ("v5p:2x2x1", {}, Layout(fsdp=2, tp=2), 512, 8),
        ("v5e:2x2", {"window": 200}, Layout(fsdp=2, tp=2, remat="none"), 384, 6),
        ("v5p:2x2x1", {}, Layout(pp=2, tp=2, microbatches=4), 512, None),
        ("v5p:2x2x1", {}, Layout(fsdp=2, tp=2), 320, 0),  # not a multiple of 128
        ("v5p:2x2x1", {}, Layout(fsdp=2, cp=2), 512, 0),
    ],
    ids=["fsdp x tp", "window, remat none", "pp x tp", "other lengths", "cp"],
)
def test_the_compiler_for_tpu_gets_the_kernel_where_it_serves(cluster, kind, layout, sequence, runs):
    """Of two layers, each runs it forwards, again under remat, and for the gradients of keys and of queries."""
    config = ModelConfig(
        family="llama",
        vocab_size=1024,
        embed=256,
        mlp=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        layer_kinds=(LayerKind(**kind),) * 2,
        max_positions=4096,
        attention_softcap=30.0 if kind else None,
    )
    found = verify(config, Workload(global_batch=8, seq_len=sequence), layout, cluster).compiled
    assert found.untold == runs if runs is not None else found.untold > 0
    assert found.unknown_loops == 0
