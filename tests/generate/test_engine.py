"""The engine: what is written does not depend on how it is read, dealt out, cut up or kept."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import tbjax
from tbjax import LayerKind, ModelConfig, room
from tbjax.generate import Settings, decode, generate, layers, prefill, write
from tbjax.layers.ring import slots_at
from tbjax.mesh import make_mesh
from tbjax.sharding import leaves

CONFIG = ModelConfig(
    family="llama",
    vocab_size=257,
    embed=32,
    mlp=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    layer_kinds=(LayerKind(window=6), LayerKind()) * 2,
    max_positions=160,
)
PROMPTS = ([5, 9, 200, 31], [7], [250, 3, 3, 8, 100, 41, 12, 13, 14, 15, 16, 17])
SAMPLED = Settings(max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.95, repetition_penalty=1.2)


def one_device():
    return make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that the likeliest token is no near tie."""
    made = tbjax.from_config(CONFIG, one_device(), seed=3)
    for leaf in leaves(made):
        if leaf.path.endswith("weight") and len(leaf.variable.shape) > 1:
            leaf.variable[...] = leaf.variable[...] * 12
    return made


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=20)


def written(model, prompts, settings, **options):
    *_, answers = write(model, prompts, settings, **options)
    return [answer.tokens for answer in answers]


def test_samples_are_a_rows_own(model):
    together = written(model, PROMPTS, SAMPLED, seeds=[4, 5, 6])
    assert written(model, PROMPTS[1:2], SAMPLED, seeds=[5]) == together[1:2]
    assert written(model, PROMPTS[::-1], SAMPLED, seeds=[6, 5, 4]) == together[::-1]
    assert written(model, PROMPTS, SAMPLED, seeds=[4, 5, 6], stream=True) == together  # in many dispatches
    assert written(model, PROMPTS[:1], SAMPLED, seeds=[7]) != together[:1]
    several = dataclasses.replace(SAMPLED, num_return_sequences=3)
    samples = written(model, PROMPTS[:2], several, seeds=[4, 5])
    assert [samples[0], samples[3]] == together[:2]
    assert len({tuple(tokens) for tokens in samples}) == 6


def test_blocks_of_a_dispatch_make_no_difference_and_an_end_ends_its_row_only(model, greedy):
    assert written(model, PROMPTS, Settings(max_new_tokens=20), stream=True) == greedy
    eos = greedy[2][10]
    answers = written(model, PROMPTS, Settings(max_new_tokens=20, eos_token_id=(eos,)), stream=True)
    assert answers == [row[: row.index(eos)] if eos in row else row for row in greedy]


def test_nothing_compiles_for_new_lengths_batches_budgets_and_numbers(model):
    written(model, [PROMPTS[0]] * 4, SAMPLED)
    before = prefill._cache_size(), decode._cache_size()
    for settings in (SAMPLED, dataclasses.replace(SAMPLED, temperature=1.4, top_k=7, max_new_tokens=31)):
        for length in (1, 17, 32):
            written(model, [list(range(1, length + 1))] * 4, settings)
    written(model, [[1], [2, 3], [4], list(range(30))], SAMPLED)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_long_prompts_in_chunks(model, monkeypatch):
    prompts = [np.random.default_rng(n).integers(0, 257, length).tolist() for n, length in enumerate((70, 3, 100))]
    whole = generate(model, prompts, max_new_tokens=12)
    monkeypatch.setattr(room, "SMALLEST_CHUNK", 16)
    monkeypatch.setattr(room, "LONGEST_LOOSE_RING", 16)
    monkeypatch.setattr(room, "TOKENS_AT_ONCE", 16)
    prefill.clear_cache()
    assert generate(model, prompts, max_new_tokens=12) == whole
    assert generate(model, prompts[1:2], max_new_tokens=12) == whole[1:2]
    # And where devices share out the tokens of a cache.
    cut = model.moved(make_mesh({"cp": 2, "tp": 4}, jax.devices()))
    assert generate(cut, prompts, max_new_tokens=12) == whole
    prefill.clear_cache()


def test_layers_in_arrays_of_their_own_are_views_and_write_the_same(model, greedy, monkeypatch):
    assert layers.singles(model) is None  # copies of such small layers take no time
    monkeypatch.setattr(layers, "NOTABLE_BYTES", 0)
    groups = layers.singles(model).blocks()
    assert [len(group) for group in groups] == [group.repeats for group in CONFIG.groups]
    stack = model.stacks[0][0].mlp.up.weight[...]
    first = stack.addressable_shards[0].data.unsafe_buffer_pointer()
    for row, blocks in enumerate(groups[0]):
        own = blocks[0].mlp.up.weight[...]
        assert own.unsafe_buffer_pointer() == first + row * own.nbytes
        np.testing.assert_array_equal(own, stack[row])
    assert generate(model, PROMPTS, max_new_tokens=20) == greedy
    sharded = model.moved((2, 2, 2))
    assert {a.sharding.is_fully_replicated for a in jax.tree.leaves(layers.singles(sharded))} == {True, False}
    assert generate(sharded, PROMPTS, max_new_tokens=20) == greedy


