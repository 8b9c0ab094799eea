"""Of layers that are run again in part, the program keeps just what its share says, and no copy of a weight."""

import jax
import jax.numpy as jnp
import pytest

from tbjax import LayerKind, ModelConfig, api, make_mesh
from tbjax.training.gradients import loss_of
from tbjax.training.state import Batch

LAYERS = 16
CONFIG = ModelConfig(
    family="llama",
    vocab_size=256,
    embed=64,
    mlp=256,
    heads=4,
    kv_heads=4,
    head_dim=16,
    layer_kinds=(LayerKind(),) * LAYERS,
    max_positions=512,
)


def kept(remat):
    """Bytes that go from the layers' forward passes to their backward passes."""
    model = api.abstract(CONFIG, make_mesh((1, 1, 1), jax.devices()[:1]))
    batch = Batch(*[jax.ShapeDtypeStruct((4, 64), jnp.int32)] * 2)
    gradient = jax.grad(lambda model, batch: loss_of(model, batch, 256, dtype=jnp.float32, remat=remat))
    equations = jax.make_jaxpr(gradient)(model, batch).jaxpr.eqns
    forward = next(equation for equation in equations if equation.primitive.name == "scan")
    outcomes = [variable.aval for variable in forward.outvars]
    turns = forward.params["jaxpr"].out_avals  # of one turn: what goes on to the next, and what is put on a stack
    stacks = [stack for stack, turn in zip(outcomes, turns, strict=True) if stack.ndim > turn.ndim]
    return sum(stack.size * stack.dtype.itemsize for stack in stacks)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_layers_keeps_its_share(share):
    nothing, everything = kept("full"), kept("none")
    assert nothing == LAYERS * 4 * 64 * CONFIG.embed * 4  # the inputs of the layers
    assert everything > 20 * nothing
    assert kept(f"full:{share}") == share * nothing + (1 - share) * everything
