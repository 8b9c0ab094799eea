"""FLOPs and bytes of a layer: against published formulas, and against counting by hand."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.planner.work import (
    Cut,
    Matmul,
    backward,
    context_length,
    forward,
    forward_flops,
    head,
    layer,
    training_flops,
)
from tbjax.planner.workload import Workload

DENSE = LayerKind()


def gpt(*, hidden: int = 2304, heads: int = 24, layers: int = 24, vocab: int = 51200) -> ModelConfig:
    return ModelConfig(
        family="gpt",
        vocab_size=vocab,
        embed=hidden,
        mlp=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layer_kinds=(DENSE,) * layers,
        max_positions=2048,
        gated_mlp=False,
        norm="layer",
        tie_embeddings=True,
    )


def mixtral() -> ModelConfig:
    return ModelConfig(
        family="mixtral",
        vocab_size=32000,
        embed=4096,
        mlp=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        layer_kinds=(LayerKind(sparse=True),) * 32,
        max_positions=32768,
        moe=MoE(experts=8, experts_per_token=2, mlp=14336),
    )


@given(
    batch=st.integers(1, 64),
    sequence=st.sampled_from([512, 2048, 4096]),
    layers=st.integers(1, 100),
    heads=st.sampled_from([8, 24, 64]),
    vocab=st.sampled_from([32000, 51200]),
)
def test_flops_with_recomputation_are_narayanans_formula(batch, sequence, layers, heads, vocab):
    hidden = 64 * heads
    config = gpt(hidden=hidden, heads=heads, layers=layers, vocab=vocab)
    published = (
        96 * batch * sequence * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (16 * layers * hidden))
    )
    counted = training_flops(config, Workload(global_batch=batch, seq_len=sequence), recomputed=True)
    assert counted == pytest.approx(published, rel=1e-12)


def test_the_products_of_a_step_are_narayanans_formula():
    """The shapes that are timed, rather than a formula: layers with everything recomputed, and the head without."""
    config = gpt()
    cut = Cut(4, 2048)
    work = layer(config, DENSE, cut, "full", attention="materialised", size=2, prunes=False)
    logits = head(config, cut.tokens, 1)
    products = config.layers * work.flops + sum(each.flops for each in (logits, *logits.gradients()))
    assert products == pytest.approx(training_flops(config, Workload(global_batch=4, seq_len=2048), recomputed=True))


def test_causal_attention_has_half_the_pairs():
    config, sequence = gpt(), 2048
    whole, causal = (forward_flops(config, sequence, causal=causal) for causal in (False, True))
    attention = 4 * sequence * config.embed * config.layers
    assert whole - causal == pytest.approx(attention / 2, rel=1e-3)


@given(sequence=st.integers(1, 200), cached=st.integers(0, 200), window=st.one_of(st.none(), st.integers(1, 300)))
def test_context_length_is_what_counting_gives(sequence, cached, window):
    seen = [min(cached + position + 1, window or 10**9) for position in range(sequence)]
    assert context_length(sequence, window, cached) == pytest.approx(sum(seen) / sequence)


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", "scores"), ("full", "all")])
def test_remat_recomputes_what_it_says(remat, again):
    work = layer(gpt(), DENSE, Cut(1, 2048), remat, attention="materialised", size=2, prunes=False)
    scores = sum(matmul.flops for matmul in work.forward.scores)
    expected = {0: 0.0, "scores": scores, "all": work.forward.flops}[again]
    assert work.recomputed.flops == expected
    assert work.backward.flops == 2 * work.forward.flops


def test_a_compiler_prunes_the_last_product_of_a_recomputed_layer():
    config, cut = gpt(), Cut(1, 2048)
    everything = layer(config, DENSE, cut, "full", attention="fused", size=2, prunes=False)
    pruned = layer(config, DENSE, cut, "full", attention="fused", size=2, prunes=True)
    down = 2 * cut.tokens * config.mlp * config.embed
    assert everything.recomputed.flops - pruned.recomputed.flops == down


def test_fused_attention_recomputes_its_scores_backwards_and_moves_none():
    config, cut = gpt(), Cut(2, 2048)
    there = forward(config, DENSE, cut, attention="fused", size=2)
    back = backward(there, "fused")
    assert len(back.scores) == 5
    assert there.scores_moved == back.scores_moved == 0


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_cutting_a_layer_in_two_halves_its_flops(axis):
    config = gpt()
    whole = forward(config, DENSE, Cut(2, 2048), attention="fused", size=2)
    half = forward(config, DENSE, Cut(2, 2048, **{axis: 2}), attention="fused", size=2)
    assert half.flops == pytest.approx(whole.flops / 2)


def test_sequence_parallelism_cuts_what_tp_leaves_whole():
    config = gpt()
    moved = [
        forward(config, DENSE, Cut(2, 2048, tp=8, sequence_parallel=parallel), attention="fused", size=2).moved
        for parallel in (False, True)
    ]
    norms_and_sums = 2 * 2048 * config.embed * 2 * (2 * 2 + 3 * 2)
    assert moved[0] - moved[1] == pytest.approx(norms_and_sums * 7 / 8)


def test_few_key_value_heads_are_held_by_every_tp_device():
    config = dataclasses.replace(gpt(heads=24), kv_heads=2)
    projection = forward(config, DENSE, Cut(1, 1024, tp=8), attention="fused", size=2).weights[0]
    assert projection.columns == (24 // 8 + 2 * 1) * config.head_dim


def test_experts_do_the_work_of_the_active_parameters_only():
    config = mixtral()
    cut = Cut(1, 4096)
    work = forward(config, config.layer_kinds[0], cut, attention="fused", size=2)
    routed = sum(matmul.flops for matmul in work.weights[3:])
    assert routed == pytest.approx(
        2 * cut.tokens * 2 * 3 * 4096 * 14336
    )  # two experts of three matrices for each token
    assert all(matmul.copies == pytest.approx(8) for matmul in work.weights[3:])


def test_ep_leaves_the_flops_and_divides_the_weights_that_are_read():
    config = mixtral()
    alone, spread = (
        forward(config, config.layer_kinds[0], Cut(1, 4096, ep=ep), attention="fused", size=2) for ep in (1, 8)
    )
    assert spread.flops == pytest.approx(alone.flops)
    assert spread.weights[3].copies == pytest.approx(1)
    assert spread.moved > alone.moved  # its peers' tokens pass through the sort


def test_reading_a_prompt_multiplies_all_keys_and_writes_the_scores():
    config = gpt()
    seen, met = (forward(config, DENSE, Cut(2, 1024, met=m), attention="fused", size=2) for m in (None, 2048))
    assert (seen.scores[0].columns, met.scores[0].columns) == (1025 / 2, 2048)
    assert (seen.scores_moved, met.scores_moved) == (0, 12 * 2 * config.heads * 1024 * 2048)
    exact = forward(config, DENSE, Cut(2, 1024, met=2048), attention="fused", size=4)
    assert exact.scores_moved == met.scores_moved * 16 / 12  # softmax gives them in float32 as well
    # Where devices have parts of the keys, scores are read for the maximum and the sum before these go round.
    grouped = dataclasses.replace(config, kv_heads=1)
    for shared, cut in ((config, Cut(2, 1024, met=2048, cp=2)), (grouped, Cut(2, 1024, met=2048, tp=2))):
        apart = forward(shared, DENSE, cut, attention="fused", size=2)
        assert apart.scores_moved == met.scores_moved * 20 / 12 / 2
        exact = forward(shared, DENSE, cut, attention="fused", size=4)
        assert exact.scores_moved == apart.scores_moved * 24 / 20


def test_decoding_reads_each_key_once_for_all_queries_that_share_it():
    config = dataclasses.replace(gpt(hidden=4096, heads=32), kv_heads=8)
    scores = forward(config, DENSE, Cut(3, 1, context=1000), attention="fused", size=2).scores
    assert scores[0] == Matmul(4, 1001, config.head_dim, 3 * 8)


def test_gradients_have_the_operands_shapes():
    product = Matmul(5, 7, 11)
    left, right = product.gradients()
    assert (left.rows, left.columns) == (5, 11)
    assert (right.rows, right.columns) == (11, 7)
    assert left.flops == right.flops == product.flops
