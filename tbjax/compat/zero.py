"""DeepSpeed's JSON: what it says of ZeRO, precision, batches and optimizer, in terms of tbjax.

    settings = deepspeed("deepspeed_config.json")            # or the dict
    model = settings.apply(model)                            # laid out by its ZeRO stage
    tbjax.train(model, data, settings.train_config(steps=1000))

ZeRO's stages are sharding strategies: 0 NO_SHARD, 1 OPTIMIZER, 2 SHARD_GRAD_OP, 3 FULL_SHARD. What only tunes how
DeepSpeed works (buckets, prefetching, where its loss scale starts) has no counterpart and is listed in `unused`. What
would ask for another training and is not known raises.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optax

from tbjax.api import CausalLM
from tbjax.compat.training import mesh_of, with_defaults
from tbjax.sharding import ShardingStrategy
from tbjax.training.config import Defaults, Offloaded, TrainConfig
from tbjax.training.optimizer import Layerwise, clip_by_norm
from tbjax.training.precision import Precision

STAGES = (
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.OPTIMIZER,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.FULL_SHARD,
)

# Of `zero_optimization`: how DeepSpeed moves data, which changes no result.
TUNING = (
    "overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions",
    "reduce_scatter", "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters",
)  # fmt: skip

# Of the whole: reports and measurements.
REPORTS = (
    "steps_per_print", "wall_clock_breakdown", "dump_state", "flops_profiler", "comms_logger", "tensorboard", "wandb",
    "csv_monitor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",  # how what is checkpointed is kept; whether anything is, the model's code says there
)  # fmt: skip

# Of `fp16`: where the dynamic loss scale starts and how it moves.
SCALING = (
    "auto_cast", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "consecutive_hysteresis",
)  # fmt: skip

PRECISIONS: Mapping[str, Precision] = {"bf16": "mixed", "fp16": "float16", "fp32": "float32"}
REDUCE_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What a DeepSpeed config asks for."""

    strategy: ShardingStrategy
    training_defaults: Defaults
    options: Mapping[str, Any]  # of TrainConfig
    unused: tuple[str, ...]  # settings that have no counterpart and change no result

    def apply(self, model: CausalLM) -> CausalLM:
        """The model, laid out by the ZeRO stage, and trained as the config says."""
        laid = model.moved(mesh_of(model, self.strategy), sharding=self.strategy)
        with_defaults(laid, self.training_defaults)
        return laid

    def train_config(self, steps: int, **options: Any) -> TrainConfig:
        """The config of a run of so many steps; `options` are more of `TrainConfig`'s, and come first.

        An optimizer that the config names keeps its learning rate from beginning to end, unless `options` name another.
        """
        return TrainConfig(**{"steps": steps, **self.training_defaults.given, **self.options, **options})


def deepspeed(config: Mapping[str, Any] | str | Path) -> DeepSpeedSettings:
    """The settings of a DeepSpeed config: a dict, or the path of its JSON."""
    values = _Reader(_read(config), "")
    zero = values.section("zero_optimization")
    stage = zero.take("stage", 0)
    if stage not in range(len(STAGES)):
        raise ValueError(f"zero_optimization.stage={stage!r}: ZeRO has the stages 0 to 3.")
    offload: list[Offloaded] = []
    if _offloaded(zero.section("offload_optimizer"), "offload_optimizer") or zero.take("cpu_offload", False):
        offload.append("optimizer")
    if _offloaded(zero.section("offload_param"), "offload_param"):
        offload.append("parameters")
    if "parameters" in offload and stage != 3:
        raise ValueError(f"zero_optimization.offload_param goes with stage 3, not {stage}.")
    unused = [f"zero_optimization.{name}" for name in zero.skip(TUNING)]
    zero.close()

    half = {name: values.section(name) for name in ("bf16", "fp16")}
    enabled = [name for name, section in half.items() if section.take("enabled", False)]
    if len(enabled) == 2:
        raise ValueError("bf16.enabled and fp16.enabled are both true: choose one.")
    if half["fp16"].take("loss_scale", 0):
        raise ValueError("fp16.loss_scale must be 0, which is dynamic: tbjax has no constant scale.")
    unused += [f"fp16.{name}" for name in half["fp16"].skip(SCALING)]
    for section in half.values():
        section.close()
    precision = PRECISIONS[enabled[0] if enabled else "fp32"]

    options: dict[str, Any] = _optimizer(values.section("optimizer"), values.take("gradient_clipping", None))
    communication = values.take("communication_data_type", None)
    if communication is not None:
        if communication not in REDUCE_DTYPES:
            raise ValueError(f"communication_data_type={communication!r}: tbjax sums in {', '.join(REDUCE_DTYPES)}.")
        options["reduce_dtype"] = REDUCE_DTYPES[communication]
    microbatches = values.take("gradient_accumulation_steps", None)
    whole, part = values.take("train_batch_size", None), values.take("train_micro_batch_size_per_gpu", None)
    if part is not None and whole is None:
        unused.append("train_micro_batch_size_per_gpu")  # it is the data that says how large a batch is
    if whole is not None:
        options["batch_size"] = whole
    if whole is not None and part is not None and whole % (part * (microbatches or 1)):
        raise ValueError(
            f"train_batch_size={whole} is no multiple of train_micro_batch_size_per_gpu={part} times "
            f"gradient_accumulation_steps={microbatches or 1}."
        )
    unused += values.skip(REPORTS)
    scheduler = values.section("scheduler")
    kind = scheduler.take("type", None)
    if kind is not None or scheduler.take("params", None) is not None:
        raise ValueError(
            f"scheduler.type={kind!r}: DeepSpeed's schedules are not read. Leave `scheduler` and `optimizer` out, "
            "and say both to train_config: settings.train_config(steps, optimizer='adamw', learning_rate=3e-4, "
            "schedule='linear', warmup=100)."
        )
    values.close()
    defaults = Defaults(precision=precision, offload=tuple(offload), microbatches=microbatches)
    return DeepSpeedSettings(strategy=STAGES[stage], training_defaults=defaults, options=options, unused=tuple(unused))


