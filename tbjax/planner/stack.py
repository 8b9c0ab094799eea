"""How a program uses a device: the constants of the cost model, each with its meaning.

The first eight are properties of the devices and of the libraries under every program (cuBLAS, NCCL, the memory); they
are fitted by `benchmarks/calibrate.py` to the training runs that the vTrain authors measured on A100s, all at once, and
tested on hidden sizes left out of the fit. The others describe a program, and are counted from its source.
"""

import dataclasses
from typing import Literal

from tbjax.planner.work import Attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A program, as far as its speed depends on it."""

    # Of every program. Fitted.
    matmul_fraction: float  # of peak FLOP/s, that a very large product reaches
    matmul_half: float  # a dimension of this many elements takes twice the time that its FLOPs ask for
    memory_fraction: float  # of memory bandwidth, that memory-bound kernels reach
    link_fraction: float  # of the fast domain's bandwidth, that large collectives reach
    network_fraction: float  # of the network's
    collective_start: float  # seconds that a collective takes besides its bytes and steps: launch, protocol, waiting
    kernel_gap: float  # seconds of each kernel in which the device fills and drains
    host_per_kernel: float  # seconds in which the host prepares a kernel; 0: it does so once, for all

    # Of this program.
    attention: Attention
    dtype: Literal["float16", "bfloat16"]  # of products
    overlap: float  # of the arithmetic's time, what FSDP's and the gradients' collectives can hide behind
    logit_bytes: float  # that the loss reads and writes for each logit, forwards and backwards
    prunes: bool  # whether recomputation leaves out what the backward pass does not ask for


MEGATRON_2021 = Stack(
    matmul_fraction=0.79,
    matmul_half=138,
    memory_fraction=0.76,
    link_fraction=0.79,
    network_fraction=0.78,
    collective_start=35e-6,
    kernel_gap=6.4e-6,
    host_per_kernel=54e-6,
    attention="materialised",
    dtype="float16",
    overlap=0.0,
    logit_bytes=60,
    prunes=False,
)

XLA = dataclasses.replace(
    MEGATRON_2021,
    host_per_kernel=0.0,
    attention="fused",
    dtype="bfloat16",
    overlap=0.8,
    logit_bytes=24,
    prunes=True,
)
