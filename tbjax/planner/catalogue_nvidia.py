"""NVIDIA's GPUs, every figure with where it stands.

Peak rates are dense: datasheets often print the rate with 2:4 sparsity, twice as high. `memory` is what the driver
reports, which is below the number on the box. CUDA's context, cuBLAS's and cuDNN's workspaces and NCCL's buffers lie
outside what JAX allocates; the share left to JAX is the user's to set, and `JAX_SHARE` is what is planned for.

The figures of `target` are those that XLA's compiler reads about a GPU (`GpuDeviceInfoProto`). For most devices they
are published in openxla/xla under `xla/backends/gpu/target_config/specs/`; for the others they follow from the compute
capability (CUDA C++ Programming Guide, "Compute Capabilities") and NVIDIA's architecture whitepapers.
"""

import dataclasses

from tbjax.planner.device import GB, MICROSECOND, TB, TFLOPS, GiB, Hardware, MiB, gigabits

# XLA_CLIENT_MEM_FRACTION as MaxText's benchmarks on H100 set it (AI-Hypercomputer/maxtext,
# src/maxtext/inference/mlperf/gpu/benchmarks_llama2-70b-h100_8.sh); JAX's default of 0.75 leaves a quarter unused.
JAX_SHARE = 0.94

# NCCL's own model of a ring step with the Simple protocol: NVIDIA/nccl, src/graph/tuning.cc, `hwLat`.
NVLINK_LATENCY = 3.4 * MICROSECOND
PCIE_LATENCY = 5.7 * MICROSECOND
NETWORK_LATENCY = 9.6 * MICROSECOND

# One way, 16 lanes: 2^-3 bytes x 16 x 8, 16, 32 or 64 GT/s with 128b/130b coding (PCI-SIG base specifications 3 to 6).
PCIE_3 = 15.75 * GB
PCIE_4 = 31.5 * GB
PCIE_5 = 63.0 * GB

_XLA = "openxla/xla xla/backends/gpu/target_config/specs/"
NCCL_SOURCE = "NVIDIA/nccl src/graph/tuning.cc"


def _gpu(
    *,
    memory: int,
    memory_bandwidth: float,
    device_kinds: tuple[str, ...],
    capability: tuple[int, int],
    cores: int,
    clock: float,
    l2: int,
    sheet: str,
    network: str,
    xla: str | None = None,
    **figures: object,
) -> Hardware:
    """An NVIDIA record: what all of them have in common, and the compiler's figures from the compute capability."""
    return Hardware(
        vendor="nvidia",
        memory=memory,
        memory_bandwidth=memory_bandwidth,
        device_kinds=device_kinds,
        reserved=memory - int(memory * JAX_SHARE),
        network_latency=NETWORK_LATENCY,
        target={
            "name": device_kinds[0],
            "major": capability[0],
            "minor": capability[1],
            "core_count": cores,
            "clock_rate_ghz": clock,
            "l2_cache_size": l2,
            "device_memory_size": memory,
            "memory_bandwidth": int(memory_bandwidth),
            **_SM[capability],
            **_EVERY_SM,
        },
        sources={
            "flops": sheet,
            "memory": f"{_XLA}{xla}.txtpb" if xla else sheet,
            "memory_bandwidth": sheet,
            "link_bandwidth": sheet,
            "host_link": sheet,
            "network_bandwidth": network,
            "host_memory": network,
            "link_latency": NCCL_SOURCE,
            "network_latency": NCCL_SOURCE,
            "reserved": "1 - JAX_SHARE of the memory",
            "target": f"{_XLA}{xla}.txtpb" if xla else f"{sheet}; CUDA C++ Programming Guide, Compute Capabilities",
        },
        **figures,  # type: ignore[arg-type]
    )


# What is the same on every GPU that XLA supports.
_EVERY_SM: dict[str, int | float | str] = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


def _sm(threads: int, shared: int, optin: int, fpus: int, extension: str = "NONE") -> dict[str, int | float | str]:
    return {
        "threads_per_core_limit": threads,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": optin,
        "fpus_per_core": fpus,
        "feature_extension": extension,
    }


# By compute capability: threads and bytes of shared memory of a multiprocessor, bytes that one block may opt into.
_SM = {
    (7, 0): _sm(2048, 98304, 98304, 64),
    (8, 0): _sm(2048, 167936, 166912, 64),
    (8, 6): _sm(1536, 102400, 101376, 128),
    (8, 9): _sm(1536, 102400, 101376, 128),
    (9, 0): _sm(2048, 233472, 232448, 128, "ACCELERATED_FEATURES"),
    (10, 0): _sm(2048, 233472, 232448, 128, "ACCELERATED_FEATURES"),
}

