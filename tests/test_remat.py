"""Policies of rematerialisation: their text, which layers they are of, and that they keep what they say and no more."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.remat import DOTS, LONGEST_CYCLE, NAMES, Remat
from tbjax.training.step import gradients_of
from tests.training.cases import batch, born, distance, on

LAYERS = 4
names = st.lists(st.sampled_from([DOTS, *NAMES]), unique=True)


@given(st.booleans(), names, st.integers(0, 10), st.sampled_from([0.0, 0.125, 0.5, 1 / 3, 1.0]))
def test_what_is_printed_is_what_is_parsed(everything, kept, saved, ratio):
    saved, offloaded = (() if everything else part for part in (kept[:saved], kept[saved:]))
    # "dots" is written first.
    saved = sorted(saved, key=lambda name: name != DOTS)
    remat = Remat(everything=everything, saved=tuple(saved), offloaded=tuple(offloaded), ratio=round(ratio, 4))
    assert Remat.parse(str(remat)) == remat
    assert Remat.parse(remat) is remat


def test_the_words_of_old_are_policies():
    assert [Remat.parse(word).word for word in ("none", "dots", "full")] == ["none", "dots", "full"]
    assert Remat.parse("full") == Remat()
    assert Remat.parse("full:0.5").word is None
    assert str(Remat.parse("dots").offloading()) == "offload(dots,layer_input)"
    assert str(Remat.parse("full").offloading()) == "offload(layer_input)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", "remat='some' is unknown: tbjax knows 'none', 'dots', 'full', 'save"),
        ("save()", r"remat='save\(\)' is unknown"),
        ("save(router)", "nothing is called 'router'; what has a name is dots, layer_input"),
        ("full:half", "'half' is no number"),
        ("full:1.5", "lies between 0 and 1, not at 1.5"),
        ("save(up)+offload(up)", "up is to be saved and to be offloaded"),
        (0.5, "remat=0.5 is neither text nor a Remat"),
    ],
)
def test_what_is_no_policy_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Remat.parse(text)


def test_a_policy_that_keeps_everything_cannot_be_offloaded():
    with pytest.raises(ValueError, match="remat='none' keeps too much to name"):
        Remat.parse("none").offloading()


@given(st.integers(1, 130), st.integers(1, 6), st.sampled_from([0, 0.25, 0.5, 0.75, 1.0]))
def test_a_ratio_is_of_all_layers_or_refused(repeats, positions, ratio):
    remat, layers = Remat(ratio=ratio), repeats * positions
    lengths = [n * positions for n in range(1, repeats + 1) if repeats % n == 0 and n * positions <= LONGEST_CYCLE]
    possible = {count / length for length in lengths or [positions] for count in range(length + 1)}
    if min(abs(ratio - share) for share in possible) > max(1 / 16, 0.5 / layers) + 1e-9:
        with pytest.raises(ValueError, match=f"of {layers} layers no such share"):
            remat.cycle(repeats, positions)
        return
    cycle = remat.cycle(repeats, positions)
    assert len(cycle) % positions == 0
    assert layers % len(cycle) == 0
    assert len(cycle) <= max(LONGEST_CYCLE, positions)
    again = sum(not one.everything for one in cycle) / len(cycle)
    assert abs(again - ratio) <= max(1 / 16, 0.5 / layers) + 1e-9


def test_a_ratio_spreads_evenly():
    def cycle(text, repeats, positions):
        return "".join("-" if one.everything else "x" for one in Remat.parse(text).cycle(repeats, positions))

    assert cycle("full:0.5", 32, 1) == "-x"
    assert cycle("full:0.25", 32, 1) == "---x"
    assert cycle("full:0.75", 32, 1) == "-xxx"
    assert cycle("full:0.5", 23, 2) == "-x"  # layers in pairs, an odd number of them
    assert cycle("full", 31, 2) == "xx"
    assert cycle("full:0.75", 1, 6).count("x") in (4, 5)  # half a layer off, either way
    with pytest.raises(ValueError, match=r"of 31 layers no such share can be run again.*; 0, 1 can"):
        cycle("full:0.5", 31, 1)


POLICIES = [
    "full:0.5",
    "dots:0.25",
    "save(attention,mlp)",
    "save(query,key,value,attended,gate,up)",
    "dots+save(hidden)",
    "offload(dots)",
    "offload(layer_input)",
    "save(up)+offload(attention,layer_input)",
]


@pytest.mark.parametrize("remat", POLICIES)
def test_no_policy_changes_a_gradient(remat):
    loss, gradients = computed(remat)
    wanted_loss, wanted = computed("none")
    assert abs(loss - wanted_loss) <= 1e-6 * wanted_loss
    assert max(distance(gradients[path], wanted[path]) for path in wanted) <= 1e-5


@functools.cache
def computed(remat):
    loss, gradients, _ = program(remat, 4, 16, LAYERS)(born("llama", on((1, 1, 1)), layers=LAYERS), batch("llama"))
    return float(loss), jax.device_get(gradients)


def test_more_is_kept_the_more_a_policy_names():
    order = ["full", "save(gate)", "full:0.5", "none"]
    kept = {remat: temp(remat) for remat in order}
    assert sorted(kept, key=kept.get) == order


@functools.cache
def temp(remat):
    """Bytes of temporaries of a deep, narrow model with a long batch: activations above all."""
    model = jax.eval_shape(lambda: born("llama", on((1, 1, 1)), layers=16))
    made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.int32), batch("llama", 8, 256))
    return program(remat, 8, 256, 16).lower(model, made).compile().memory_analysis().temp_size_in_bytes


def program(remat, rows, sequence, layers):
    return jax.jit(lambda model, batch: gradients_of(model, batch, dtype=jnp.float32, remat=remat, microbatches=1))
