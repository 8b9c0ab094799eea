"""The devices that can be bought or rented, by name, and a nominal CPU."""

from tbjax.planner.catalogue_google import TPUS
from tbjax.planner.catalogue_nvidia import GPUS
from tbjax.planner.device import GB, MICROSECOND, TFLOPS, GiB, Hardware

# To plan for where nothing better is at hand, and to try plans on virtual devices. Processors differ too much for a
# record: these figures are round numbers of the right size for one virtual device, a core or two of a server.
_CPU = Hardware(
    name="cpu",
    title="CPU (virtual devices)",
    vendor="cpu",
    memory=16 * GiB,
    memory_bandwidth=20 * GB,
    flops={"float32": 0.1 * TFLOPS, "bfloat16": 0.05 * TFLOPS},
    domain=1024,
    devices_per_host=1024,
    link_bandwidth=5 * GB,
    network_bandwidth=1 * GB,
    host_link=20 * GB,
    host_memory=1024 * 16 * GiB,
    link_latency=10 * MICROSECOND,
    network_latency=50 * MICROSECOND,
    device_kinds=("cpu",),
    sources={"all": "nominal; cluster('auto') counts the memory of the machine at hand"},
)

RECORDS: dict[str, Hardware] = {record.name: record for record in (*GPUS, *TPUS, _CPU)}

# Other spellings, and the usual choice where a name has several.
ALIASES: dict[str, str] = {
    "a100": "a100-80",
    "a100-40gb": "a100-40",
    "a100-80gb": "a100-80",
    "v100": "v100-32",
    "h100-sxm": "h100",
    "h100-80": "h100",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "v5litepod": "v5e",
    "trillium": "v6e",
    "ironwood": "tpu7x",
    "v7x": "tpu7x",
    "7x": "tpu7x",
    "tpu-v4": "v4",
    "tpu-v5e": "v5e",
    "tpu-v5p": "v5p",
    "tpu-v6e": "v6e",
}
