"""Google's TPUs, every figure with where it stands.

`memory` and `reserved` are measured: libtpu 0.0.42 refuses a program that needs more than 30.75 GiB on v4, 15.75 on
v5e, 95.74 on v5p, 31.25 on v6e and 94.75 on each half of a TPU7x chip ("exceeds available HBM").
"""

from tbjax.planner.catalogue_nvidia import NCCL_SOURCE, NETWORK_LATENCY
from tbjax.planner.device import GB, MICROSECOND, TFLOPS, GiB, Hardware, Shape, gigabits

# Hop over an ICI link, and data-centre network: https://jax-ml.github.io/scaling-book/tpus, question 5; the network's
# is NCCL's, for want of a published one.
ICI_LATENCY = 1.0 * MICROSECOND
# The scaling book: "typically around 1.5e10 bytes/second per chip", and 32 GB/s on v6e. TPU7x has nothing published.
PCIE = 15.0 * GB
PCIE_V6E = 32.0 * GB

# One way and link: the scaling book's table, about 90 % of the line rate in Google's documentation (a chip's 1200 GB/s
# in both directions of six links are 100 GB/s).
ICI_50 = 45.0 * GB
ICI_100 = 90.0 * GB

# Each cell of a matrix unit (128 x 128, from v6e on 256 x 256) multiplies and adds once a cycle. With eight such units
# on v4 and v5p and four on v5e, v6e and each half of TPU7x, the peaks below are those of these clocks. NeuSim
# (https://github.com/platformxlab/NeuSim, configs/chips) has 1.05 for v4, 1.7 for v5p and 1.75 for v6e. libtpu's own
# estimate for a product of two 8192 x 8192 matrices is, at these, 93 % of the peak on v4, 88 % on v5e, 90 % on v5p
# and 70 % on v6e.
GHZ = 1e9

_BOOK = "https://jax-ml.github.io/scaling-book/tpus"
_TPU = "https://docs.cloud.google.com/tpu/docs/"

# Slices below a cube (https://docs.cloud.google.com/tpu/docs/v5p and /v4, tables of configurations), and a lone chip.
_BELOW_A_CUBE: tuple[Shape, ...] = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# https://docs.cloud.google.com/tpu/docs/v5e and /v6e, tables of 2-D slice shapes.
_PLANES: tuple[Shape, ...] = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _tpu(*, page: str, host_link: float = PCIE, **figures: object) -> Hardware:
    document = f"{_TPU}{page}"
    return Hardware(
        vendor="google",
        link_latency=ICI_LATENCY,
        network_latency=NETWORK_LATENCY,
        host_link=host_link,
        sources={
            "flops": document,
            "memory": f"{document}; libtpu 0.0.42",
            "memory_bandwidth": document,
            "link_bandwidth": f"{_BOOK}, interconnect table",
            "link_latency": f"{_BOOK}, question 5",
            "network_bandwidth": document,
            "network_latency": NCCL_SOURCE,
            "host_link": _BOOK,
            "clock": "from the peak: see catalogue_google.py; NeuSim, configs/chips",
            "host_memory": document,
            "reserved": "libtpu 0.0.42, the memory beyond which it refuses a program",
            "shapes": document,
        },
        **figures,  # type: ignore[arg-type]
    )


TPUS: tuple[Hardware, ...] = (
    _tpu(
        name="v4",
        title="Google TPU v4",
        memory=32 * GiB,
        reserved=int(1.25 * GiB),
        memory_bandwidth=1200 * GB,
        flops={"float32": 275 * TFLOPS, "bfloat16": 275 * TFLOPS, "int8": 275 * TFLOPS},
        clock=1.05 * GHZ,
        domain=4096,
        devices_per_host=4,
        torus=3,
        shapes=_BELOW_A_CUBE,
        link_bandwidth=ICI_50,
        network_bandwidth=gigabits(200) / 4,  # the scaling book: about 25 GB/s for each host
        host_memory=407 * GB,
        device_kinds=("TPU v4",),
        target={"chip_config_name": "megacore"},  # two cores as one device, which is how JAX runs v4
        page="v4",
    ),
    _tpu(
        name="v5e",
        title="Google TPU v5e",
        memory=16 * GiB,
        reserved=GiB // 4,
        memory_bandwidth=819 * GB,
        flops={"float32": 197 * TFLOPS, "bfloat16": 197 * TFLOPS, "int8": 393 * TFLOPS},
        clock=1.5 * GHZ,
        domain=256,
        devices_per_host=8,
        torus=2,
        shapes=_PLANES,
        link_bandwidth=ICI_50,
        network_bandwidth=gigabits(2 * 100) / 8,
        host_memory=512 * GiB,
        device_kinds=("TPU v5 lite", "TPU v5e"),
        page="v5e",
    ),
    _tpu(
        name="v5p",
        title="Google TPU v5p",
        memory=96 * GiB,
        reserved=96 * GiB - int(95.74 * GiB),
        memory_bandwidth=2765 * GB,
        flops={"float32": 459 * TFLOPS, "bfloat16": 459 * TFLOPS, "int8": 918 * TFLOPS},
        clock=1.75 * GHZ,
        domain=6144,  # the largest slice that can be had, of a pod of 8960
        devices_per_host=4,
        torus=3,
        shapes=_BELOW_A_CUBE,
        link_bandwidth=ICI_100,
        network_bandwidth=gigabits(50),
        host_memory=448 * GB,
        device_kinds=("TPU v5", "TPU v5p"),
        page="v5p",
    ),
    _tpu(
        name="v6e",
        title="Google TPU v6e (Trillium)",
        memory=32 * GiB,
        reserved=3 * GiB // 4,
        memory_bandwidth=1638 * GB,
        flops={"float32": 918 * TFLOPS, "bfloat16": 918 * TFLOPS, "int8": 1836 * TFLOPS},
        clock=1.75 * GHZ,
        domain=256,
        devices_per_host=8,
        torus=2,
        shapes=_PLANES,
        link_bandwidth=ICI_100,
        network_bandwidth=gigabits(4 * 200) / 8,
        host_link=PCIE_V6E,
        host_memory=1536 * GiB,
        device_kinds=("TPU v6 lite", "TPU v6e"),
        page="v6e",
    ),
    _tpu(
        name="tpu7x",
        title="Google TPU7x (Ironwood)",
        # JAX shows each of a chip's two cores as a device, so all of these are half of the chip's.
        devices_per_chip=2,
        memory=96 * GiB,
        reserved=int(1.25 * GiB),
        memory_bandwidth=7380 * GB / 2,
        flops={"float32": 1153.5 * TFLOPS, "bfloat16": 1153.5 * TFLOPS, "float8": 2307 * TFLOPS},
        clock=2.2 * GHZ,
        domain=2 * 9216,
        devices_per_host=8,
        torus=3,
        shapes=_BELOW_A_CUBE,
        link_bandwidth=ICI_100 / 2,
        network_bandwidth=gigabits(100) / 2,
        host_link=PCIE_V6E / 2,  # no less than its predecessor's
        host_memory=960 * GB,
        device_kinds=("TPU7x",),
        page="tpu7x",
    ),
)
