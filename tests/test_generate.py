"""Greedy generation: the tokens that a forward pass over the whole would choose, whatever mesh, padding or cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax import LayerKind, ModelConfig
from tbjax.config import Rope
from tbjax.generate import decode, generate, prefill
from tbjax.layers.cache import make_cache
from tbjax.mesh import make_mesh
from tbjax.sharding import leaves
from tests.training.vocabulary import byte_tokenizer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=257,
    embed=32,
    mlp=64,
    heads=6,
    kv_heads=3,
    head_dim=16,
    layer_kinds=(LayerKind(), LayerKind(window=5), LayerKind(), LayerKind(window=5), LayerKind()),
    max_positions=128,
)
# As Hugging Face writes it, with a vocabulary for `byte_tokenizer`.
SMALL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "architectures": ["LlamaForCausalLM"],
}
PROMPTS = ([5, 9, 200, 31], [7], [250, 3, 3, 8, 100, 41, 12, 13, 14, 15, 16, 17])


def model(mesh, config=CONFIG):
    """Random weights large enough that the likeliest token is no near tie."""
    made = tbjax.from_config(config, mesh, seed=3)
    for leaf in leaves(made):
        if leaf.path.endswith("weight") and len(leaf.variable.shape) > 1:
            leaf.variable[...] = leaf.variable[...] * 12
    return made


def by_whole_sequences(made, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        positions = np.minimum(np.arange(32), len(tokens) - 1)[None]  # the padding makes the sequence no longer
        tokens.append(int(jnp.argmax(made(padded, positions=positions)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected():
    made = model((8, 1, 1))
    return [by_whole_sequences(made, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_each_row_is_what_it_would_be_alone(mesh, expected):
    made = model(mesh)
    assert generate(made, PROMPTS, max_new_tokens=12) == expected
    assert generate(made, PROMPTS[1:2], max_new_tokens=12) == expected[1:2]


def test_a_row_that_outgrows_the_trained_length_is_read_anew():
    short, long = (tuple(start + slope * i for i in range(8)) for start, slope in ((1, 0.1), (2, 0.7)))
    rope = Rope(kind="longrope", theta=100.0, original_positions=14, short_factors=short, long_factors=long)
    made = model((2, 2, 2), dataclasses.replace(CONFIG, rope=rope))
    expected = [by_whole_sequences(made, prompt, 12) for prompt in PROMPTS]
    assert generate(made, PROMPTS, max_new_tokens=12) == expected
    assert generate(made, PROMPTS[2:], max_new_tokens=12, eos_tokens=expected[2][5:6]) == [expected[2][:5]]


def test_an_end_token_ends_its_row_only(expected):
    made = model((2, 2, 2))
    eos = expected[0][4]
    rows = generate(made, PROMPTS, max_new_tokens=12, eos_tokens=[eos])
    for row, whole in zip(rows, expected, strict=True):
        assert row == (whole[: whole.index(eos)] if eos in whole else whole)


def test_new_lengths_within_a_bucket_compile_nothing():
    made = model((8, 1, 1))
    generate(made, [[1, 2, 3]], max_new_tokens=5)
    before = prefill._cache_size(), decode._cache_size()
    for length in (1, 4, 30):
        generate(made, [list(range(1, length + 1))], max_new_tokens=length)
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_a_cache_continues_where_it_was_left():
    made = tbjax.from_config(CONFIG, (2, 2, 2))
    tokens = np.random.default_rng(0).integers(0, 257, (4, 14)).astype(np.int32)
    mask = (np.arange(14)[None] >= np.array([0, 2, 5, 9])[:, None]).astype(np.int32)
    whole = made(tokens, mask)
    step = jax.jit(lambda m, t, k, c: m.forward(t, k, cache=c))
    first = step(made, tokens[:, :9], mask[:, :9], make_cache(CONFIG, made.sharding, 4, 16, jnp.float32))
    second = step(made, tokens[:, 9:], mask[:, 9:], first.cache)
    both = np.concatenate([first.logits, second.logits], axis=1)
    both, whole = both[mask.astype(bool)], np.asarray(whole)[mask.astype(bool)]
    assert np.linalg.norm(both - whole) <= 1e-5 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 2, 257], {}, "257"),
        ([1, -1], {}, "-1"),
        ([1, 2], {"max_new_tokens": -1}, "negative"),
        ([1] * 100, {"max_new_tokens": 29}, "128 positions"),
        ("text", {}, "tokenizer"),
        ([{"role": "user", "content": "text"}], {}, "tokenizer"),
        ([1, "two"], {}, "mixes kinds"),
        (np.zeros((1, 1, 1), np.int32), {}, r"\[1, 1, 1\]"),
        (np.zeros((1, 2)), {}, "float"),
    ],
)
def test_what_cannot_be_continued_says_why(prompt, options, words):
    with pytest.raises(ValueError, match=words):
        MODEL.generate(prompt, **options)


def test_nothing_asked_for_is_nothing_written():
    assert MODEL.generate([1, 2, 3], max_new_tokens=0) == []


def test_a_stop_string_that_never_comes_leaves_the_answer_its_budget(tmp_path):
    one = make_mesh((1, 1, 1), jax.devices()[:1])
    tbjax.from_config(SMALL, one, seed=3).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    made = tbjax.load(tmp_path, one, progress=False)
    options = {"max_new_tokens": 40, "eos_token_id": [], "return_dict_in_generate": True}
    whole = made.generate("so", **options)
    never = made.generate("so", stop_strings=["there is no such text"], **options)
    assert never == whole
    assert (never.end, len(never.tokens)) == ("length", 40)
    assert (
        "".join(made.generate("so", stop_strings="never", stream=True, max_new_tokens=40, eos_token_id=[]))
        == never.text
    )
    stop = whole.text[3:5]
    found = made.generate("so", stop_strings=stop, **options)
    assert (found.end, found.text) == ("stop", whole.text[: whole.text.index(stop)])


@pytest.mark.parametrize(("tokens", "words"), [([[1, 300]], "300"), ([[0.5]], "integers"), ([1, 2], "batch, sequence")])
def test_tokens_that_are_none_are_refused(tokens, words):
    with pytest.raises(ValueError, match=words):
        MODEL(tokens)


MODEL = tbjax.from_config(CONFIG, (8, 1, 1))
