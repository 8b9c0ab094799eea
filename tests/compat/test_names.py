"""Every class, function, parameter and returned key that the five documents show is there.

A row is a document, a name as it stands there, and the parameters, keys or members that it is shown with. What the
snippets around them do is tested beside this file; here nothing may be missing.
"""

import importlib
import inspect
import pkgutil

import pytest

from tbjax import compat

MODELS, TRAINING, GUIDE, VIBEE, NEMO = (
    "TorchBridge Distributed Models",
    "Distributed Training",
    "Distributed Training Guide (KernelPyTorch)",
    "Distributed Training Guide (VIBEE)",
    "Distributed API Examples (NeMo)",
)

# By document: a name of tbjax.compat's, and what it takes.
PARAMETERS = [
    (MODELS, "create_distributed_llm", "model_name world_size"),
    (MODELS, "DistributedConfig", "tensor_parallel_size pipeline_parallel_size enable_gradient_checkpointing"),
    (MODELS, "DistributedLLMOptimizer", "model_name config"),
    (MODELS, "DistributedLLMOptimizer.optimize", ""),
    (MODELS, "ColumnParallelLinear", "in_features out_features"),
    (MODELS, "RowParallelLinear", "in_features out_features"),
    (MODELS, "TensorParallelEmbedding", "num_embeddings embedding_dim"),
    (TRAINING, "distributed.init_process_group", "backend"),
    (TRAINING, "torch.cuda.set_device", "device"),
    (TRAINING, "DistributedDataParallel", "module device_ids find_unused_parameters"),
    (
        TRAINING,
        "AdvancedFSDPManager",
        "sharding_strategy mixed_precision cpu_offload activation_checkpointing",
    ),
    (TRAINING, "AdvancedFSDPManager.wrap_model", "model"),
    (TRAINING, "PipelineStage", "layers device"),
    (TRAINING, "DistributedDataParallel.parameters", ""),
    (TRAINING, "MultiNodeTrainingManager", ""),
    (TRAINING, "MultiNodeTrainingManager.setup", "num_nodes gpus_per_node"),
    (TRAINING, "SelectiveGradientCheckpointing", "model checkpoint_ratio"),
    (TRAINING, "distributed.get_rank", ""),
    (TRAINING, "distributed.get_world_size", ""),
    (
        GUIDE,
        "DistributedLLMOptimizer",
        "model_name num_gpus strategy tensor_parallel_size pipeline_parallel_size quantization",
    ),
    (GUIDE, "DistributedLLMOptimizer.load_model", ""),
    (GUIDE, "estimate_gpu_requirements", "max_sequence_length max_batch_size quantization"),
    (
        GUIDE,
        "TensorParallelConfig",
        "world_size rank sequence_parallel async_tensor_model_parallel_allreduce",
    ),
    (GUIDE, "apply_tensor_parallelism", "model config"),
    (GUIDE, "ColumnParallelLinear", "in_features out_features config gather_output"),
    (GUIDE, "RowParallelLinear", "in_features out_features config input_is_parallel"),
    (GUIDE, "PipelineParallelConfig", "num_stages num_micro_batches stage_id activation_checkpointing"),
    (GUIDE, "create_pipeline_stages", "model config"),
    (GUIDE, "InterleavedScheduler", "stages config"),
    (GUIDE, "InterleavedScheduler.run_forward_backward", "micro_batches loss_fn"),
    (GUIDE, "GPipeScheduler", "stages config"),
    (GUIDE, "split_batch", "batch num_micro_batches"),
    (
        GUIDE,
        "estimate_pipeline_memory",
        "model_size_gb num_stages num_micro_batches activation_per_microbatch_gb",
    ),
    (GUIDE, "MixedPrecision", "param_dtype reduce_dtype buffer_dtype"),
    (GUIDE, "FullyShardedDataParallel", "module sharding_strategy mixed_precision device_id cpu_offload"),
    (GUIDE, "torch.optim.AdamW", "params lr"),
    (GUIDE, "torch.optim.AdamW.step", ""),
    (GUIDE, "torch.optim.AdamW.zero_grad", ""),
    (GUIDE, "ModelSharder", "strategy num_gpus"),
    (GUIDE, "ModelSharder.analyze_model", "model"),
    (GUIDE, "ModelSharder.apply", "model"),
    (GUIDE, "apply_activation_checkpointing", "model check_fn"),
    (GUIDE, "checkpoint_wrapper", "module"),
    (GUIDE, "CPUOffload", "offload_params"),
    (GUIDE, "torch.cuda.is_available", ""),
    (GUIDE, "torch.cuda.memory_allocated", ""),
    (GUIDE, "torch.cuda.memory_reserved", ""),
    (GUIDE, "distributed.is_initialized", ""),
    (GUIDE, "distributed.get_backend", ""),
    (VIBEE, "deepspeed", "config"),
    (VIBEE, "FullyShardedDataParallel", "sharding_strategy mixed_precision device_id use_orig_params"),
    (VIBEE, "torch.cuda.current_device", ""),
    (VIBEE, "torch.save", "obj f"),
    (VIBEE, "FullyShardedDataParallel.state_dict", ""),
    (VIBEE, "checkpoint.save", "state_dict storage_writer"),
    (VIBEE, "checkpoint.load", "state_dict"),
    (VIBEE, "FileSystemWriter", "path"),
    (NEMO, "AutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path distributed device_mesh"),
    (NEMO, "NeMoAutoModelForCausalLM.from_pretrained", "pretrained_model_name_or_path distributed device_mesh"),
    (NEMO, "init_device_mesh", "device_type mesh_shape mesh_dim_names"),
]

