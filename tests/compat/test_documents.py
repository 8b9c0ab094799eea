"""The documents' snippets on loading, sharding and training run as they stand there, on small models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tbjax
from tbjax import compat
from tbjax.config import LayerKind
from tbjax.sharding import leaves
from tbjax.training.optimizer import Layerwise
from tests import tiny
from tests.pipeline.models import DENSE

CASE = tiny.BY_NAME["llama"]

# Of "TorchBridge Distributed Models", section "Quick Start".
CREATED = """
# Automatic configuration
model, tokenizer = create_distributed_llm(
    "meta-llama/Llama-2-70b-hf",
    world_size=4,  # 4 GPUs
)

# Manual configuration
config = DistributedConfig(
    tensor_parallel_size=4,
    pipeline_parallel_size=2,
    enable_gradient_checkpointing=True,
)
optimizer = DistributedLLMOptimizer("meta-llama/Llama-2-70b-hf", config)
manual, tokenizer = optimizer.optimize()
"""

# Of "Distributed Training Guide", sections "Automatic Strategy Selection" and "Hybrid Parallelism".
CHOSEN = """
# Auto-select best strategy for your hardware
optimizer = DistributedLLMOptimizer(
    model_name="meta-llama/Llama-2-70b-hf",
    num_gpus=8,
    strategy=ParallelismStrategy.AUTO,
)

# Load and optimize
model = optimizer.load_model()
"""

HYBRID = """
# Hybrid: Tensor parallel within node, pipeline across nodes
optimizer = DistributedLLMOptimizer(
    model_name="meta-llama/Llama-2-70b-hf",
    num_gpus=16,  # 2 nodes x 8 GPUs
    strategy=ParallelismStrategy.HYBRID,
    tensor_parallel_size=8,  # Within node
    pipeline_parallel_size=2,  # Across nodes
)
"""

# Its section "Memory Estimation".
ESTIMATED = """
# Check if your hardware can handle it
requirements = estimate_gpu_requirements(
    "meta-llama/Llama-2-70b-hf",
    max_sequence_length=4096,
    max_batch_size=1,
    quantization="none",  # or "int8", "int4"
)

print(f"GPUs needed: {requirements['num_gpus_required']}")
print(f"Memory per GPU: {requirements['memory_per_gpu_gb']:.1f} GB")
"""

# Its section "Tensor Parallelism".
TENSOR_PARALLEL = """
# Configure for 8 GPUs
config = TensorParallelConfig(
    world_size=8,
    rank=0,  # Set per process
    sequence_parallel=True,  # Also parallelize sequence dimension
)

# Apply to existing model
parallel_model = apply_tensor_parallelism(model, config)

# Or build with parallel layers directly
class ParallelAttention(nn.Module):
    def __init__(self, hidden_size, num_heads, config):
        super().__init__()
        # Q, K, V projections split across GPUs
        self.qkv = ColumnParallelLinear(
            hidden_size, 3 * hidden_size, config,
            gather_output=False,
        )
        # Output projection with parallel input
        self.out = RowParallelLinear(
            hidden_size, hidden_size, config,
            input_is_parallel=True,
        )
"""

# Of "Distributed Training", section "Tensor Parallelism".
PARALLEL_MLP = """
# Replace linear layers with tensor-parallel equivalents
class ParallelMLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)))
"""

# Of the guide, section "FSDP".
SHARDED = """
sharder = ModelSharder(
    strategy=ShardingStrategy.FULL_SHARD,
    num_gpus=8,
)

# Analyze model for optimal sharding
shard_plan = sharder.analyze_model(model)

# Apply sharding
sharded_model = sharder.apply(model)
"""

# Of "Distributed Training", sections "FSDP" and "Memory Optimization".
WRAPPED = """
fsdp_manager = AdvancedFSDPManager(
    sharding_strategy="FULL_SHARD",  # FULL_SHARD, SHARD_GRAD_OP, NO_SHARD
    mixed_precision=True,
    cpu_offload=False,
    activation_checkpointing=True,
)
model = fsdp_manager.wrap_model(model)
"""

CHECKPOINTED = """
# Gradient checkpointing reduces activation memory
checkpointing = SelectiveGradientCheckpointing(model, checkpoint_ratio=0.5)

