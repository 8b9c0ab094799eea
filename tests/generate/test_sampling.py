"""Sampling: the distribution is transformers', and a row's draws are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from tbjax.generate.sampling import Rows, choose, keys, likely
from tbjax.layers.linear import as_sharding
from tbjax.mesh import make_mesh
from tbjax.sharding import Sharding

VOCABULARY = 24
NO_END = np.asarray([-1], np.int32)
SCORES = np.random.default_rng(0).normal(0, 2.5, (4, VOCABULARY)).astype(np.float32)
ONE = as_sharding(None)

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 200},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.03},
]


def theirs(rules, scores, prompts=None):
    """What transformers makes of the scores, in its order."""
    makers = {
        "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    found = torch.from_numpy(np.array(scores))
    ids = torch.from_numpy(np.zeros((len(scores), 1), np.int64) if prompts is None else prompts)
    for name, make in makers.items():
        if name in rules:
            found = make(rules[name])(ids, found)
    return found.numpy()


def numbers(rules):
    return {name: jnp.float32(value) for name, value in rules.items()}


def rows(count, seeds=None, **more):
    zeros = np.zeros(count, np.int32)
    drawn = None if seeds is None else keys([(seed, 0) for seed in seeds])
    return Rows(**{"written": zeros, "least": zeros, "keys": drawn} | more)


@pytest.mark.parametrize("rules", CASES, ids=str)
def test_what_may_be_drawn_and_how_likely_is_as_in_transformers(rules):
    ours, wanted = np.asarray(likely(numbers(rules), SCORES)), theirs(rules, SCORES)
    assert ((ours == -np.inf) == (wanted == -np.inf)).all()
    kept = wanted != -np.inf
    np.testing.assert_allclose(ours[kept], wanted[kept], rtol=1e-6)


def test_draws_are_distributed_as_transformers_would_draw_them():
    rules, draws = {"temperature": 0.9, "top_k": 9, "top_p": 0.95}, 20_000
    scores = np.repeat(SCORES[:1], draws, axis=0)
    chosen, _ = jax.jit(lambda s, r: choose(numbers(rules), s, r, NO_END, ONE))(scores, rows(draws, range(draws)))
    counts = np.bincount(np.asarray(chosen.token), minlength=VOCABULARY)
    expected = draws * torch.softmax(torch.from_numpy(theirs(rules, SCORES[:1])), -1).numpy()[0]
    possible = expected > 0
    assert counts[~possible].sum() == 0
    # Pearson's chi-square; over 99.99 % of draws from the very same distribution lie below the bound (Wilson-Hilferty).
    degrees = possible.sum() - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * np.sqrt(2 / (9 * degrees))) ** 3
    assert np.sum((counts - expected)[possible] ** 2 / expected[possible]) < bound
    # And the test can tell: another temperature is far outside.
    other = draws * torch.softmax(torch.from_numpy(theirs(rules | {"temperature": 1.0}, SCORES[:1])), -1).numpy()[0]
    assert np.sum((counts - other)[other > 0] ** 2 / other[other > 0]) > 2 * bound


def test_a_rows_draws_do_not_depend_on_the_others_nor_on_the_mesh():
    rules, seeds = numbers({"temperature": 1.0, "top_p": 0.9}), [5, 6, 7, 8]
    together, after = choose(rules, SCORES, rows(4, seeds), NO_END, ONE)
    for row, seed in enumerate(seeds):
        alone, _ = choose(rules, SCORES[row : row + 1], rows(1, [seed]), NO_END, ONE)
        assert alone.token[0] == together.token[row]
    mesh = Sharding(make_mesh((2, 2, 2)))
    cut, _ = jax.jit(lambda s, r: choose(rules, s, r, NO_END, mesh))(SCORES, rows(4, seeds))
    assert cut.token.tolist() == together.token.tolist()
    # The next token's noise is another.
    draws = [choose(rules, SCORES, after._replace(written=np.full(4, n)), NO_END, ONE)[0].token for n in range(1, 9)]
    assert len({tuple(np.asarray(drawn).tolist()) for drawn in draws}) > 1


def test_repetition_is_punished_as_in_transformers_and_what_was_chosen_counts_from_then_on():
    prompts = np.array([[1, 2, 2], [3, 4, 5], [0, 0, 0], [7, 8, 9]])
    seen = np.zeros((4, VOCABULARY), bool)
    np.put_along_axis(seen, prompts, True, axis=1)
    rules = {"repetition_penalty": 1.7}
    state = rows(4, seen=seen)
    for _ in range(6):
        chosen, state = choose(numbers(rules), SCORES, state, NO_END, ONE)
        assert chosen.token.tolist() == theirs(rules, SCORES, prompts).argmax(-1).tolist()
        prompts = np.concatenate((prompts, np.asarray(chosen.token)[:, None]), axis=1)


def test_there_is_no_end_token_before_its_time():
    best = int(SCORES[0].argmax())
    early = rows(4)._replace(least=np.full(4, 2))
    tokens = []
    for _ in range(3):
        chosen, early = choose({}, SCORES, early, np.asarray([best], np.int32), ONE)
        tokens.append(int(chosen.token[0]))
    assert tokens[0] == tokens[1] == int(np.argsort(SCORES[0])[-2])
    assert tokens[2] == best


def test_log_probabilities_are_the_models_own():
    rules = numbers({"temperature": 0.3, "top_k": 3})
    chosen, _ = choose(rules, SCORES, rows(4, [1, 2, 3, 4]), NO_END, ONE, log_probabilities=True)
    wanted = torch.log_softmax(torch.from_numpy(SCORES), -1).numpy()
    np.testing.assert_allclose(chosen.log_probability, wanted[np.arange(4), np.asarray(chosen.token)], rtol=1e-5)


def test_equal_scores_stay_together():
    flat = np.zeros((1, VOCABULARY), np.float32)
    flat[0, 3] = 1
    assert np.isfinite(likely(numbers({"temperature": 1.0, "top_k": 2}), flat)).all()
    assert np.isfinite(likely(numbers({"temperature": 1.0, "top_p": 0.5}), flat)).all()
