"""What the documents write by hand, in plain PyTorch or Python, agrees with what is here under a name."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional

import tbjax
from tbjax import compat
from tbjax.pipeline.schedule import GPipe
from tests.pipeline.models import DENSE

# Of VIBEE's guide, sections "Tensor Parallelism", "Pipeline Parallelism", "Hybrid Parallelism", "Memory Estimation".
COLUMN = """
# Megatron-style column parallel
class ColumnParallelLinear:
    def __init__(self, in_features, out_features, world_size):
        self.weight = nn.Parameter(
            torch.empty(out_features // world_size, in_features)
        )

    def forward(self, x):
        # Each GPU computes partial output
        local_output = F.linear(x, self.weight)
        # All-gather to combine
        return all_gather(local_output)
"""

GPIPE = """
# GPipe-style micro-batching
def gpipe_forward(model_chunks, micro_batches):
    # Forward pass
    for mb in micro_batches:
        for chunk in model_chunks:
            mb = chunk(mb)

    # Backward pass (reverse order)
    for mb in reversed(micro_batches):
        for chunk in reversed(model_chunks):
            chunk.backward(mb)
"""

HYBRID = """
# 64 GPUs total
# 8 nodes x 8 GPUs per node

TP = 4   # Within node (NVLink)
PP = 2   # Across 2 stages
DP = 8   # 64 / (4 * 2) = 8 replicas
"""

ESTIMATED = """
# Per-GPU memory for training
def estimate_memory(params_b, precision="bf16"):
    bytes_per_param = 2 if precision == "bf16" else 4

    # Model weights
    model_mem = params_b * bytes_per_param

    # Gradients
    grad_mem = params_b * bytes_per_param

    # Optimizer states (AdamW)
    opt_mem = params_b * 8  # m and v in FP32

    # Activations (rough estimate)
    act_mem = params_b * 2 * bytes_per_param

    return model_mem + grad_mem + opt_mem + act_mem
"""

# Of the KernelPyTorch guide, section "Gradient Accumulation".
ACCUMULATED = """
effective_batch_size = batch_size * gradient_accumulation_steps * world_size
"""


def run(snippet, **given):
    """The snippet with the names that it takes for granted."""
    exec(snippet, given)  # noqa: S102 - the text stands above
    return given


def test_a_column_parallel_layer_gives_what_one_device_s_gives():
    names = {"nn": nn, "torch": torch, "F": functional, "all_gather": lambda whole: whole}  # of one device
    theirs = run(COLUMN, **names)["ColumnParallelLinear"](16, 32, world_size=1)
    ours = compat.ColumnParallelLinear(16, 32, compat.TensorParallelConfig(world_size=8))
    weight = ours.weight[...]
    assert weight.addressable_shards[0].data.shape == (4, 16)  # out_features // world_size
    theirs.weight.data = torch.from_numpy(np.array(weight))
    x = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    np.testing.assert_allclose(ours(jnp.asarray(x)), theirs.forward(torch.from_numpy(x)).detach(), rtol=1e-5, atol=1e-6)


def test_gpipe_runs_all_forwards_before_all_backwards():
    done: list[tuple[str, int, int]] = []

    class Chunk:
        def __init__(self, stage):
            self.stage = stage

        def __call__(self, microbatch):
            done.append(("F", self.stage, microbatch))
            return microbatch

        def backward(self, microbatch):
            done.append(("B", self.stage, microbatch))

    stages, microbatches = 3, 4
    run(GPIPE)["gpipe_forward"]([Chunk(stage) for stage in range(stages)], range(microbatches))
    for stage, tasks in enumerate(GPipe().tasks(stages, microbatches)):
        ours = [(task.kind.letter, stage, task.microbatch) for task in tasks]
        theirs = [task for task in done if task[1] == stage]
        assert set(ours) == set(theirs)
        assert (
            [kind for kind, *_ in ours] == [kind for kind, *_ in theirs] == ["F"] * microbatches + ["B"] * microbatches
        )


def test_a_mesh_of_three_kinds_is_planned_as_it_is_given():
    given = run(HYBRID)
    mesh = {"tp": given["TP"], "pp": given["PP"], "dp": given["DP"]}
    plan = tbjax.plan("llama-2-7b-hf", "h100:8x8", mesh=mesh, global_batch=64, seq_len=2048)
    assert {axis: plan.mesh[axis] for axis in mesh} == mesh


def test_the_planner_counts_weights_gradients_and_adam_s_state_as_the_guide_does():
    parameters = sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: tbjax.from_config(DENSE))))
    parts = tbjax.plan(DENSE, "h100:1", global_batch=1, seq_len=64, precision="mixed", remat="full").memory.parts
    rough = run(ESTIMATED)["estimate_memory"](parameters, precision="fp32")
    activations = parameters * 2 * 4  # its guess, in which the batch has no part
    held = parts["parameters"] + parts["optimizer"]
    assert held == rough - activations - parameters * 4
    assert held + parts["gradients"] <= rough - activations  # at the fullest moment not all gradients are there


def test_deepspeed_s_batch_is_what_the_guide_multiplies():
    sizes = {"batch_size": 2, "gradient_accumulation_steps": 4, "world_size": 8}
    whole = run(ACCUMULATED, **sizes)["effective_batch_size"]
    settings = compat.deepspeed(
        {"train_batch_size": whole, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    )
    config = settings.train_config(steps=1)
    assert (config.batch_size, config.microbatches) == (64, 4)
