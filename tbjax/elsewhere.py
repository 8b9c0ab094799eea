"""What other libraries call the things that tbjax has too, for the errors of those who type their names here.

    >>> TrainConfig(steps=10, remat_policy="full")
    TypeError: TrainConfig: 'remat_policy' is MaxText's; here it is TrainConfig(remat="full"), ...

Three tables: what is given (keyword arguments, fields of a config, keys of its JSON, options of a command), what is
imported, and what models are asked for. Nothing is translated: a setting there and its like here seldom take the same
values. What can be called under its own name is in `tbjax.compat`, and README.md has the same by purpose.

Imports nothing slow: the command line goes through here.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeVar, cast

Taking = TypeVar("Taking", bound=Callable[..., Any])

# By library, what is called how there, and what to write here.
Table: TypeAlias = Mapping[str, Mapping[str, str]]

_MESH = "mesh={{{!r}: ...}}"

# MaxText's axes and ours. Each has a size inside a slice (ici) and one across slices (dcn); here one size is both, and
# the devices' own order says what lies inside. Its `sequence` cuts activations along the sequence, as cp does.
_MAXTEXT_AXES = {
    "data": "dp",
    "fsdp": "fsdp",
    "fsdp_transpose": "fsdp",
    "sequence": "cp",
    "context": "cp",
    "tensor": "tp",
    "tensor_transpose": "tp",
    "tensor_sequence": "tp",
    "expert": "ep",
    "pipeline": "pp",
}

# Settings: those of MaxText are of its configs/base.yml.
SETTINGS: Table = {
    "MaxText": {
        **{
            f"{scope}_{theirs}_parallelism": _MESH.format(ours)
            for scope in ("ici", "dcn")
            for theirs, ours in _MAXTEXT_AXES.items()
        },
        "adam_b1": "TrainConfig(optimizer=optax.adamw(rate, b1=...))",
        "adam_b2": "TrainConfig(optimizer=optax.adamw(rate, b2=...))",
        "adam_weight_decay": "TrainConfig(weight_decay=...)",
        "async_checkpointing": "TrainConfig(async_save=...)",
        "base_output_directory": "tbjax.train(..., checkpoint_dir=...)",
        "checkpoint_period": "TrainConfig(save_every=...)",
        "compile_topology": 'tbjax.plan(..., hardware="v5p:4x4x4").verify()',
        "compile_topology_num_slices": 'hardware="v5p:2*4x4x4"',
        "cosine_learning_rate_final_fraction": "TrainConfig(final=...)",
        "data_shuffle_seed": "the seed= of tbjax.training.data's functions",
        "dataset_type": "a function of tbjax.training.data",
        "eval_interval": "TrainConfig(eval_every=...)",
        "eval_steps": "TrainConfig(eval_batches=...)",
        "grad_dtype": "TrainConfig(reduce_dtype=...)",
        "gradient_accumulation_steps": "TrainConfig(microbatches=...)",
        "gradient_clipping_threshold": "TrainConfig(clip_norm=...)",
        "hf_path": "tbjax.training.data.load(name, ...)",
        "learning_rate_final_fraction": "TrainConfig(final=...)",
        "load_full_state_path": "tbjax.train(..., checkpoint_dir=...), which goes on with that run, in its folder",
        "load_parameters_path": "tbjax.load(path, mesh)",
        "max_num_checkpoints_to_keep": "TrainConfig(keep=...)",
        "max_target_length": "TrainConfig(seq_len=...)",
        "model_name": "the first argument of tbjax.load and tbjax.plan",
        "num_pipeline_microbatches": "TrainConfig(microbatches=...)",
        "opt_type": "TrainConfig(optimizer=...)",
        "optimizer_memory_host_offload": 'TrainConfig(offload=("optimizer",))',
        "parameter_memory_host_offload": 'TrainConfig(offload=("parameters",))',
        "per_device_batch_size": "TrainConfig(batch_size=...), of all devices together",
        "profiler": "TrainConfig(profile=...), a folder",
        "profiler_steps": "TrainConfig(profile_steps=...)",
        "remat_policy": 'TrainConfig(remat="full"), "none", "dots", "save(attention,mlp)" or "offload(dots)"',
        "scan_layers": "the scan= of tbjax.load",
        "tokenizer_path": "model.tokenizer, which comes with the model",
        "warmup_steps_fraction": "TrainConfig(warmup=...), in steps",
        "weight_dtype": "the dtype= of tbjax.load, or TrainConfig(precision=...)",
        "z_loss_multiplier": "TrainConfig(z_loss=...)",
    },
    "DeepSpeed": {
        "bf16": 'TrainConfig(precision="mixed")',
        "communication_data_type": "TrainConfig(reduce_dtype=...)",
        "fp16": 'TrainConfig(precision="float16")',
        "gradient_accumulation_steps": "TrainConfig(microbatches=...)",
        "gradient_clipping": "TrainConfig(clip_norm=...)",
        "offload_optimizer": 'TrainConfig(offload=("optimizer",))',
        "offload_param": 'TrainConfig(offload=("parameters",))',
        "train_batch_size": "TrainConfig(batch_size=...)",
        "train_micro_batch_size_per_gpu": "TrainConfig(microbatches=...), the number of them",
        "zero_optimization": 'sharding="OPTIMIZER", "SHARD_GRAD_OP" or "FULL_SHARD" (tbjax.compat.deepspeed reads all)',
    },
    "transformers": {
        "attn_implementation": "left to the device",
        "bf16": 'TrainConfig(precision="mixed")',
        "device_map": "mesh=..., left out for all devices on fsdp",
        "fp16": 'TrainConfig(precision="float16")',
        "gradient_accumulation_steps": "TrainConfig(microbatches=...)",
        "gradient_checkpointing": 'TrainConfig(remat="full")',
        "load_in_4bit": 'quantization="int4"',
        "load_in_8bit": 'quantization="int8"',
        "logging_steps": "TrainConfig(log_every=...)",
        "lr_scheduler_type": "TrainConfig(schedule=...)",
        "max_grad_norm": "TrainConfig(clip_norm=...)",
        "max_steps": "TrainConfig(steps=...)",
        "num_train_epochs": "TrainConfig(steps=...)",
        "optim": "TrainConfig(optimizer=...)",
        "output_dir": "tbjax.train(..., checkpoint_dir=...)",
        "per_device_train_batch_size": "TrainConfig(batch_size=...), of all devices together",
        "quantization_config": 'quantization="int8" or "int4"',
        "save_steps": "TrainConfig(save_every=...)",
        "save_total_limit": "TrainConfig(keep=...)",
        "torch_dtype": "dtype=...",
        "tp_plan": _MESH.format("tp"),
        "tp_size": _MESH.format("tp"),
        "trust_remote_code": "of no use: no code of a checkpoint is run",
        "warmup_ratio": "TrainConfig(warmup=...), in steps",
        "warmup_steps": "TrainConfig(warmup=...)",
    },
    "Megatron": {
        "context_parallel_size": _MESH.format("cp"),
        "expert_model_parallel_size": _MESH.format("ep"),
        "global_batch_size": "TrainConfig(batch_size=...)",
        "micro_batch_size": "TrainConfig(microbatches=...), the number of them",
        "pipeline_model_parallel_size": _MESH.format("pp"),
        "tensor_model_parallel_size": _MESH.format("tp"),
    },
    "TorchBridge": {
        "enable_gradient_checkpointing": 'TrainConfig(remat="full")',
        "pipeline_parallel_size": _MESH.format("pp"),
        "tensor_parallel_size": _MESH.format("tp"),
    },
    "PyTorch": {
        "cpu_offload": 'TrainConfig(offload=("optimizer", "parameters"))',
        "device_mesh": "mesh=...",
        "lr": "TrainConfig(learning_rate=...)",
        "sharding_strategy": "sharding=...",
    },
    "accelerate": {
        "gradient_accumulation_steps": "TrainConfig(microbatches=...)",
        "mixed_precision": 'TrainConfig(precision="mixed")',
    },
}

_LOAD = "tbjax.load(name, mesh)"
_STAGED = 'mesh={{"pp": ...}} with TrainConfig(pipeline="{}")'
_CUT = 'mesh={"tp": ...}: tbjax.load cuts each layer as it must be'

# Names that are imported, beside those that `tbjax.compat` has.
NAMES: Table = {
    "transformers": {
        "AutoTokenizer": "model.tokenizer, which comes with the model",
        "BitsAndBytesConfig": 'tbjax.load(name, quantization="int8") or "int4"',
        "TextIteratorStreamer": "model.generate(prompt, stream=True)",
        "TextStreamer": "model.generate(prompt, stream=True)",
        "Trainer": "tbjax.train(model, data, TrainConfig(...))",
        "TrainingArguments": "tbjax.TrainConfig",
    },
    "MaxText": {
        "llama_or_mistral_ckpt": "tbjax-convert SRC DST --to orbax, or nothing: tbjax.load reads Hugging Face's files",
    },
    "NeMo": {
        "DDPManager": 'tbjax.load(name, sharding="NO_SHARD")',
        "FSDP2Manager": 'tbjax.load(name, sharding="FULL_SHARD")',
        "MegatronFSDPManager": 'tbjax.load(name, sharding="FULL_SHARD")',
    },
    "PyTorch": {
        "BackwardPrefetch": "left to XLA, which orders what is sent and what is computed",
        "CPUOffloadPolicy": 'TrainConfig(offload=("optimizer", "parameters"))',
        "ColwiseParallel": _CUT,
        "DDP": "tbjax.compat.DistributedDataParallel",
        "DataLoader": "a function of tbjax.training.data, or any iterable of batches",
        "DeviceMesh": "tbjax.make_mesh, or a dict of sizes",
        "DistributedSampler": "a function of tbjax.training.data, which gives each process its own rows",
        "FSDP": "tbjax.compat.FullyShardedDataParallel",
        "FullStateDictConfig": "model.save_pretrained(path)",
        "GradScaler": 'TrainConfig(precision="float16")',
        "MixedPrecisionPolicy": 'TrainConfig(precision="mixed", reduce_dtype=...)',
        "RowwiseParallel": _CUT,
        "Schedule1F1B": _STAGED.format("1f1b"),
        "ScheduleGPipe": _STAGED.format("gpipe"),
        "ScheduleInterleaved1F1B": _STAGED.format("interleaved"),
        "ScheduleZBVZeroBubble": _STAGED.format("zb-v"),
        "SequenceParallel": "tbjax.load(name, mesh, sequence_parallel=True)",
        "ShardedGradScaler": 'TrainConfig(precision="float16")',
        "StateDictType": "model.save_pretrained(path)",
        "autocast": 'TrainConfig(precision="mixed")',
        "fully_shard": 'tbjax.load(name, sharding="FULL_SHARD")',
        "init_process_group": "tbjax.initialize()",
        "parallelize_module": _CUT,
        "size_based_auto_wrap_policy": "not needed: every layer is gathered when it is its turn",
        "transformer_auto_wrap_policy": "not needed: every layer is gathered when it is its turn",
    },
    "DeepSpeed": {
        "DeepSpeedConfig": "tbjax.compat.deepspeed(config)",
        "DeepSpeedCPUAdam": 'TrainConfig(optimizer="adamw", offload=("optimizer",))',
        "DeepSpeedEngine": "tbjax.compat.deepspeed(config).apply(model)",
        "FusedAdam": 'TrainConfig(optimizer="adamw")',
        "PipelineModule": 'mesh={"pp": ...}',
        "init_distributed": "tbjax.initialize()",
        "init_inference": f"{_LOAD} and model.generate(...)",
    },
    "accelerate": {
        "Accelerator": "tbjax.train, or tbjax.make_train_step for a loop of your own",
        "DeepSpeedPlugin": "tbjax.compat.deepspeed(config)",
        "FullyShardedDataParallelPlugin": 'tbjax.load(name, sharding="FULL_SHARD")',
        "dispatch_model": _LOAD,
        "infer_auto_device_map": "tbjax.plan(name, hardware)",
        "init_empty_weights": f"not needed: {_LOAD} never holds the model in one place",
        "load_checkpoint_and_dispatch": _LOAD,
        "notebook_launcher": "not needed: one process drives all devices of its host",
    },
}


_TRAINED = "tbjax.train(model, data, config); tbjax.compat.FullyShardedDataParallel(model) has it, for PyTorch's loop"
_PLACED = "model.moved(mesh): a model lies where its mesh does"

# What models there can be asked for, and ours cannot.
METHODS: Table = {
    "PyTorch": {
        "bfloat16": 'tbjax.load(name, mesh, dtype="bfloat16")',
        "cpu": _PLACED,
        "cuda": _PLACED,
        "device": "model.mesh",
        "float": 'tbjax.load(name, mesh, dtype="float32")',
        "half": 'tbjax.load(name, mesh, dtype="float16")',
        "load_state_dict": _LOAD,
        "named_parameters": _TRAINED,
        "parameters": _TRAINED,
        "requires_grad_": "TrainConfig(frozen=...), a regular expression of paths",
        "state_dict": "model.save_pretrained(path) or tbjax.save(model, path)",
        "to": _PLACED,
    },
    "transformers": {
        "gradient_checkpointing_enable": 'TrainConfig(remat="full")',
        "push_to_hub": "model.save_pretrained(path), a folder that huggingface_hub's upload_folder takes",
    },
}


# An answer that is one argument: whose it is, its name, its value, and a remark or further values.
_ARGUMENT = re.compile(r"""(TrainConfig\(|tbjax\.train\(\.\.\., )?(\w+)=(\.{3}|".*?"|\(.*?\)|\{.*?\})(?(1)\))(.*)""")


def called_here(
    *words: str,
    tables: tuple[Table, ...] = (SETTINGS, NAMES),
    of: str = "",
    taking: Collection[str] = (),
    options: bool = False,
) -> str:
    """A sentence on what the first of `words` that another library knows is called here; none if there is no such.

    `of` is what was called with them, and `taking` what it takes (as `options` of a command, or as arguments): where
    the answer is among these, it is told as it is written there.
    """
    for word in words:
        said = [(library, ours[word]) for table in tables for library, ours in table.items() if word in ours]
        if said:
            owners = " and ".join(f"{library}'" if library.endswith("s") else f"{library}'s" for library, _ in said)
            answers = dict.fromkeys(_written(ours, of, taking, options=options) for _, ours in said)
            return f"{word!r} is {owners}; here it is {', or '.join(answers)}."
    return ""


def _written(ours: str, of: str, taking: Collection[str], *, options: bool) -> str:
    """An answer as an argument or an option of what was called, if it takes that; else as the table has it."""
    found = _ARGUMENT.fullmatch(ours)
    if found is None or ours.startswith(f"{of}("):
        return ours
    owner, name, value, rest = found.groups()
    if name == "batch_size" and name not in taking:
        name = "global_batch"  # as the planner has it
    if name not in taking or (name == "schedule" and "learning_rate" not in taking):  # then it is the pipeline's
        return ours
    if owner:  # the values are TrainConfig's, and others may take other ones
        value, rest = "...", rest if re.match(r", \w", rest) else ""
    if not options:
        return f"{of}({name}={value}){rest}"
    option = f"--{name.replace('_', '-')}"
    if axis := re.match(r"\{'(\w+)'", value):
        return f"{option} {axis[1]}=N"
    return option + rest if value == "..." else f"{option} {value}{rest}".replace('"', "")


def refuse_import(module: str, name: str) -> None:
    """Raise for a name that is imported from another library and that `module` has not; return for any other.

    An ImportError, although it is an attribute that is missing: of an AttributeError, `from module import name` shows
    nothing. The price is that `hasattr` and `getattr` with a default raise it too, for these names; of settings, which
    are short and common words, nothing is said here.
    """
    if said := called_here(name, tables=(NAMES,)):
        raise ImportError(f"{module}: {said}")


def told_by_name(taking: Taking) -> Taking:
    """A function, or a class, that answers a keyword argument of another library's with what it is called here."""
    taken: Any = taking
    call = taken.__init__ if isinstance(taken, type) else taken
    known = inspect.signature(call).parameters

    @functools.wraps(call)
    def checked(*arguments: Any, **given: Any) -> Any:
        for name in given:
            if name not in known and (said := called_here(name, of=taken.__name__, taking=known)):
                raise TypeError(f"{taken.__name__}: {said}")
        return call(*arguments, **given)

    if not isinstance(taken, type):
        return cast(Taking, checked)
    taken.__init__ = checked
    return taking
