"""The field's own estimates, as published: to answer in its terms, and to hold the planner against.

Each is a closed form with its source. They leave out what the planner's own arithmetic (`memory`, `cost`) has in it:
most know model states alone, and a GPT's shape. Bytes are bytes and GB are 10^9 of them, unless a name says otherwise.

The last two functions answer the questions of whoever is about to rent GPUs: how many, and with which schedule.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias

from tbjax.config import ModelConfig
from tbjax.planner.device import GB, Hardware
from tbjax.planner.flight import activations_in_flight
from tbjax.planner.hardware import hardware as named_hardware
from tbjax.planner.memory import memory
from tbjax.planner.parameters import parameters
from tbjax.planner.workload import Layout, Workload

Recompute: TypeAlias = Literal["none", "selective", "full"]

# --- ZeRO and DeepSpeed -----------------------------------------------------------------------------------------------


def zero_model_states(parameters: float, devices: int, stage: Literal[0, 1, 2, 3], optimizer_bytes: int = 12) -> float:
    """Bytes of model states on each device (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1).

    Parameters and gradients take 2 bytes each, the optimizer `optimizer_bytes`: for mixed-precision Adam a float32 copy
    of the parameters, momentum and variance. Stage 1 divides the optimizer's over the devices, stage 2 the gradients
    too, stage 3 all.
    """
    _positive(parameters=parameters, devices=devices)
    _choice("stage", stage, (0, 1, 2, 3))
    held = [(2, 3), (2, 2), (optimizer_bytes, 1)]  # bytes of each parameter, and the stage that divides them
    return sum(size * parameters / (devices if stage >= divided else 1) for size, divided in held)


class ModelStates(NamedTuple):
    """Bytes of model states: in the memory of each host, and in that of each GPU."""

    host: float
    device: float


# DeepSpeed asks for half as much host memory again as it counts, to be safe (`additional_buffer_factor`).
HOST_MARGIN = 1.5

# Hosts build the model in float32 before it goes to the GPUs, once in each GPU's process.
BUILD_BYTES = 4


def deepspeed_zero2(
    parameters: float, gpus_per_node: int = 1, nodes: int = 1, *, offload: Literal["none", "optimizer"] = "optimizer"
) -> ModelStates:
    """DeepSpeed's estimate for ZeRO-2 (`deepspeed.runtime.zero.stage_1_and_2`, since its pull request 5099).

    A GPU holds 16-bit parameters, and without offloading its share of 18 bytes: gradients in 16 and 32 bits, float32
    parameters, momentum and variance.
    """
    _positive(parameters=parameters, gpus_per_node=gpus_per_node, nodes=nodes)
    _choice("offload", offload, ("none", "optimizer"))
    gpus = gpus_per_node * nodes
    if offload == "optimizer":
        return ModelStates(parameters * max(BUILD_BYTES * gpus, 16) * HOST_MARGIN, 2 * parameters)
    building = parameters * BUILD_BYTES * gpus_per_node * HOST_MARGIN
    return ModelStates(building, 2 * parameters + 18 * parameters / gpus)


def deepspeed_zero3(
    parameters: float,
    largest_layer: float,
    gpus_per_node: int = 1,
    nodes: int = 1,
    *,
    offload: Literal["none", "optimizer", "all"] = "all",
    zero_init: bool = True,
) -> ModelStates:
    """DeepSpeed's estimate for ZeRO-3 (`deepspeed.runtime.zero.stage3`), offloading nothing, the optimizer's or all.

    A GPU gathers one layer at a time, `largest_layer` parameters at most, with 16-bit gradients. `zero_init` builds the
    model layer by layer and already divided, so that no host ever has all of it.
    """
    _positive(parameters=parameters, largest_layer=largest_layer, gpus_per_node=gpus_per_node, nodes=nodes)
    _choice("offload", offload, ("none", "optimizer", "all"))
    # Of the 18 bytes of a parameter, those that stay on the GPUs; the others are on the hosts.
    on_devices = {"none": 18, "optimizer": 2, "all": 0}[offload]
    device = 4 * largest_layer + on_devices * parameters / (gpus_per_node * nodes)
    offloaded = (18 - on_devices) * parameters / nodes
    if zero_init:
        building = BUILD_BYTES * gpus_per_node * largest_layer if offload == "none" else 0
    else:
        building = BUILD_BYTES * gpus_per_node * parameters
    return ModelStates(max(building, offloaded) * HOST_MARGIN, device)


# --- Megatron ---------------------------------------------------------------------------------------------------------


def megatron_bytes_per_parameter(data_parallel: int = 1, *, distributed_optimizer: bool = False) -> float:
    """Bytes of model states for each parameter (Megatron-LM, `megatron/training/theoretical_memory_usage.py`).

    2 for the parameter, 4 for its float32 gradient, 12 for the optimizer's float32 copy, momentum and variance; the
    distributed optimizer divides those 12 over the data-parallel ranks.
    """
    _positive(data_parallel=data_parallel)
    return 6 + 12 / (data_parallel if distributed_optimizer else 1)


def megatron_activations(
    *,
    sequence: int,
    batch: int,
    hidden: int,
    heads: int,
    layers: int,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    stages: int = 1,
    chunks: int = 1,
) -> float:
    """Bytes of activations on a device of the first stage (Korthikanti et al. 2022, arXiv:2205.05198, table 2, sec. 4).

    For a GPT in 16 bits with dropout and a microbatch of `batch`. Of a layer's 34 bytes for each element of its input,
    10 are of norms and dropouts, which tensor parallelism alone leaves whole and sequence parallelism divides; the
    `5 a s / h` are the scores of attention, which selective recomputation does away with. Full recomputation keeps
    the 2 bytes of the layer's input. The first of p stages holds p microbatches of layers / p layers, so as many bytes
    as one device with all layers; interleaving in `chunks` adds (p - 1) / (p chunks) of it.
    """
    _positive(sequence=sequence, batch=batch, hidden=hidden, heads=heads, layers=layers)
    _positive(tensor_parallel=tensor_parallel, stages=stages, chunks=chunks)
    _choice("recompute", recompute, ("none", "selective", "full"))
    scores = 5 * heads * sequence / hidden if recompute == "none" else 0.0
    whole = 10 / tensor_parallel if sequence_parallel else 10
    bytes_per_element = 2.0 if recompute == "full" else whole + (24 + scores) / tensor_parallel
    interleaving = 1 + (stages - 1) / (stages * chunks) if chunks > 1 else 1
    return sequence * batch * hidden * layers * bytes_per_element * interleaving


def narayanan_parameters(*, layers: int, hidden: int, vocabulary: int, sequence: int) -> float:
    """Parameters of a GPT with learned positions (Narayanan et al. 2021, arXiv:2104.04473, equation 2)."""
    _positive(layers=layers, hidden=hidden, vocabulary=vocabulary, sequence=sequence)
    matrices = 12 * layers * hidden**2
    return matrices * (1 + 13 / (12 * hidden) + (vocabulary + sequence) / (12 * layers * hidden))


def narayanan_flops(
    *, batch: int, sequence: int, layers: int, hidden: int, vocabulary: int, recompute: bool = True
) -> float:
    """FLOPs of a training step of a GPT (Narayanan et al. 2021, arXiv:2104.04473, equation 3; used in table 1).

    96 B s l h^2 (1 + s / 6h + V / 16 l h): forward, backward at twice its price, and, with `recompute`, forward once
    more for the layers, though not for the logits.
    """
    _positive(batch=batch, sequence=sequence, layers=layers, hidden=hidden, vocabulary=vocabulary)
    passes = 4 if recompute else 3
    per_token = layers * passes * (24 * hidden**2 + 4 * sequence * hidden) + 3 * 2 * hidden * vocabulary
    return batch * sequence * per_token


def narayanan_training_seconds(*, tokens: float, parameters: float, gpus: int, flops_per_gpu: float) -> float:
    """Seconds to train on so many tokens: 8 T P / n X (Narayanan et al. 2021, equation 4)."""
    _positive(tokens=tokens, parameters=parameters, gpus=gpus, flops_per_gpu=flops_per_gpu)
    return 8 * tokens * parameters / (gpus * flops_per_gpu)


# --- What to rent -----------------------------------------------------------------------------------------------------


def estimate_gpu_requirements(
    model: ModelConfig,
    max_sequence_length: int = 4096,
    max_batch_size: int = 1,
    quantization: Literal["none", "int8", "int8:channel", "int4"] | None = "none",
    *,
    hardware: str | Hardware = "a100-80",
) -> dict[str, Any]:
    """How many GPUs serve `model`, by the planner's own account of memory, with tensor parallelism inside a host.

    | key | |
    |---|---|
    | `num_gpus_required`, `recommended_gpus` | the fewest that hold it, of 1, 2, 4, 8, ... |
    | `min_gpus` | the fewest whose memory adds up to it, whatever divides |
    | `memory_per_gpu_gb` | what each of the required GPUs holds at the worst moment |
    | `total_memory_gb`, `weights_gb`, `kv_cache_gb` | on all of them together |
    | `tensor_parallel_size`, `pipeline_parallel_size` | how the required GPUs share it |
    | `hardware`, `gpu_memory_gb` | the GPU and what of its memory a program may hold |
    | `parameters` | of the model |
    """
    quantized = None if quantization == "none" else quantization
    _positive(max_sequence_length=max_sequence_length, max_batch_size=max_batch_size)
    kind = named_hardware(hardware) if isinstance(hardware, str) else hardware
    workload = Workload(
        task="inference",
        global_batch=max_batch_size,
        seq_len=max_sequence_length,
        precision="bfloat16",
        quantization=quantized,
    )
    alone = memory(model, workload, Layout(), kind)
    width = math.gcd(1 << (kind.devices_per_host.bit_length() - 1), model.heads, model.mlp)
    gpus = 1
    while True:
        tensor = math.gcd(gpus, width)
        if gpus // tensor > model.layers:
            raise ValueError(
                f"{max_batch_size} sequences of {max_sequence_length} do not fit on any number of {kind.title}: "
                f"one layer and its input alone need more than {kind.usable / GB:.1f} GB. A smaller max_batch_size "
                "would do."
            )
        held = memory(model, workload, Layout(tp=tensor, pp=gpus // tensor), kind)
        if held.total <= kind.usable:
            break
        gpus *= 2
    return {
        "num_gpus_required": gpus,
        "recommended_gpus": gpus,
        "min_gpus": math.ceil(alone.total / kind.usable),
        "memory_per_gpu_gb": held.total / GB,
        "total_memory_gb": gpus * held.total / GB,
        "weights_gb": alone.parts["parameters"] / GB,
        "kv_cache_gb": alone.parts["KV cache"] / GB,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": gpus // tensor,
        "hardware": kind.name,
        "gpu_memory_gb": kind.usable / GB,
        "parameters": parameters(model),
    }


def estimate_pipeline_memory(
    model_size_gb: float,
    num_stages: int,
    num_micro_batches: int,
    activation_per_microbatch_gb: float,
    *,
    chunks: int = 1,
) -> tuple[float, float]:
    """GB at the peak of a stage under GPipe, and under 1F1B (with `chunks` above 1: interleaved 1F1B).

    `activation_per_microbatch_gb` is what one microbatch leaves on one stage until its backward pass. GPipe keeps all
    microbatches; 1F1B as many as there are stages; interleaving adds (p - 1) / (p chunks) to that (Narayanan et al.
    2021, section 2.2).
    """
    _positive(model_size_gb=model_size_gb, num_stages=num_stages, num_micro_batches=num_micro_batches, chunks=chunks)
    if not activation_per_microbatch_gb >= 0:
        raise ValueError(f"activation_per_microbatch_gb={activation_per_microbatch_gb!r} must not be negative.")
    stage = model_size_gb / num_stages
    gpipe = activations_in_flight("gpipe", num_stages, num_micro_batches)
    schedule = "interleaved" if chunks > 1 else "1f1b"
    alternating = activations_in_flight(schedule, num_stages, num_micro_batches, chunks)
    return stage + gpipe * activation_per_microbatch_gb, stage + alternating * activation_per_microbatch_gb


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be a positive number.")


def _choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: it is one of {', '.join(map(repr, known))}.")