@pytest.mark.parametrize(
    "mesh", [{"cp": 2, "tp": 2}, pytest.param({"pp": 2, "tp": 4}, marks=pytest.mark.slow)], ids=str
)
def test_other_meshes_write_and_draw_the_same(model, greedy, mesh):
    count = int(np.prod([*mesh.values()]))
    cut = model.moved(make_mesh(mesh, jax.devices()[:count]))
    assert generate(cut, PROMPTS, max_new_tokens=20) == greedy
    alike = written(model, PROMPTS, SAMPLED, seeds=[4, 5, 6])
    assert written(cut, PROMPTS, SAMPLED, seeds=[4, 5, 6], stream=True) == alike


def test_a_ring_keeps_the_last_slots():
    for length in range(1, 12):
        places = np.asarray(slots_at(np.int32(length), 4))
        there = {int(slot) for slot in places if slot >= 0}
        assert there == set(range(max(0, length - 4), length))
        assert all(slot % 4 == place for place, slot in enumerate(places) if slot >= 0)


def test_likelihoods_are_those_of_the_forward_pass(model):
    completions = [[3, 1, 4], [1], [5, 9]]
    found = model.loglikelihood([list(prompt) for prompt in PROMPTS], completions)
    for prompt, completion, likelihood in zip(PROMPTS, completions, found, strict=True):
        logits = np.asarray(model(np.array([[*prompt, *completion]], np.int32)), np.float64)[0, len(prompt) - 1 : -1]
        wanted = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(completion)), completion]
        np.testing.assert_allclose(likelihood.log_probabilities, wanted, rtol=1e-4, atol=1e-4)
        assert likelihood.log_probability == pytest.approx(wanted.sum(), rel=1e-4)
        assert likelihood.is_greedy == (logits.argmax(-1) == completion).all()
    # What is written has the log-probabilities that it is scored with.
    answer = model.generate(PROMPTS[0], max_new_tokens=5, return_dict_in_generate=True)
    scored = model.loglikelihood(PROMPTS[0], answer.tokens)
    assert (answer.text, answer.end, scored.is_greedy) == (None, "length", True)
    np.testing.assert_allclose(answer.log_probabilities, scored.log_probabilities, rtol=1e-4, atol=1e-4)


def test_pieces_come_in_the_form_of_the_prompt(model, greedy):
    pieces = list(model.generate(PROMPTS[0], max_new_tokens=20, stream=True))
    assert len(pieces) > 2
    assert list(itertools.chain(*pieces)) == greedy[0]
    rows = list(model.generate([list(prompt) for prompt in PROMPTS], max_new_tokens=20, stream=True))
    assert [list(itertools.chain(*(piece[row] for piece in rows))) for row in range(3)] == greedy


def test_what_a_user_may_say(model, greedy):
    sampled = {"max_new_tokens": 8, "do_sample": True}
    ids = [list(prompt) for prompt in PROMPTS[:2]]
    several = model.generate(ids, seed=7, num_return_sequences=2, **sampled)
    assert len(several) == 4
    assert model.generate(ids[1], seed=8, **sampled) == several[2]
    assert model.generate(ids[0], seed=7, num_return_sequences=2, **sampled) == several[:2]
    assert model.generate(ids, seed=[7, 8], **sampled) == [several[0], several[2]]
    assert model.generate(ids[0], {"max_new_tokens": 3}) == greedy[0][:3]
    assert model.generate(ids[0], {"max_new_tokens": 3}, max_new_tokens=4) == greedy[0][:4]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([1] * 161, {}, "161 tokens, more than the 160 positions"),
        ([1] * 161, {"stream": True}, "161 tokens, more than the 160 positions"),  # not only when it is iterated
        ([1] * 100, {"max_new_tokens": 61}, "together more than the 160 positions"),
        ([1, 2], {"eos_token_id": [-3]}, "eos_token_id -3"),
        ([1, 2], {"stop_strings": "a"}, "tokenizer"),
        ([1, 2], {"do_sample": True, "seed": "x"}, "seed='x' must be an integer"),
        ([1, 2], {"do_sample": True, "seed": [1, 2]}, "2 seeds and 1 prompts"),
        ([1, 2], {"stream": True, "return_dict_in_generate": True}, "give one"),
        ([1, 2], {"num_beams": 2}, "num_beams=2"),
        ([1, 2], {"fields": 2}, "fields=2: there is no such setting"),
    ],
)
def test_what_cannot_be_done_says_why(model, prompt, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(prompt, **options)


@pytest.mark.parametrize(
    ("prompts", "completions", "words"),
    [
        ([[1]], [[1], [2]], "1 prompts and 2 completions"),
        ([[]], [[1]], "prompt 0 is empty"),
        ([[1]], [[300]], "300"),
        ([[1] * 100], [[2] * 61], "160 positions"),
    ],
)
def test_what_cannot_be_scored_says_why(model, prompts, completions, words):
    with pytest.raises(ValueError, match=words):
        model.loglikelihood(prompts, completions)
