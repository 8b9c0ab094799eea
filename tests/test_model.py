"""What a decoder takes: tokens of any integer type, masks and positions of the tokens' shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax import LayerKind, ModelConfig, MoE

CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=100,
    embed=32,
    mlp=64,
    heads=4,
    kv_heads=2,
    head_dim=8,
    layer_kinds=(LayerKind(sparse=True),) * 2,
    max_positions=64,
    moe=MoE(experts=4, experts_per_token=2, mlp=32),
)
TOKENS = np.random.default_rng(0).integers(0, 100, (8, 6))


@pytest.fixture(scope="module")
def model():
    return tbjax.from_config(CONFIG, (2, 2, 2))


@pytest.mark.parametrize("dtype", ["uint16", "uint8", "int16", "int64", "uint32"])
def test_tokens_may_be_of_any_integer_type(dtype, model):
    assert (model(TOKENS.astype(dtype)) == model(TOKENS)).all()


def test_tokens_may_be_a_list(model):
    assert (model(TOKENS.tolist()) == model(TOKENS)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positions": np.arange(6)}, r"positions has shape \[6\], tokens \[8, 6\]"),
        ({"positions": np.zeros((8, 1), int)}, r"positions has shape \[8, 1\]"),
        ({"attention_mask": np.ones((8, 5), int)}, r"attention_mask has shape \[8, 5\]"),
        ({"attention_mask": np.zeros((8, 6), np.float32)}, "attention_mask is float32.*not added"),
    ],
)
def test_what_does_not_belong_to_the_tokens_is_refused(options, words, model):
    with pytest.raises(ValueError, match=words):
        model(TOKENS, **options)


@pytest.mark.parametrize("tokens", [np.zeros((2, 3), np.float32), np.zeros(3, int)])
def test_what_is_no_batch_of_tokens_is_refused(tokens, model):
    with pytest.raises(ValueError, match="tokens must be integers"):
        model(tokens)


def test_a_mesh_of_the_users_own_needs_only_the_axes_it_uses(model):
    theirs = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    logits = tbjax.from_config(CONFIG, theirs)(TOKENS)
    assert jnp.abs(logits - model(TOKENS)).max() < 1e-5
