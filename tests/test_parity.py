"""Our decoder computes what transformers computes: logits, gradients of every parameter, the routers' auxiliary loss.

Both err. The reference is transformers in float64; the error of a tensor is the norm of the difference over the norm of
the reference, and ours in float32 may be no larger than ALLOWANCE times transformers' own in float32. A wrong rope,
epsilon, scale or grouping errs by 1e-3 and more, a thousand times that; the last tests here break each to see it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tbjax.layers.attention
from tbjax.config import ModelConfig
from tbjax.layers.attention import HeadLayout
from tbjax.model import Decoder
from tests import by_table, tiny
from tests.tiny import Case

ALLOWANCE = 3.0

# Added to that, for what transformers gets right by luck (the auxiliary loss can come out exact). A result of n
# dependent roundings is off by about sqrt(n) half-units in the last place, and from a weight to the loss and back there
# are some sixty: four units. (The median error of transformers over all tensors here is seven.)
FLOOR = 4 * float(np.finfo(np.float32).eps)

# The routers' loss is added with this weight, so that the routers' gradients include it.
AUXILIARY_WEIGHT = 0.1

BFLOAT16_KL = 5e-3


class Run(NamedTuple):
    """What is compared, by transformers' names on disk."""

    logits: np.ndarray  # of the real tokens
    auxiliary_loss: np.ndarray | None
    gradients: Mapping[str, np.ndarray]


@functools.cache
def theirs(case: Case, dtype: torch.dtype) -> Run:
    """By transformers."""
    model = tiny.make(case, dtype)
    tokens, mask = map(torch.from_numpy, tiny.batch(case))
    model.zero_grad()
    options = {"output_router_logits": True} if tiny.our_config(case).moe else {}
    out = model(tokens, attention_mask=mask, use_cache=False, **options)
    counted = (mask[:, :-1] * mask[:, 1:]).bool()
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1][counted], tokens[:, 1:][counted])
    auxiliary = out.aux_loss if options else None
    (loss if auxiliary is None else loss + AUXILIARY_WEIGHT * auxiliary).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Run(
        out.logits[mask.bool()].detach().numpy(),
        None if auxiliary is None else auxiliary.detach().numpy(),
        {name: value.numpy() for name, value in tiny.hub_tensors(model, gradients).items()},
    )


def ours(case: Case, dtype: Any = jnp.float32) -> Run:
    """By us, in one compiled function."""
    config = tiny.our_config(case)
    tokens, mask = tiny.batch(case)

    def loss(model: Decoder) -> tuple[jax.Array, Any]:
        out = model.forward(tokens, mask)
        scores = jax.nn.log_softmax(out.logits[:, :-1].astype(jnp.float32))
        counted = mask[:, :-1] * mask[:, 1:]
        taken = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        auxiliary = 0.0 if out.auxiliary_loss is None else out.auxiliary_loss
        total = -jnp.sum(taken * counted) / jnp.sum(counted) + AUXILIARY_WEIGHT * auxiliary
        return total, (out.logits, out.auxiliary_loss)

    gradients, (logits, auxiliary) = jax.jit(jax.grad(loss, has_aux=True))(decoder(case, config, dtype))
    leaves = {path: np.asarray(leaf[...]) for path, leaf in by_table.paths(gradients).items()}
    return Run(
        np.asarray(logits)[mask.astype(bool)],
        None if auxiliary is None else np.asarray(auxiliary),
        by_table.write(config, leaves),
    )


def decoder(case: Case, config: ModelConfig, dtype: Any = jnp.float32) -> Decoder:
    """Our model with the case's weights."""
    return by_table.with_parameters(Decoder(config, dtype=dtype), by_table.read(config, tiny.tensors(case)))


def error(value: np.ndarray, reference: np.ndarray) -> float:
    """The relative error of one tensor."""
    assert value.shape == reference.shape
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(value - reference) / norm) if norm else float(np.linalg.norm(value))


