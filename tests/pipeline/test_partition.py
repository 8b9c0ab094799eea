"""Layers go to stages so that the longest is as short as any division makes it, within memory and the user's cuts."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.pipeline.partition import Layer, model_layers, partition
from tbjax.pipeline.price import peak_activations
from tbjax.pipeline.schedule import OneFOneB
from tbjax.planner.parameters import parameters


def layers(*times, memory=0.0, activations=0.0):
    return [Layer(name=f"l{i}", time=time, memory=memory, activations=activations) for i, time in enumerate(times)]


@st.composite
def problems(draw):
    count = draw(st.integers(1, 8))
    figure = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10))
    found = [
        Layer(name=f"l{i}", time=draw(figure), memory=draw(figure), activations=draw(figure)) for i in range(count)
    ]
    stages = draw(st.integers(1, count))
    memory = draw(st.one_of(st.none(), st.floats(0, 60), st.lists(st.floats(0, 60), min_size=stages, max_size=stages)))
    held = draw(st.lists(st.floats(0, 3), min_size=stages, max_size=stages))
    splits = draw(st.sets(st.integers(1, count - 1), max_size=stages - 1)) if count > 1 else set()
    return found, stages, memory, held, splits


def every_division(found, stages, memory, held, splits):
    """(longest stage, sum of squares, starts) of all that are allowed, by trying them one by one."""
    limits = memory if isinstance(memory, list) else [float("inf") if memory is None else memory] * stages
    for inner in itertools.combinations(range(1, len(found)), stages - 1):
        if not splits <= set(inner):
            continue
        cut = [found[a:b] for a, b in itertools.pairwise((0, *inner, len(found)))]
        needs = [sum(x.memory + h * x.activations for x in stage) for stage, h in zip(cut, held, strict=True)]
        if all(need <= limit * (1 + 1e-9) for need, limit in zip(needs, limits, strict=True)):
            times = [sum(x.time for x in stage) for stage in cut]
            yield max(times), sum(time * time for time in times), (0, *inner)


@settings(max_examples=200)
@given(problems())
def test_no_division_that_is_allowed_has_a_shorter_longest_stage(problem):
    found, stages, memory, held, splits = problem
    allowed = list(every_division(*problem))
    if not allowed:
        with pytest.raises(ValueError, match="fits into memory"):
            partition(found, stages, memory=memory, held=held, splits=splits)
        return
    division = partition(found, stages, memory=memory, held=held, splits=splits)
    assert division.starts in {starts for _, _, starts in allowed}
    shortest = min(longest for longest, _, _ in allowed)
    assert division.longest == pytest.approx(shortest, rel=1e-8)
    # Of those it is the most even.
    evenest = min(squares for longest, squares, _ in allowed if longest <= shortest * (1 + 1e-8))
    assert sum(time * time for time in division.times) == pytest.approx(evenest, rel=1e-7)


@given(problems())
def test_every_layer_is_in_one_stage_and_none_is_empty(problem):
    found, stages, _, _, splits = problem
    division = partition(found, stages, splits=splits)
    assert list(itertools.chain(*division.stages)) == found
    assert min(division.counts) >= 1
    assert len(division.counts) == stages
    assert splits <= set(division.starts)


def test_a_heavy_head_takes_blocks_from_its_stage():
    division = partition(layers(0, *[1] * 10, 3), 3)
    assert sorted(division.times) == [4, 4, 5]
    assert division.counts[-1] == 2  # one block and the head


def test_a_stage_with_more_under_way_gets_fewer_layers():
    """1F1B's first stage holds four microbatches, its last one."""
    held = peak_activations(OneFOneB(), 4, 16)
    roomy = partition(layers(*[1] * 20, activations=1), 4, held=held)
    assert roomy.counts == (5, 5, 5, 5)
    tight = partition(layers(*[1] * 20, activations=1), 4, held=held, memory=16)
    assert tight.counts[0] == 4
    assert max(tight.memories) <= 16
    assert "with unlimited memory it would take 5" in tight.explain()


def test_the_users_cuts_are_kept_and_explained():
    division = partition(layers(*[1] * 12), 3, splits=["l2"])
    assert division.counts == (2, 5, 5)
    assert "stage 1: l2 to l6 (5 layers): time 5, 100% of the longest; begins where asked" in division.explain()
    assert "without the cuts that were asked for it would take 4" in division.explain()
    assert partition(layers(*[1] * 12), 3, splits=[2, "l3"]).counts == (2, 1, 9)