_HOPPER_FLOPS = {  # H100 SXM and H200: NVIDIA H100 Tensor Core GPU datasheet, halved where it prints sparse rates
    "float32": 494.7 * TFLOPS,
    "float32_exact": 66.9 * TFLOPS,
    "bfloat16": 989.4 * TFLOPS,
    "float16": 989.4 * TFLOPS,
    "float8": 1978.9 * TFLOPS,
    "int8": 1978.9 * TFLOPS,
}
_AMPERE_FLOPS = {  # NVIDIA A100 Tensor Core GPU datasheet
    "float32": 156 * TFLOPS,
    "float32_exact": 19.5 * TFLOPS,
    "bfloat16": 312 * TFLOPS,
    "float16": 312 * TFLOPS,
    "int8": 624 * TFLOPS,
    "int4": 1248 * TFLOPS,
}

_DGX_A100 = "NVIDIA DGX A100 datasheet: 8 x 200 Gb/s HDR InfiniBand for compute"
_DGX_H100 = "NVIDIA DGX H100 datasheet: 8 x 400 Gb/s ConnectX-7, 2 TB of host memory"

_V100_16 = _gpu(
    name="v100-16",
    title="NVIDIA V100 SXM2 16 GB",
    memory=16935682048,
    memory_bandwidth=898 * GB,
    flops={"float32": 15.7 * TFLOPS, "bfloat16": 15.7 * TFLOPS, "float16": 125 * TFLOPS},  # no bfloat16 units
    domain=8,
    devices_per_host=8,
    link_bandwidth=150 * GB,  # six links; a DGX-1 joins its eight GPUs in a cube mesh rather than a switch
    link_latency=NVLINK_LATENCY,
    network_bandwidth=gigabits(4 * 100) / 8,
    host_link=PCIE_3,
    host_memory=512 * GiB,
    device_kinds=("Tesla V100-SXM2-16GB",),
    capability=(7, 0),
    cores=80,
    clock=1.53,
    l2=6291456,
    sheet="NVIDIA V100 Tensor Core GPU datasheet",
    network="NVIDIA DGX-1 with V100 datasheet: 4 x 100 Gb/s InfiniBand, 512 GB of host memory",
    xla="v100",
)
_V100_32 = dataclasses.replace(
    _V100_16,
    name="v100-32",
    title="NVIDIA V100 SXM2 32 GB",
    memory=2 * _V100_16.memory,
    reserved=2 * _V100_16.reserved,
    device_kinds=("Tesla V100-SXM2-32GB",),
    target={**_V100_16.target, "name": "Tesla V100-SXM2-32GB", "device_memory_size": 2 * _V100_16.memory},
)