def check(what: str, value: np.ndarray, rounded: np.ndarray, reference: np.ndarray) -> None:
    """`value` is as close to `reference` as one may ask of float32, to judge by `rounded`, transformers' own."""
    allowed = ALLOWANCE * error(rounded, reference) + FLOOR
    assert error(value, reference) <= allowed, (
        f"{what}: {error(value, reference):.2e} from transformers in float64, {allowed:.2e} allowed"
    )


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_logits_gradients_and_auxiliary_loss_are_those_of_transformers(case: Case) -> None:
    reference, rounded, result = theirs(case, torch.float64), theirs(case, torch.float32), ours(case)
    check("logits", result.logits, rounded.logits, reference.logits)
    assert result.gradients.keys() == reference.gradients.keys()
    for name, gradient in result.gradients.items():
        assert np.linalg.norm(reference.gradients[name]), f"{name} has no gradient: the case does not test it"
        check(f"gradient of {name}", gradient, rounded.gradients[name], reference.gradients[name])
    if reference.auxiliary_loss is not None:
        check("auxiliary loss", result.auxiliary_loss, rounded.auxiliary_loss, reference.auxiliary_loss)


@pytest.mark.parametrize("case", tiny.PLAIN, ids=str)
def test_bfloat16_gives_nearly_the_same_probabilities(case: Case) -> None:
    tokens, mask = tiny.batch(case)
    reference = torch.from_numpy(theirs(case, torch.float64).logits).log_softmax(-1)
    logits = jax.jit(lambda model: model(tokens, mask))(decoder(case, tiny.our_config(case), jnp.bfloat16))
    result = torch.from_numpy(np.asarray(logits[mask.astype(bool)], np.float64)).log_softmax(-1)
    divergence = (reference.exp() * (reference - result)).sum(-1).mean()
    assert divergence <= BFLOAT16_KL


# --- What these tests would notice ----------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch, ModelConfig], ModelConfig]


def break_rope(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> ModelConfig:
    """Neighbouring features are turned together, as in the first Llama's own code."""
    right = tbjax.layers.attention.rotate

    def interleaved(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
        half = cosines.shape[-1]
        order = np.arange(2 * half).reshape(half, 2).T.ravel()
        turned = right(x[..., order], cosines, sines)
        return jnp.concatenate((turned[..., np.argsort(order)], x[..., 2 * half :]), axis=-1)

    monkeypatch.setattr(tbjax.layers.attention, "rotate", interleaved)
    return config


def break_epsilon(_: pytest.MonkeyPatch, config: ModelConfig) -> ModelConfig:
    """One and a half times what it should be."""
    return dataclasses.replace(config, norm_epsilon=1.5 * config.norm_epsilon)


def break_scale(_: pytest.MonkeyPatch, config: ModelConfig) -> ModelConfig:
    """Two percent off."""
    return dataclasses.replace(config, query_scale=1.02 * (config.query_scale or config.head_dim**-0.5))


def break_grouping(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> ModelConfig:
    """Query heads are dealt out to key-value heads in turn, and not in groups."""
    right = HeadLayout.spread_queries

    def dealt(layout: HeadLayout, q: jax.Array) -> jax.Array:
        heads = np.arange(q.shape[2]).reshape(-1, layout.kv_heads).T.ravel()
        return right(layout, q[:, :, heads])

    monkeypatch.setattr(HeadLayout, "spread_queries", dealt)
    return config


@pytest.mark.parametrize("damage", [break_rope, break_epsilon, break_scale, break_grouping], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", tiny.PLAIN, ids=str)
def test_a_wrong_computation_is_noticed(case: Case, damage: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, rounded = theirs(case, torch.float64), theirs(case, torch.float32)
    model = decoder(case, damage(monkeypatch, tiny.our_config(case)))
    tokens, mask = tiny.batch(case)
    logits = np.asarray(jax.jit(lambda model: model(tokens, mask))(model))[mask.astype(bool)]
    with pytest.raises(AssertionError, match="from transformers in float64"):
        check("logits", logits, rounded.logits, reference.logits)
    # Not by a hair: far more than rounding could ever make.
    assert error(logits, reference.logits) > 100 * ALLOWANCE * error(rounded.logits, reference.logits)