# CPU offloading for optimizer states
fsdp_manager = AdvancedFSDPManager(cpu_offload=True)
"""

# Of "Distributed API Examples".
AUTOMATIC = """
# Option 1: Using distributed dictionary (simpler)
model = NeMoAutoModelForCausalLM.from_pretrained(
    "meta-llama/Llama-3.1-8B",
    distributed={"tp_size": 2, "dp_size": 4},
)

# Option 2: Using explicit device_mesh (more control)
mesh = init_device_mesh(
    "cuda",
    mesh_shape=(1, 1, 1, 1, 2),  # (pp, dp_replicate, dp_shard, cp, tp)
    mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp")
)

two = NeMoAutoModelForCausalLM.from_pretrained(
    "meta-llama/Llama-3.1-8B",
    device_mesh=mesh,
)
"""

OPTIONS = """
distributed = {
    "tp_size": 2,           # Tensor parallelism size
    "cp_size": 1,           # Context parallelism size
    "pp_size": 1,           # Pipeline parallelism size
    "dp_size": 4,           # Data parallelism size (0 = auto)
    "backend": "nccl",      # Distributed backend
    "use_hf_tp_plan": False,  # Use HuggingFace's TP plan
    "sequence_parallel": False,  # Enable sequence parallelism
    "activation_checkpointing": False,  # Enable gradient checkpointing
}
"""

# Of VIBEE's guide, section "DeepSpeed ZeRO".
ZERO = {
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
    }
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny.save(CASE, path)
    return str(path)


def run(snippet, folder="", **given):
    """The snippet with the names that it imports, and a small model wherever it names a large one."""
    names = {"nn": nnx, "F": jax.nn, **given}
    for name in ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-3.1-8B"):
        snippet = snippet.replace(name, folder or name)
    exec("from tbjax.compat import *\n" + snippet, names)  # noqa: S102 - the text stands above
    return names


def sizes(model):
    return {axis: size for axis, size in dict(model.mesh.shape).items() if size > 1}


def small():
    return tbjax.from_config(DENSE, tbjax.make_mesh({"dp": 1}, jax.devices()[:1]))


def logits(model):
    return np.asarray(model(np.arange(32, dtype=np.int32).reshape(2, 16)))


def test_a_model_is_created_and_its_tokenizer(folder):
    found = run(CREATED, folder)
    assert found["model"].mesh.size == 4
    assert sizes(found["manual"]) == {"pp": 2, "tp": 4}
    assert found["manual"].training_defaults.remat == "full"
    assert found["tokenizer"] is None  # the small model has none
    np.testing.assert_allclose(logits(found["manual"]), logits(found["model"]), atol=1e-5)


def test_the_planner_chooses(folder):
    model = run(CHOSEN, folder)["model"]
    assert model.mesh.size == 8
    np.testing.assert_allclose(logits(model), logits(tbjax.load(folder, (1, 8, 1), progress=False)), atol=1e-5)


def test_sizes_that_the_machine_lacks_are_refused():
    with pytest.raises(ValueError, match="num_gpus=16: there are 8 devices"):
        run(HYBRID)
    hybrid = HYBRID.replace("num_gpus=16", "num_gpus=8").replace("size=8", "size=4")
    assert dict(run(hybrid)["optimizer"].mesh.shape)["tp"] == 4
    with pytest.raises(ValueError, match="needs a multiple of 16 devices, but there are 8"):
        run(HYBRID.replace("num_gpus=16", "num_gpus=8"))["optimizer"].mesh  # noqa: B018
    with pytest.raises(ValueError, match="strategy='magic' is unknown"):
        compat.DistributedConfig(strategy="magic")
    with pytest.raises(ValueError, match="quantization='int3' is unknown"):
        compat.DistributedConfig(quantization="int3")
    with pytest.raises(ValueError, match="strategy: they are in the config"):
        compat.DistributedLLMOptimizer("any", compat.DistributedConfig(), strategy="fsdp")


def test_requirements_are_estimated(capsys):
    assert run(ESTIMATED)["requirements"]["num_gpus_required"] == 2
    assert capsys.readouterr().out.startswith("GPUs needed: 2\nMemory per GPU: ")


def test_layers_are_cut_over_eight_devices():
    model = small()
    found = run(TENSOR_PARALLEL, model=model)
    parallel = found["parallel_model"]
    assert sizes(parallel) == {"tp": 8}
    assert parallel.sharding.sequence_parallel
    np.testing.assert_allclose(logits(parallel), logits(model), atol=1e-5)
    attention = found["ParallelAttention"](32, 8, found["config"])
    x = jnp.ones((2, 4, 32))
    assert attention.qkv.weight[...].addressable_shards[0].data.shape == (96 // 8, 32)
    assert attention.out(attention.qkv(x)[..., :32]).shape == (2, 4, 32)
    mlp = run(PARALLEL_MLP)["ParallelMLP"](32, 64)
    up, down = mlp.gate_proj.weight[...], mlp.down_proj.weight[...]
    np.testing.assert_allclose(mlp.forward(x), jax.nn.silu(x @ up.T) @ down.T, rtol=1e-5)
    with pytest.raises(ValueError, match="rank=8 is none of world_size=8"):
        compat.TensorParallelConfig(world_size=8, rank=8)
    with pytest.raises(ValueError, match="world_size=9: there are 8 devices"):
        compat.TensorParallelConfig(world_size=9)


def test_a_model_is_analysed_and_sharded():
    model = small()
    found = run(SHARDED, model=model)
    plan, sharded = found["shard_plan"], found["sharded_model"]
    assert sizes(sharded) == {"fsdp": 8}
    held = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(sharded))
    assert plan.bytes_per_device == held < sum(array.nbytes for array in jax.tree.leaves(model)) / 7
    assert set(plan) == {leaf.path for leaf in leaves(model)}
    assert "embedding.weight" in str(plan)
    np.testing.assert_allclose(logits(sharded), logits(model), atol=1e-5)
    with pytest.raises(ValueError, match="num_gpus=0: there are 8 devices"):
        compat.ModelSharder(num_gpus=0)


def batches(count):
    generator = np.random.default_rng(0)
    for _ in range(count):
        tokens = generator.integers(0, DENSE.vocab_size, (8, 16), np.int32)
        yield {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}


def test_a_wrapped_model_is_trained_as_its_manager_says():
    model = small()
    wrapped = run(WRAPPED, model=model)["model"]
    assert sizes(wrapped) == {"fsdp": 8}
    assert sizes(compat.AdvancedFSDPManager("NO_SHARD").wrap_model(model)) == {"dp": 8}
    manager = run(CHECKPOINTED, model=wrapped)["fsdp_manager"]
    assert wrapped.training_defaults.remat == "full:0.5"
    offloaded = manager.wrap_model(wrapped)
    assert offloaded.training_defaults.offload == ("optimizer",)
    assert offloaded.training_defaults.remat == "full"
    result = tbjax.train(offloaded, batches(2), tbjax.TrainConfig(steps=2), progress=False)
    kinds = {a.sharding.memory_kind for a in jax.tree.leaves(result.state.optimizer) if a.ndim > 1}
    assert kinds == {"pinned_host"}
    assert np.isfinite(result.losses).all()
    with pytest.raises(ValueError, match=r"checkpoint_ratio=1\.5 must be from 0 to 1"):
        compat.SelectiveGradientCheckpointing(model, checkpoint_ratio=1.5)


def test_deepspeed_s_json_is_understood():
    settings = compat.deepspeed(ZERO)
    assert settings.strategy == "FULL_SHARD"
    assert settings.training_defaults.offload == ("optimizer", "parameters")
    assert settings.unused == tuple(
        f"zero_optimization.{name}" for name in ("overlap_comm", "contiguous_gradients", "reduce_bucket_size")
    )
    assert sizes(settings.apply(small())) == {"fsdp": 8}
    whole = ZERO | {
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 32,
        "communication_data_type": "fp32",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
    }
    config = compat.deepspeed(whole).train_config(steps=10)
    wanted = {"precision": "mixed", "microbatches": 2, "batch_size": 32, "reduce_dtype": "float32"}
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert compat.deepspeed({"gradient_clipping": 0.5}).train_config(steps=10, optimizer="lion").clip_norm == 0.5
    assert compat.deepspeed({"train_micro_batch_size_per_gpu": 4}).unused == ("train_micro_batch_size_per_gpu",)


@pytest.mark.parametrize(
    ("kind", "params", "update"),
    [
        # Of weight 1 and gradient 2 at a first step, whose direction Adam and Lion take without its length.
        ("AdamW", {"lr": 0.1, "weight_decay": 0.5}, -0.1 * (1 + 0.5)),
        ("Lion", {"lr": 0.1, "weight_decay": 0.5}, -0.1 * (1 + 0.5)),
        ("SGD", {"lr": 0.1, "weight_decay": 0.5}, -0.1 * (2 + 0.5)),
        ("SGD", {"lr": 0.1}, -0.1 * 2),
    ],
)
def test_deepspeed_s_optimizers_do_what_deepspeed_s_do(kind, params, update):
    section = {"optimizer": {"type": kind, "params": params}}
    offloaded = section | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for config in (section, offloaded):
        rule = compat.deepspeed(config).train_config(steps=10).optimizer
        assert isinstance(rule, Layerwise)  # or it could not be offloaded
        weights = {"norm.weight": jnp.ones(3)}
        found, _ = rule.update({"norm.weight": jnp.full(3, 2.0)}, rule.init(weights), weights)
        np.testing.assert_allclose(found["norm.weight"], update, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage=4: ZeRO has the stages 0 to 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device='nvme'"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "goes with stage 3, not 1"),
        ({"zero_optimisation": {}}, "zero_optimisation={} is no setting"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "loss_scale must be 0"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "DeepSpeed's schedules are not read"),
        ({"scheduler": {"params": {"warmup_num_steps": 10}}}, "DeepSpeed's schedules are not read"),
        ("nowhere.json", "there is no such file"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb' is unknown"),
        ({"train_batch_size": "auto"}, "train_batch_size is 'auto'"),
        ({"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2}, "no multiple"),
    ],
)
def test_what_deepspeed_s_json_asks_in_vain_is_named(config, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compat.deepspeed(config)


def test_the_auto_class_spreads_a_model(folder, tmp_path):
    found = run(AUTOMATIC, folder)
    assert sizes(found["model"]) == {"fsdp": 4, "tp": 2}
    assert sizes(found["two"]) == {"tp": 2}
    load = compat.AutoModelForCausalLM.from_pretrained
    assert load(folder, torch_dtype="bfloat16").dtype == jnp.bfloat16
    assert sizes(load(folder)) == {}
    spread = run(OPTIONS)["distributed"]
    model = load(folder, distributed={**spread, "dp_size": 0, "activation_checkpointing": True})
    assert sizes(model) == {"fsdp": 4, "tp": 2}
    assert model.training_defaults.remat == "full"
    for wrong, message in (
        ({"tp": 2}, r"distributed\['tp'\] is unknown"),
        ({"tp_size": 2, "backend": "smoke"}, r"\['backend'\]='smoke' is unknown"),
        ({"tp_size": 2, "use_hf_tp_plan": True}, "by its own plan"),
        ({"tp_size": 3}, "needs a multiple of 3 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, distributed=wrong)
    with pytest.raises(ValueError, match="give one"):
        load(folder, distributed=spread, device_mesh=model.mesh)
    with pytest.raises(ValueError, match="mesh axis 'rows' is unknown"):
        compat.init_device_mesh("cuda", (2,), mesh_dim_names=("rows",))
    with pytest.raises(TypeError, match="is not made itself"):
        compat.AutoModelForCausalLM()


def test_every_name_is_there():
    assert {"PipelineStage", "deepspeed", "create_distributed_llm"} <= set(compat.__all__)
    for name in compat.__all__:
        assert getattr(compat, name) is not None
    with pytest.raises(AttributeError, match="'GPipe'"):
        compat.GPipe  # noqa: B018


def test_layers_of_several_kinds_move_too():
    config = dataclasses.replace(DENSE, layer_kinds=(LayerKind(window=8), LayerKind()) * 2)
    model = tbjax.from_config(config, (8, 1, 1))
    np.testing.assert_allclose(logits(model.moved({"fsdp": 4, "tp": 2})), logits(model), atol=1e-5)
