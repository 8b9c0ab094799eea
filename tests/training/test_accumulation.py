"""Microbatches: the same gradients, every token weighing the same, in the memory of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.training import IGNORED, Batch
from tbjax.training.gradients import gradients_of
from tests.training.cases import batch, born, distance, on

LAYERS = 4


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_every_token_weighs_the_same_whichever_microbatch_it_is_in(microbatches):
    loss, gradients, targets = computed(microbatches)
    wanted_loss, wanted, wanted_targets = computed(1)
    assert targets == wanted_targets
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert max(distance(gradients[path], wanted[path]) for path in wanted) <= 2e-6


@functools.cache
def computed(microbatches):
    """Of a batch whose rows have from none to all of their targets."""
    whole = batch("llama")
    targets = np.where(np.arange(16) < 2 * np.arange(8)[:, None], whole.targets, IGNORED)
    result = jax.jit(gradients(microbatches))(born("llama", on((1, 1, 1))), Batch(whole.tokens, targets))
    return jax.device_get(result)


def test_memory_is_that_of_one_microbatch():
    at_once = temp(rows=2, microbatches=1)
    few, many = temp(rows=4, microbatches=2), temp(rows=32, microbatches=16)
    # Beside a microbatch's activations there are the sums of gradients, and the batch itself, cut into microbatches.
    assert many - few <= 4 * 2 * (32 - 4) * SEQUENCE + 4096
    assert many <= at_once + GRADIENTS + 4 * 2 * 32 * SEQUENCE + 4096
    assert temp(rows=32, microbatches=1) > 4 * many


SEQUENCE = 256
GRADIENTS = 4 * sum(
    a.size for a in jax.tree.leaves(jax.eval_shape(lambda: born("llama", on((1, 1, 1)), layers=LAYERS)))
)


def temp(rows, microbatches):
    model = jax.eval_shape(lambda: born("llama", on((1, 1, 1)), layers=LAYERS))
    array = jax.ShapeDtypeStruct((rows, SEQUENCE), jnp.int32)
    program = jax.jit(gradients(microbatches, "none")).lower(model, Batch(array, array)).compile()
    return program.memory_analysis().temp_size_in_bytes


def gradients(microbatches, remat="full"):
    return functools.partial(gradients_of, dtype=jnp.float32, remat=remat, microbatches=microbatches, auxiliary=False)
