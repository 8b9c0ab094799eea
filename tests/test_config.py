"""ModelConfig: the layers of any pattern are grouped into few scans, and no layer is lost."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.config import LayerKind, ModelConfig, MoE, Rope

FULL, WINDOW, SPARSE = LayerKind(), LayerKind(window=8), LayerKind(sparse=True)
BASE = ModelConfig(
    family="llama",
    vocab_size=100,
    embed=8,
    mlp=8,
    heads=4,
    kv_heads=2,
    head_dim=4,
    layer_kinds=(FULL,),
    max_positions=8,
)


def grouped(*kinds: LayerKind) -> list[tuple[int, int]]:
    """(length of the pattern, repeats) of each group."""
    groups = dataclasses.replace(BASE, layer_kinds=kinds, moe=MoE(experts=2, experts_per_token=1, mlp=8)).groups
    return [(len(group.pattern), group.repeats) for group in groups]


def test_equal_layers_are_one_group():
    assert grouped(*[FULL] * 32) == [(1, 32)]


def test_alternating_layers_are_one_group_of_pairs():
    assert grouped(*[WINDOW, FULL] * 13) == [(2, 13)]


def test_a_remainder_is_a_group_of_its_own():
    assert grouped(*([WINDOW] * 5 + [FULL]) * 4, WINDOW, WINDOW) == [(6, 4), (1, 2)]


def test_layers_without_a_pattern_are_runs():
    assert grouped(*[FULL] * 20, *[WINDOW] * 12) == [(1, 20), (1, 12)]


@given(st.lists(st.sampled_from([FULL, WINDOW, SPARSE]), min_size=1, max_size=40))
def test_every_layer_has_one_place_of_its_kind(kinds):
    config = dataclasses.replace(BASE, layer_kinds=tuple(kinds), moe=MoE(experts=2, experts_per_token=1, mlp=8))
    places = [config.place(layer) for layer in range(len(kinds))]
    assert len(set(places)) == len(kinds) == sum(len(g.pattern) * g.repeats for g in config.groups)
    for kind, (group, position, index) in zip(kinds, places, strict=True):
        assert config.groups[group].pattern[position] == kind
        assert index < config.groups[group].repeats
    with pytest.raises(IndexError):
        config.place(len(kinds))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed": 0}, "embed"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"heads": 5}, "kv_heads"),
        ({"layer_kinds": ()}, "layer_kinds"),
        ({"layer_kinds": (SPARSE,)}, "moe"),
        ({"norm": "layernorm"}, "norm='layernorm'.*'rms', 'layer'"),
        ({"norm_placement": "sandwich"}, "norm_placement"),
        ({"block": "par"}, "block"),
        ({"activation": "relu"}, "activation"),
        ({"qk_norm": "heads"}, "qk_norm"),
        ({"layer_kinds": (FULL, LayerKind(window=0))}, r"layer_kinds\[1\].window"),
        ({"head_dim": 3}, "head_dim=3"),
    ],
)
def test_an_impossible_architecture_names_the_field(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoE(experts=2, experts_per_token=3, mlp=8), "experts_per_token=3"),
        (lambda: MoE(experts=2, experts_per_token=0, mlp=8), "experts_per_token"),
        (lambda: Rope(kind="ntk"), "kind='ntk'"),
        (lambda: Rope(kind="yarn"), "original_positions"),
        (lambda: Rope(kind="longrope", original_positions=8, short_factors=(1.0,)), "1 and 0"),
    ],
)
def test_an_impossible_part_names_the_field(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_vocabularies_are_padded_to_what_every_usual_degree_divides():
    assert dataclasses.replace(BASE, vocab_size=257).padded_vocab == 384
    assert dataclasses.replace(BASE, vocab_size=32000).padded_vocab == 32000