GPUS: tuple[Hardware, ...] = (
    _V100_16,
    _V100_32,
    _gpu(
        name="a100-40",
        title="NVIDIA A100 SXM 40 GB",
        memory=42331013120,
        memory_bandwidth=1555 * GB,
        flops=_AMPERE_FLOPS,
        domain=8,
        devices_per_host=8,
        link_bandwidth=300 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(200),
        host_link=PCIE_4,
        host_memory=1 * TB,
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        capability=(8, 0),
        cores=108,
        clock=1.41,
        l2=41943040,
        sheet="NVIDIA A100 Tensor Core GPU datasheet",
        network=f"{_DGX_A100}, 1 TB of host memory beside 320 GB of GPU memory",
        xla="a100_sxm_40",
    ),
    _gpu(
        name="a100-80",
        title="NVIDIA A100 SXM 80 GB",
        memory=85100068864,
        memory_bandwidth=2039 * GB,
        flops=_AMPERE_FLOPS,
        domain=8,
        devices_per_host=8,
        link_bandwidth=300 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(200),
        host_link=PCIE_4,
        host_memory=2 * TB,
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        capability=(8, 0),
        cores=108,
        clock=1.41,
        l2=41943040,
        sheet="NVIDIA A100 Tensor Core GPU datasheet",
        network=f"{_DGX_A100}, 2 TB of host memory",
        xla="a100_sxm_80",
    ),
    _gpu(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        memory=84942979072,
        memory_bandwidth=3352 * GB,
        flops=_HOPPER_FLOPS,
        domain=8,
        devices_per_host=8,
        link_bandwidth=450 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(400),
        host_link=PCIE_5,
        host_memory=2 * TB,
        device_kinds=("NVIDIA H100 80GB HBM3",),
        capability=(9, 0),
        cores=132,
        clock=1.98,
        l2=52428800,
        sheet="NVIDIA H100 Tensor Core GPU datasheet",
        network=_DGX_H100,
        xla="h100_sxm",
    ),
    _gpu(
        name="h100-pcie",
        title="NVIDIA H100 PCIe 80 GB",
        memory=84942979072,
        memory_bandwidth=2039 * GB,
        flops={
            "float32": 378 * TFLOPS,
            "float32_exact": 51.2 * TFLOPS,
            "bfloat16": 756 * TFLOPS,
            "float16": 756 * TFLOPS,
            "float8": 1513 * TFLOPS,
            "int8": 1513 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=PCIE_5,  # NVLink bridges join pairs only, so the domain of a host is its PCIe switches
        link_latency=PCIE_LATENCY,
        network_bandwidth=gigabits(100),
        host_link=PCIE_5,
        host_memory=1 * TB,
        device_kinds=("NVIDIA H100 PCIe",),
        capability=(9, 0),
        cores=114,
        clock=1.755,
        l2=52428800,
        sheet="NVIDIA H100 PCIe product brief PB-11133",
        network="nominal, as hosts differ: 100 Gb/s for each GPU, 1 TB",
        xla="h100_pcie",
    ),
    _gpu(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        memory=151397597184,
        memory_bandwidth=4800 * GB,
        flops=_HOPPER_FLOPS,
        domain=8,
        devices_per_host=8,
        link_bandwidth=450 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(400),
        host_link=PCIE_5,
        host_memory=2 * TB,
        device_kinds=("NVIDIA H200",),
        capability=(9, 0),
        cores=132,
        clock=1.98,
        l2=52428800,
        sheet="NVIDIA H200 Tensor Core GPU datasheet",
        network="NVIDIA DGX H200 datasheet: 8 x 400 Gb/s ConnectX-7, 2 TB of host memory",
        xla="h200",
    ),
    _gpu(
        name="b200",
        title="NVIDIA B200 SXM 180 GB",
        memory=191514411008,
        memory_bandwidth=7672 * GB,
        flops={
            "float32": 1.125e3 * TFLOPS,
            "float32_exact": 75 * TFLOPS,
            "bfloat16": 2.25e3 * TFLOPS,
            "float16": 2.25e3 * TFLOPS,
            "float8": 4.5e3 * TFLOPS,
            "int8": 4.5e3 * TFLOPS,
            "float4": 9e3 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=900 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(400),
        host_link=PCIE_5,
        host_memory=2 * TB,
        device_kinds=("NVIDIA B200",),
        capability=(10, 0),
        cores=148,
        clock=1.965,
        l2=132644864,
        sheet="NVIDIA DGX B200 datasheet, a device's eighth",
        network="NVIDIA DGX B200 datasheet: 8 x 400 Gb/s ConnectX-7, 2 TB of host memory",
        xla="b200",
    ),
    _gpu(
        name="gb200",
        title="NVIDIA GB200 NVL72 186 GB",
        memory=197897748480,
        memory_bandwidth=7928 * GB,
        flops={
            "float32": 1.25e3 * TFLOPS,
            "float32_exact": 80 * TFLOPS,
            "bfloat16": 2.5e3 * TFLOPS,
            "float16": 2.5e3 * TFLOPS,
            "float8": 5e3 * TFLOPS,
            "int8": 5e3 * TFLOPS,
            "float4": 10e3 * TFLOPS,
        },
        domain=72,  # 18 compute trays of four GPUs behind one NVLink switch
        devices_per_host=4,
        link_bandwidth=900 * GB,
        link_latency=NVLINK_LATENCY,
        network_bandwidth=gigabits(400),
        host_link=225 * GB,  # NVLink-C2C, 450 GB/s one way for the two GPUs of a Grace CPU
        host_memory=2 * 480 * GB,
        device_kinds=("NVIDIA GB200",),
        capability=(10, 0),
        cores=152,
        clock=2.062,
        l2=135528448,
        sheet="NVIDIA GB200 NVL72 datasheet, a device's share of 72",
        network="NVIDIA GB200 NVL72 datasheet: four 400 Gb/s ConnectX-7 and two Grace CPUs of 480 GB in a tray",
        xla="gb200",
    ),
    _gpu(
        name="l4",
        title="NVIDIA L4 24 GB",
        memory=int(22.03 * GiB),  # as PyTorch reports it, with error correction on: ArcInstitute/evo2 issue 190
        memory_bandwidth=300 * GB,
        flops={
            "float32": 60 * TFLOPS,
            "float32_exact": 30.3 * TFLOPS,
            "bfloat16": 121 * TFLOPS,
            "float16": 121 * TFLOPS,
            "float8": 242.5 * TFLOPS,
            "int8": 242.5 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=PCIE_4,
        link_latency=PCIE_LATENCY,
        network_bandwidth=gigabits(100) / 8,
        host_link=PCIE_4,
        host_memory=384 * GiB,
        device_kinds=("NVIDIA L4",),
        capability=(8, 9),
        cores=58,
        clock=2.04,
        l2=48 * MiB,
        sheet="NVIDIA L4 datasheet",
        network="Google Cloud g2-standard-96: 8 GPUs, 100 Gb/s, 384 GiB",
    ),
    _gpu(
        name="l40s",
        title="NVIDIA L40S 48 GB",
        memory=int(44.42 * GiB),  # as PyTorch reports it: stepfun-ai/Step-Video-T2V issue 8
        memory_bandwidth=864 * GB,
        flops={
            "float32": 183 * TFLOPS,
            "float32_exact": 91.6 * TFLOPS,
            "bfloat16": 362 * TFLOPS,
            "float16": 362 * TFLOPS,
            "float8": 733 * TFLOPS,
            "int8": 733 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=PCIE_4,
        link_latency=PCIE_LATENCY,
        network_bandwidth=gigabits(400) / 8,
        host_link=PCIE_4,
        host_memory=1536 * GiB,
        device_kinds=("NVIDIA L40S",),
        capability=(8, 9),
        cores=142,
        clock=2.52,
        l2=96 * MiB,
        sheet="NVIDIA L40S datasheet",
        network="AWS g6e.48xlarge: 8 GPUs, 400 Gb/s, 1536 GiB",
    ),
    _gpu(
        name="a10g",
        title="NVIDIA A10G 24 GB",
        memory=int(22.03 * GiB),  # the L4's, which has as much GDDR6 with the same error correction
        memory_bandwidth=600 * GB,
        flops={
            "float32": 35 * TFLOPS,
            "float32_exact": 35 * TFLOPS,
            "bfloat16": 70 * TFLOPS,
            "float16": 70 * TFLOPS,
            "int8": 140 * TFLOPS,
            "int4": 280 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=PCIE_4,
        link_latency=PCIE_LATENCY,
        network_bandwidth=gigabits(100) / 8,
        host_link=PCIE_4,
        host_memory=768 * GiB,
        device_kinds=("NVIDIA A10G",),
        capability=(8, 6),
        cores=80,
        clock=1.71,
        l2=6 * MiB,
        sheet="NVIDIA A10G datasheet for AWS G5",
        network="AWS g5.48xlarge: 8 GPUs, 100 Gb/s, 768 GiB",
    ),
    _gpu(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090 24 GB",
        memory=int(23.64 * GiB),  # as PyTorch reports it: 3DTopia/Phidias-Diffusion issue 8
        memory_bandwidth=1008 * GB,
        flops={
            "float32": 82.6 * TFLOPS,
            "float32_exact": 82.6 * TFLOPS,
            "bfloat16": 165.2 * TFLOPS,
            "float16": 165.2 * TFLOPS,
            "float8": 330.3 * TFLOPS,  # accumulating in float32
            "int8": 660.6 * TFLOPS,
        },
        domain=8,
        devices_per_host=8,
        link_bandwidth=PCIE_4 / 2,  # no peer-to-peer copies: every byte crosses PCIe to the host and back
        link_latency=PCIE_LATENCY,
        network_bandwidth=gigabits(10),
        host_link=PCIE_4,
        host_memory=256 * GiB,
        device_kinds=("NVIDIA GeForce RTX 4090",),
        capability=(8, 9),
        cores=128,
        clock=2.52,
        l2=72 * MiB,
        sheet="NVIDIA Ada GPU architecture whitepaper, appendix A",
        network="nominal, as workstations differ: 10 Gb/s Ethernet for each GPU, 256 GiB",
    ),
)
