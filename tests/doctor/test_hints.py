"""What the figures say: each trouble is named, and a healthy machine is left in peace."""

import dataclasses

import pytest

from tbjax.doctor.hints import WHEN_A_RUN_FAILS, hints
from tbjax.doctor.links import Link
from tbjax.doctor.machine import Machine, count_tpus, examine
from tbjax.training import config

HEALTHY = Machine(
    versions={},
    python="3.11",
    host="node0",
    processors=64,
    memory=10**12,
    memory_available=9 * 10**11,
    shared_memory=10**10,
    open_files=65536,
    platform="gpu",
    device_kind="NVIDIA H100 80GB HBM3",
    devices=16,
    local_devices=8,
    processes=2,
    device_memory=6 * 10**10,
    device_memory_used=0,
    gpus_of_the_host=8,
    tpus_of_the_host=0,
    variables={},
)
FAST = Link(
    axis="tp",
    devices=8,
    collective="all-reduce",
    nbytes=10**8,
    seconds=1e-3,
    gb_per_second=400.0,
    crosses_hosts=False,
    right=True,
)


def test_a_healthy_machine_has_nothing_to_look_into():
    across = dataclasses.replace(FAST, axis="dp", gb_per_second=45.0, crosses_hosts=True)
    assert hints(HEALTHY, [FAST, across]) == []
    asked_for = {"platform": "cpu", "gpus_of_the_host": 0, "variables": {"JAX_PLATFORMS": "cpu"}}
    plugins = {"jax-cuda12-plugin": "0.10.2", "libtpu": "0.0.30"}
    assert hints(dataclasses.replace(HEALTHY, **asked_for, versions=plugins), []) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"platform": "cpu", "device_kind": "cpu"}, "8 NVIDIA GPUs, but JAX runs on the CPU"),
        (
            {"platform": "cpu", "gpus_of_the_host": 0, "tpus_of_the_host": 4},
            "4 TPU chips, but JAX runs on the CPU: pip install 'tbjax[tpu]'",
        ),
        (
            {"platform": "cpu", "gpus_of_the_host": 0, "versions": {"jax-cuda12-plugin": "0.10.2"}},
            "jax-cuda12-plugin is installed, but the host shows no NVIDIA GPU",
        ),
        (
            {"platform": "cpu", "gpus_of_the_host": 0, "versions": {"libtpu": "0.0.30"}},
            "libtpu is installed, but the host shows no TPU",
        ),
        (
            {"platform": "cpu", "gpus_of_the_host": 0, "tpus_of_the_host": 4, "versions": {"libtpu": "0.0.30"}},
            "is another process using them",
        ),
        ({"variables": {"https_proxy": "http://a"}}, "https_proxy: processes may look for each other"),
        ({"variables": {"NCCL_TIMEOUT": "1800"}}, "NCCL_TIMEOUT is read by PyTorch alone"),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE=1"),
        ({"variables": {"NCCL_IB_DISABLE": "1"}}, "NCCL_IB_DISABLE=1"),
        ({"variables": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}}, "MEM_FRACTION=0.5"),
        ({"device_memory_used": 2 * 10**10}, "20.0 of 60.0 GB of a device are taken"),
        ({"shared_memory": 64 * 10**6}, "/dev/shm has 64 MB"),
        ({"open_files": 1024}, "only 1024 files"),
        ({"memory_available": 10**10}, "10.0 of 1000.0 GB of the host's memory"),
    ],
)
def test_a_trouble_is_named(change, words):
    (hint,) = hints(dataclasses.replace(HEALTHY, **change), [FAST])
    assert words in hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"right": False}, "all-reduce along tp gave a wrong result"),
        ({"gb_per_second": 40.0}, "all-reduce along tp reaches 40 GB/s where the links have"),
        ({"axis": "dp", "crosses_hosts": True, "gb_per_second": 2.0}, "is RDMA on"),
        ({"crosses_hosts": True, "gb_per_second": 45.0}, "tp crosses hosts"),
    ],
)
def test_a_link_that_is_broken_or_slow_is_named(change, words):
    (hint,) = hints(HEALTHY, [dataclasses.replace(FAST, **change)])
    assert words in hint


def test_this_machine_is_examined():
    machine = examine()
    assert machine.versions["jax"]
    assert (machine.platform, machine.devices, machine.processes) == ("cpu", 8, 1)
    assert 0 < machine.memory_available <= machine.memory


def test_the_failures_of_the_seeds_have_an_answer_that_exists():
    text = " ".join(WHEN_A_RUN_FAILS)
    assert all(
        word in text for word in ("timeout", "hang", "out of memory, forward", "out of memory, backward", "slow")
    )
    fields = {field.name for field in dataclasses.fields(config.TrainConfig)}
    assert {"step_timeout", "remat", "microbatches", "offload"} <= fields


def test_the_tpus_of_a_host_are_counted_where_no_runtime_sees_them(tmp_path):
    # Two chips of a v5e, the network card of a Google machine, and somebody else's device.
    cards = [("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042"), ("0x10de", "0x0063")]
    for number, (vendor, device) in enumerate(cards):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "device").write_text(f"{device}\n")
    (tmp_path / "4").mkdir()  # one that says nothing
    assert count_tpus(tmp_path) == 2
    assert count_tpus(tmp_path / "nowhere") == 0