# Members of what they enumerate.
MEMBERS = [
    (TRAINING, "ShardingStrategy", "FULL_SHARD SHARD_GRAD_OP NO_SHARD"),
    (GUIDE, "ShardingStrategy", "FULL_SHARD SHARD_GRAD_OP HYBRID_SHARD NO_SHARD"),
    (GUIDE, "ParallelismStrategy", "AUTO HYBRID"),
    (GUIDE, "torch", "bfloat16"),
]


def found(name):
    """What the documents mean by a dotted name: a module is one, or what is in it."""
    first, *_ = name.split(".")
    if first in {module.name for module in pkgutil.iter_modules(compat.__path__)}:
        importlib.import_module(f"tbjax.compat.{first}")
    return pkgutil.resolve_name(f"tbjax.compat:{name}")


@pytest.mark.parametrize(("document", "name", "parameters"), PARAMETERS, ids=lambda value: str(value).split(" ")[0])
def test_a_name_takes_what_the_documents_give_it(document, name, parameters):
    what = found(name)
    taken = inspect.signature(what.__init__ if isinstance(what, type) else what).parameters
    assert set(parameters.split()) <= set(taken), f"{document}: {name}"


@pytest.mark.parametrize(("document", "name", "members"), MEMBERS, ids=lambda value: str(value).split(" ")[0])
def test_a_name_has_the_members_that_the_documents_ask_for(document, name, members):
    assert set(members.split()) <= set(dir(found(name))), f"{document}: {name}"


def test_estimates_have_the_documents_keys_and_defaults_are_theirs():
    requirements = compat.estimate_gpu_requirements("llama-2-70b-hf", quantization="none")
    assert {"num_gpus_required", "memory_per_gpu_gb"} <= set(requirements)
    for config, defaults in (
        (
            compat.TensorParallelConfig(),
            {"world_size": 1, "rank": 0, "sequence_parallel": False, "async_tensor_model_parallel_allreduce": False},
        ),
        (
            compat.PipelineParallelConfig(num_stages=2, num_micro_batches=4, stage_id=1),
            {"activation_checkpointing": False},
        ),
    ):
        assert {name: getattr(config, name) for name in defaults} == defaults
    optimizer = inspect.signature(compat.DistributedLLMOptimizer).parameters
    assert optimizer["quantization"].default == "none"
    assert compat.DistributedConfig().strategy is compat.ParallelismStrategy.AUTO


def test_every_name_is_one_of_the_documents_or_belongs_to_one():
    shown = {name.split(".")[0] for _, name, _ in [*PARAMETERS, *MEMBERS]}
    results = {"DeepSpeedSettings", "ShardPlan", "FileSystemReader"}  # of deepspeed, analyze_model; FileSystemWriter's
    assert set(compat.__all__) - results <= shown