def test_the_explanation_says_what_sets_the_pace():
    assert "the stages are even" in partition(layers(*[1] * 8), 4).explain()
    assert "the layer 'l1' alone takes that long" in partition(layers(1, 9, 1), 3).explain()
    assert "no other cuts between layers make it shorter" in partition(layers(1, 1, 1), 2).explain()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"stages": 5}, "3 layers cannot fill stages=5: each needs one, so 3 at most"),
        ({"stages": 0}, "stages must be a positive integer, not 0"),
        ({"stages": 2, "splits": ["l9"]}, "there is no layer 'l9'; the first are l0 to l2"),
        ({"stages": 2, "splits": [0]}, "a stage cannot begin at layer 0"),
        ({"stages": 2, "splits": [3]}, "a stage cannot begin at layer 3"),
        ({"stages": 2, "splits": [1, 2]}, r"splits=\[1, 2\] make 3 stages, not stages=2"),
        ({"stages": 2, "memory": [1, 2, 3]}, "memory has 3 figures: give one, or 2 for stages=2"),
        ({"stages": 2, "held": -1}, "held=-1 must be zero or more"),
        ({"stages": 2, "memory": 7.0}, r"stage 0 \(l0 to l1\) needs 8 and has 7: use more stages"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_could(arguments, says):
    with pytest.raises(ValueError, match=says):
        partition(layers(1, 1, 1, memory=4.0), **arguments)


def test_costs_are_finite_numbers():
    with pytest.raises(ValueError, match=r"Layer.time=nan of layer 'a' must be a finite number"):
        Layer(name="a", time=float("nan"))


LLAMA = ModelConfig(
    family="llama",
    vocab_size=32_000,
    embed=4096,
    mlp=11_008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    layer_kinds=(LayerKind(),) * 32,
    max_positions=4096,
)
MIXED = dataclasses.replace(
    LLAMA,
    family="mixed",
    kv_heads=8,
    moe=MoE(experts=8, experts_per_token=2, mlp=2048),
    layer_kinds=(LayerKind(), LayerKind(sparse=True), LayerKind(window=512)) * 4,
)


@pytest.mark.parametrize("config", [LLAMA, MIXED], ids=lambda config: config.family)
def test_a_models_layers_hold_its_parameters(config):
    found = model_layers(config, seq_len=2048, parameter_bytes=1)
    assert [layer.name for layer in found] == ["embedding", *(f"block {i}" for i in range(config.layers)), "head"]
    # All but the norms' scales.
    assert sum(layer.memory for layer in found) == pytest.approx(parameters(config), rel=1e-4)


def test_a_models_layers_take_as_many_flops_as_they_have():
    """Forward: two for each weight and token, and 2 S D for each token in causal attention, over scores and values."""
    found = model_layers(LLAMA, seq_len=2048, rows=3)
    weights = parameters(LLAMA) - 32_000 * 4096
    expected = 3 * 2048 * (2 * weights + 32 * 2 * 2048 * 4096)
    assert sum(layer.time for layer in found) == pytest.approx(expected, rel=1e-4)


def test_blocks_of_different_kinds_count_for_what_they_cost():
    _, full, sparse, windowed, *_ = model_layers(MIXED, seq_len=2048)
    assert windowed.time < full.time
    assert windowed.memory == full.memory
    assert sparse.memory > full.memory  # eight experts, of which a token meets two
    assert sparse.time < full.time


def test_a_window_as_long_as_the_sequence_is_none():
    wide = dataclasses.replace(LLAMA, layer_kinds=(LayerKind(window=9999),) * 32)
    assert model_layers(wide, seq_len=2048) == model_layers(LLAMA, seq_len=2048)


def test_a_large_vocabulary_leaves_the_last_stage_fewer_blocks():
    """With 128 k tokens the head takes as long as two blocks and a half."""
    large = dataclasses.replace(LLAMA, vocab_size=128_256)
    division = partition(model_layers(large, seq_len=4096), 8)
    *others, last = division.stages
    assert sum(division.counts) == 34
    assert len(last) - 1 < min(len(stage) for stage in others)
    assert (
        division.longest
        < partition(
            model_layers(large, seq_len=4096), 8, splits=[f"block {4 * stage}" for stage in range(1, 8)]
        ).longest
    )


def test_a_deep_model_is_divided_at_once():
    """126 blocks over 32 stages, the shape of the largest Llama."""
    deep = dataclasses.replace(LLAMA, layer_kinds=(LayerKind(),) * 126)
    division = partition(model_layers(deep, seq_len=8192), 32)
    assert sum(division.counts) == 128
