"""What is promised of every family beyond its logits: generation, and gradients over pipelines and context parallelism.

Each is held against what the same model gives in the plainest way. Weights are those of `tests.tiny`, which move every
logit by much when something is wrong; that the plain way is transformers' is `tests/test_parity.py`'s to show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax.mesh import make_mesh
from tbjax.sharding import by_path
from tbjax.training import IGNORED, Batch
from tbjax.training.gradients import gradients_of
from tests import tiny

# Longer than any window of the cases.
PROMPTS = ([5, 9, 20, 31, 40, 7, 8, 3, 11, 50], [7])
NEW = 6

# As many repetitions of each family's pattern of layers as two stages need.
LAYERS = {"gemma2": 4, "gemma3": 12}

FAMILIES = [
    pytest.param(
        dataclasses.replace(case, fields={**case.fields, "num_hidden_layers": LAYERS.get(case.name, 2)}),
        marks=() if case.name == "gemma2" else pytest.mark.slow,
        id=case.name,
    )
    for case in tiny.PLAIN
]


@functools.cache
def loaded(case, folder):
    """The case's model on one device."""
    tiny.save(case, folder)
    return tbjax.load(folder, make_mesh({"dp": 1}, jax.devices()[:1]), dtype="float32", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("case", FAMILIES)
def test_generation_writes_what_whole_sequences_do(case, folder):
    model = loaded(case, folder / case.name)
    spread = model.moved((2, 2, 2))
    wanted = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(model(padded)[0, len(tokens) - 1])))
        wanted.append(tokens[len(prompt) :])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    assert spread.generate([list(prompt) for prompt in PROMPTS], **options) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"pp": 2, "fsdp": 2, "tp": 2}, {"cp": 2, "fsdp": 2, "tp": 2}], ids=["pp", "cp"])
@pytest.mark.parametrize("case", FAMILIES)
def test_gradients_over_stages_and_over_parts_of_a_sequence_are_those_of_one_device(case, mesh, folder):
    model = loaded(case, folder / case.name)
    tokens = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (4, 17)).astype(np.int32)
    targets = np.where(np.arange(16) < 14, tokens[:, 1:], IGNORED)

    @functools.partial(jax.jit, static_argnames="microbatches")
    def gradients(model, microbatches):
        # The routers' loss balances each microbatch by itself, so it is left out.
        batch = Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(targets))
        return gradients_of(model, batch, dtype=jnp.float32, remat="full", microbatches=microbatches, auxiliary=False)[
            :2
        ]

    wanted_loss, wanted = gradients(model, 1)
    spread = model.moved(mesh)
    loss, found = gradients(spread, 2 if "pp" in mesh else 1)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert set(found) == set(wanted) == set(by_path(model))
    for path, gradient in found.items():
        reference = np.asarray(wanted[path], np.float64)
        error = np.linalg.norm(np.asarray(gradient, np.float64) - reference) / np.linalg.norm(reference)
        assert error <= 1e-5, path
