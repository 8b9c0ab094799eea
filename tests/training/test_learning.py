"""Models learn real text: as PyTorch's loop learns it, and the same on every mesh."""

import jax
import numpy as np
import pytest

from benchmarks.checkpoints import SMOLLM2
from benchmarks.trainers import SETTINGS, corpus_rows, settings, torch_training
from tbjax.api import from_config, load
from tbjax.config import LayerKind, ModelConfig
from tbjax.mesh import make_mesh
from tbjax.training import Batch
from tbjax.training.config import TrainConfig
from tbjax.training.data import python_topics
from tbjax.training.loop import train

# Reads and writes bytes.
SPELLER = ModelConfig(
    family="llama",
    vocab_size=256,
    embed=64,
    mlp=128,
    heads=8,
    kv_heads=8,
    head_dim=16,
    layer_kinds=(LayerKind(),) * 2,
    max_positions=128,
)
ROWS, SEQUENCE, STEPS = 16, 64, 60
ONE, TWO = {"dp": 1}, {"fsdp": 2}
MESHES = [{"fsdp": 8}, {"tp": 8}, {"pp": 2, "fsdp": 2, "tp": 2}, {"cp": 4}]


@pytest.fixture(scope="module")
def alone():
    return spelled(ONE)


def spelled(mesh):
    """The losses of a small model that learns to spell, on `mesh`."""
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    model = from_config(SPELLER, make_mesh(mesh, devices), dtype="float32")
    text = np.frombuffer("".join(python_topics()).encode(), np.uint8).astype(np.int32)
    starts = np.random.default_rng(0).integers(0, text.size - SEQUENCE - 1, (STEPS, ROWS))
    rows = (text[step[:, None] + np.arange(SEQUENCE + 1)] for step in starts)
    config = TrainConfig(
        steps=STEPS,
        learning_rate=1e-2,
        warmup=5,
        precision="float32",
        microbatches=2 if "pp" in mesh else 1,
    )
    return train(model, (Batch(each[:, :-1], each[:, 1:]) for each in rows), config).losses


def test_a_small_model_learns_to_spell(alone):
    # A byte drawn evenly costs log(256) = 5.5; one drawn by how often it occurs in this text 3.26.
    assert np.mean(alone[:2]) > 5
    assert np.mean(alone[-5:]) < 3.1


def test_it_learns_the_same_on_two_devices(alone):
    np.testing.assert_allclose(spelled(TWO), alone, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_it_learns_the_same_on_any_mesh(mesh, alone):
    np.testing.assert_allclose(spelled(mesh), alone, rtol=1e-3)


@pytest.mark.slow
def test_smollm2_learns_as_with_pytorch():
    import torch
    import transformers

    from interop.source import resolve

    config = settings(20, "full")
    source = resolve(SMOLLM2)
    rows = corpus_rows(source.tokenizer.value, config.steps, rows=8, sequence=32)
    model = load(SMOLLM2, (2, 2, 2), dtype="float32", progress=False)
    ours = train(model, (Batch(each[:, :-1], each[:, 1:]) for each in rows), config, progress=False).losses
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        source.weights.parent, gguf_file=source.weights.name, dtype=torch.float32
    )
    theirs = torch_training(reference, rows, [config.rate(step) for step in range(1, config.steps + 1)]).losses
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert np.mean(ours[-5:]) < np.mean(ours[:5])
    assert config.learning_rate == SETTINGS["learning_rate"]
