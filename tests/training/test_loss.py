"""The loss is the textbook's, in value and gradients, however it is cut, capped or padded; and it holds no logits."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding
from tbjax.training import IGNORED, cross_entropy
from tbjax.training import loss as loss_module
from tbjax.training.loss import chunk_tokens
from tests import tiny

ROWS, SEQUENCE = 8, 12
# Untied; tied with a cap; a vocabulary that the table pads.
NAMES = ("llama", "gemma2", "llama-odd-vocabulary")


def made(name, spec=(1, 1, 1)):
    sharding = Sharding(make_mesh(spec, jax.devices()[: math.prod(spec)]))
    config = tiny.our_config(tiny.BY_NAME[name])
    if config.logits_softcap is not None:
        config = dataclasses.replace(config, logits_softcap=0.5)  # of the scores' size, so that it bends them
    make = lambda: Decoder(config, sharding, key=jax.random.key(2))  # noqa: E731
    placed = sharding.place(jax.eval_shape(make))
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))()


def operands(model):
    random = np.random.default_rng(3)
    states = random.normal(size=(ROWS, SEQUENCE, model.config.embed)).astype(np.float32)
    targets = random.integers(0, model.config.vocab_size, (ROWS, SEQUENCE)).astype(np.int32)
    targets[1, 4:9] = IGNORED
    targets[6] = -1  # any negative number is none
    return states, targets


def textbook(model, states, targets, z_loss=0.0):
    logits = model.logits(states)
    scores = jax.nn.log_softmax(logits, axis=-1)
    taken = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(jnp.where(targets >= 0, z_loss * squares - taken, 0))


def evaluated(loss, model, states, targets):
    value, (of_model, of_states) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(model, states, targets)
    table = of_model.embedding if model.head is None else of_model.head
    return value, of_states, table.weight[...]


@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids=["", "z-loss"])
@pytest.mark.parametrize("spec", [(1, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_the_textbooks(name, spec, z_loss, monkeypatch):
    one = made(name)
    wanted = evaluated(partial(textbook, z_loss=z_loss), one, *operands(one))
    # Small enough for several chunks on every mesh, of a length that the tokens are no multiple of.
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 5 * one.config.padded_vocab // spec[2])
    model = made(name, spec)
    ours = evaluated(partial(cross_entropy, z_loss=z_loss), model, *operands(model))
    for a, b in zip(ours, wanted, strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(np.asarray(b))


def test_without_gradients_the_value_is_the_same():
    model = made("llama", (2, 2, 2))
    np.testing.assert_allclose(
        cross_entropy(model, *operands(model)), textbook(made("llama"), *operands(model)), rtol=1e-5
    )


def test_a_z_loss_is_a_matter_of_degree():
    model = made("llama", (1, 1, 8))
    plain, small, large = (cross_entropy(model, *operands(model), z_loss=z) for z in (0.0, 1e-4, 2e-4))
    assert small > plain
    np.testing.assert_allclose(large - plain, 2 * (small - plain), rtol=1e-2)
    with pytest.raises(ValueError, match=r"z_loss=-0\.1 rewards what it is to prevent"):
        cross_entropy(model, *operands(model), z_loss=-0.1)


def test_a_table_that_is_held_constant_has_no_gradient_made_for_it():
    model = jax.eval_shape(lambda: made("llama"))
    states, targets = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(model))

    def matmuls(argnums):
        program = jax.jit(jax.grad(cross_entropy, argnums=argnums)).lower(model, states, targets).as_text()
        return program.count("stablehlo.dot_general")

    assert matmuls((0, 1)) == 3  # logits and both gradients
    assert matmuls((1,)) == 2


def test_targets_that_are_all_ignored_have_no_loss_and_no_gradient():
    model = made("llama")
    states, targets = operands(model)
    value, *gradients = evaluated(cross_entropy, model, states, np.full_like(targets, IGNORED))
    assert value == 0
    assert all(not np.any(np.asarray(gradient)) for gradient in gradients)


def test_bfloat16_states_sum_the_tables_gradient_in_float32(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)  # one token a chunk: as many additions as there are
    model = made("llama")
    states, targets = operands(model)
    *_, fine = evaluated(textbook, model, states, targets)
    *_, ours = evaluated(cross_entropy, model, states.astype(jnp.bfloat16), targets)
    assert ours.dtype == jnp.float32
    # One rounding of each factor and one of the sum: not one of each of the 86 additions.
    assert np.linalg.norm(ours - fine) <= 3 * 2**-8 * np.linalg.norm(fine)


def test_the_logits_never_stand_as_a_whole():
    vocabulary, tokens, embed = 128_000, 8192, 64
    config = dataclasses.replace(tiny.our_config(tiny.BY_NAME["llama"]), vocab_size=vocabulary, embed=embed)
    model = jax.eval_shape(lambda: Decoder(config))
    states = jax.ShapeDtypeStruct((1, tokens, embed), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    gradient = jax.jit(jax.grad(cross_entropy, argnums=(0, 1)))
    memory = gradient.lower(model, states, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * tokens * vocabulary / 4


def test_chunks_are_even_and_within_the_budget():
    assert chunk_tokens(4096, 1024) == 4096
    size = chunk_tokens(32_768, 16_000)
    assert 4 * size * 16_000 <= loss_module.CHUNK_BYTES
    assert 32_768 / size > 15  # not far below it either
    assert chunk_tokens(7, 1 << 40) == 1
