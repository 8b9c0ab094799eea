"""The documents' snippets on pipelines run as they stand there, with another import line and small models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax.compat import (
    GPipeScheduler,
    InterleavedScheduler,
    PipelineParallelConfig,
    PipelineStage,
    create_pipeline_stages,
    split_batch,
)
from tbjax.config import LayerKind
from tbjax.mesh import make_mesh
from tests.pipeline.models import DENSE, born, distance, on
from tests.pipeline.models import batch as whole_batch

# Of "Distributed Training", section "Pipeline Parallelism".
BY_HAND = """
stages = [
    PipelineStage(layers=model.layers[:8], device="cuda:0"),
    PipelineStage(layers=model.layers[8:16], device="cuda:1"),
    PipelineStage(layers=model.layers[16:24], device="cuda:2"),
    PipelineStage(layers=model.layers[24:], device="cuda:3"),
]
"""

# Of "Distributed Training Guide", section "Pipeline Parallelism".
SCHEDULED = """
config = PipelineParallelConfig(
    num_stages=4,
    num_micro_batches=8,
    stage_id=0,  # Set per process
)

stages = create_pipeline_stages(model, config)

scheduler = InterleavedScheduler(stages, config)

micro_batches = split_batch(batch, num_micro_batches=8)

def loss_fn(output):
    return criterion(output, labels)

total_loss = scheduler.run_forward_backward(micro_batches, loss_fn)
"""

ESTIMATED = """
gpipe_mem, interleaved_mem = estimate_pipeline_memory(
    model_size_gb=140,  # 70B model
    num_stages=8,
    num_micro_batches=16,
    activation_per_microbatch_gb=0.5,
)

print(f"GPipe peak memory: {gpipe_mem:.1f} GB")
print(f"1F1B peak memory: {interleaved_mem:.1f} GB")
"""


def run(snippet, **given):
    """The snippet with the names that it imports, and those that it takes for granted."""
    names = dict(given)
    exec("from tbjax.compat import *\n" + snippet, names)  # noqa: S102 - the text stands above
    return names


def criterion(output, labels):
    """Cross entropy of a microbatch."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(output), labels[..., None], axis=-1)
    return -jnp.mean(chosen)


def test_the_guide_trains_by_1f1b():
    model = born("dense", on({"dp": 1}))
    tokens = np.asarray(whole_batch().tokens)
    labels = tokens[:2] + 1
    found = run(SCHEDULED, model=model, batch=tokens, criterion=criterion, labels=labels)
    scheduler = found["scheduler"]
    assert [len(stage.layers) for stage in found["stages"]] == [2, 2, 2, 2]
    assert dict(scheduler.model.mesh.shape)["pp"] == 4

    def alone(model):
        losses = [criterion(model.forward(tokens[2 * m : 2 * m + 2]).logits, labels) for m in range(8)]
        return sum(losses) / 8

    loss, wanted = jax.jit(jax.value_and_grad(alone))(model)
    np.testing.assert_allclose(found["total_loss"], loss, rtol=1e-5)
    for (path, gradient), reference in zip(scheduler.gradients.items(), jax.tree.leaves(wanted), strict=True):
        assert distance(gradient, reference) <= 1e-5, path


def test_stages_made_by_hand_are_run_where_they_are_put():
    config = dataclasses.replace(DENSE, layer_kinds=(LayerKind(),) * 27)
    model = tbjax.from_config(config, make_mesh({"dp": 1}, jax.devices()[:1]))
    stages = run(BY_HAND, model=model)["stages"]
    assert [len(stage.layers) for stage in stages] == [8, 8, 8, 3]
    assert [stage.device for stage in stages] == jax.devices()[:4]
    tokens = np.asarray(whole_batch().tokens)
    scheduler = GPipeScheduler(stages, PipelineParallelConfig(num_stages=4, num_micro_batches=2))
    assert scheduler.model.sharding.cut.order.count(-1) == 5
    # A loss that is given the microbatch, with its labels in it.
    batch = {"input_ids": tokens, "labels": tokens + 1}
    loss = scheduler.run_forward_backward(
        split_batch(batch, num_micro_batches=2), lambda output, batch: criterion(output, batch["labels"])
    )
    np.testing.assert_allclose(loss, criterion(model(tokens), tokens + 1), rtol=1e-5)


def test_the_guide_estimates(capsys):
    run(ESTIMATED)
    # 140 / 8 GB of weights; 16 microbatches' activations under GPipe, as many as stages under 1F1B.
    assert capsys.readouterr().out == "GPipe peak memory: 25.5 GB\n1F1B peak memory: 21.5 GB\n"


def test_what_cannot_be_scheduled_says_why():
    model = born("dense", on({"dp": 1}))
    config = PipelineParallelConfig(num_stages=4, num_micro_batches=8)
    stages = create_pipeline_stages(model, config)
    with pytest.raises(ValueError, match="num_stages must be a positive integer, not 0"):
        PipelineParallelConfig(num_stages=0, num_micro_batches=8)
    with pytest.raises(ValueError, match="stage_id=4 is none of num_stages=4"):
        PipelineParallelConfig(num_stages=4, num_micro_batches=8, stage_id=4)
    with pytest.raises(ValueError, match="there are 3 stages, but the config says num_stages=4"):
        InterleavedScheduler(stages[:3], config)
    with pytest.raises(ValueError, match="together they must be all layers of one model"):
        InterleavedScheduler([stages[0], *stages[:3]], config)
    with pytest.raises(ValueError, match=r"a slice of `model\.layers` without gaps"):
        PipelineStage(layers=model.layers[::2], device=jax.devices()[0])
    with pytest.raises(ValueError, match="device='cuda:99': there are 8 devices"):
        PipelineStage(layers=model.layers, device="cuda:99")
    with pytest.raises(ValueError, match="each needs a device of its own"):
        InterleavedScheduler([dataclasses.replace(stage, device="cuda:0") for stage in stages], config)
    with pytest.raises(ValueError, match="there are 2 microbatches, but the config says num_micro_batches=8"):
        InterleavedScheduler(stages, config).run_forward_backward([1, 2], lambda output: output)
