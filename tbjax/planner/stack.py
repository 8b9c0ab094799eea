"""How a program uses a device: the constants of the cost model, each with its meaning.

The first eight belong to the devices and to the libraries under every program (cuBLAS, NCCL, the memory). They are
fitted by `benchmarks/calibrate.py`, all at once, to the training runs on A100s that the vTrain authors measured, and
tested on hidden sizes left out of the fit. A ninth (`SUSTAINED`) carries them over to newer GPUs. The rest describe a
program and are read off its source or chosen, not fitted.
"""

import dataclasses
from collections.abc import Mapping

from tbjax.planner.device import Hardware
from tbjax.planner.work import Attention

# What large products reach of the datasheet's FLOP/s, relative to the A100 of the fit: Hopper does not hold its boost
# clock at its power limit. Fitted to Llama-2-7B on eight H100s (JAX-Toolbox, measured_runs.csv) and held against the
# other H100 runs there. For Blackwell nothing is published that would tell; it is taken to be like Hopper.
SUSTAINED: Mapping[str, float] = {"h100": 0.85, "h200": 0.85, "b200": 0.85, "gb200": 0.85}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A program, as far as its speed depends on it."""

    # Of every program. Fitted.
    matmul_fraction: float  # of peak FLOP/s, that a very large product reaches
    matmul_half: float  # elements of columns or inner dimension at which a product takes twice the time of its FLOPs
    memory_fraction: float  # of memory bandwidth, that memory-bound kernels reach
    link_fraction: float  # of the fast domain's bandwidth, that large collectives reach
    network_fraction: float  # of the network's
    collective_start: float  # seconds that a collective takes besides its bytes and steps: launch, protocol, waiting
    kernel_gap: float  # seconds of each kernel in which the device fills and drains
    host_per_kernel: float  # seconds in which the host prepares a kernel; 0: it has done so once, for all steps

    # Of this program.
    attention: Attention
    overlap: float  # of the arithmetic's time, what FSDP's and the gradients' collectives can hide behind
    logit_bytes: float  # that the loss reads and writes for each logit, forwards and backwards
    accumulate_bytes: float  # that adding a microbatch's gradient to the others' moves for each parameter
    prunes: bool  # whether recomputation leaves out what the backward pass does not ask for
    defers: bool  # whether the gradients of all microbatches are summed over the devices at once, in the end
    moves_tables: bool  # whether, with sequence parallelism, the vocabulary's table is brought to the tokens


def sustained(hardware: Hardware) -> float:
    """See `SUSTAINED`."""
    return SUSTAINED.get(hardware.name, 1.0)


# Megatron-LM and Megatron-DeepSpeed before flash attention: eager kernels, collectives that nothing hides.
MEGATRON_2021 = Stack(
    matmul_fraction=0.81,
    matmul_half=143,
    memory_fraction=0.76,
    link_fraction=0.81,
    network_fraction=0.81,
    collective_start=35.6e-6,
    kernel_gap=8.2e-6,
    host_per_kernel=50.5e-6,
    attention="materialised",
    overlap=0.0,
    # Its cross entropy over a cut vocabulary: logits to float32 (2 + 4), their maximum (4), subtracted (8),
    # exponentials (8), their sum (4), normalised (8); backwards copied and scaled (16), back to float16 (4 + 2).
    logit_bytes=60,
    accumulate_bytes=10,  # the gradient read, a float32 sum read and written
    prunes=False,
    defers=True,
    moves_tables=False,
)

# Since Korthikanti et al. 2022 the product that makes a weight's gradient adds it to the sum itself.
MEGATRON_2022 = dataclasses.replace(MEGATRON_2021, accumulate_bytes=0)

XLA = dataclasses.replace(
    MEGATRON_2021,
    # Programs are launched whole; NCCL's own base latency (src/graph/tuning.cc, baseLat of the simple protocol).
    host_per_kernel=0.0,
    kernel_gap=2e-6,
    collective_start=8.4e-6,
    attention="fused",
    overlap=0.9,
    logit_bytes=24,  # float32 logits written, read for the maximum, for the sum and backwards; the gradient in and out
    prunes=True,
    defers=False,
    moves_tables=True,
)