def _optimizer(section: "_Reader", clip_norm: float | None) -> dict[str, Any]:
    """The optimizer's part of a TrainConfig, with what DeepSpeed takes where the config says nothing."""
    kind = section.take("type", None)
    given = section.section("params")
    section.close()
    if kind is None:
        given.close()
        return {"clip_norm": clip_norm or None}
    rate, decay = given.take("lr", 1e-3), given.take("weight_decay", 0.0)
    match str(kind).lower():
        case "adam" | "adamw":
            first, second = given.take("betas", (0.9, 0.999))
            rule = optax.adamw(rate, b1=first, b2=second, eps=given.take("eps", 1e-8), weight_decay=decay)
        case "lion":
            first, second = given.take("betas", (0.9, 0.99))
            rule = optax.lion(rate, b1=first, b2=second, weight_decay=decay)
        case "sgd":
            rule = optax.sgd(rate, momentum=given.take("momentum", 0.0) or None)
            rule = optax.chain(optax.add_decayed_weights(decay), rule) if decay else rule
        case _:
            raise ValueError(f"optimizer.type={kind!r} is unknown: tbjax knows Adam, AdamW, Lion and SGD.")
    given.close()
    whole = optax.chain(clip_by_norm(clip_norm), rule) if clip_norm else rule
    return {"optimizer": Layerwise(*optax.with_extra_args_support(whole))}


def _offloaded(section: "_Reader", name: str) -> bool:
    device = section.take("device", "none")
    if device not in ("cpu", "none", None):
        raise ValueError(f"zero_optimization.{name}.device={device!r}: tbjax offloads to the host's memory, 'cpu'.")
    section.skip(("pin_memory", "buffer_count", "buffer_size", "fast_init", "max_in_cpu"))
    section.close()
    return device == "cpu"


def _read(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not Path(config).is_file():
        raise FileNotFoundError(f"{config}: there is no such file, and a DeepSpeed config is one or a dict.")
    try:
        values = json.loads(Path(config).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise TypeError(f"{config}: a DeepSpeed config is a JSON object, not a {type(values).__name__}.")
    return values


class _Reader:
    """A JSON object of which every field must be taken."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self.values, self.path = dict(values), path

    def take(self, name: str, default: Any) -> Any:
        value = self.values.pop(name, default)
        if value == "auto":
            raise ValueError(f"{self.path}{name} is 'auto', which Hugging Face's trainer fills in: give the value.")
        return value

    def section(self, name: str) -> "_Reader":
        value = self.values.pop(name, {})
        if not isinstance(value, Mapping):
            raise TypeError(f"{self.path}{name} is {value!r}: an object is needed.")
        return _Reader(value, f"{self.path}{name}.")

    def skip(self, names: tuple[str, ...]) -> list[str]:
        """Those of the names that were given."""
        return [name for name in names if self.values.pop(name, None) is not None]

    def close(self) -> None:
        if self.values:
            name = next(iter(self.values))
            raise ValueError(f"{self.path}{name}={self.values[name]!r} is no setting of DeepSpeed's that tbjax knows.")
