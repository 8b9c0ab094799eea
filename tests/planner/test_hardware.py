"""Specs of clusters: what each means, that it reads back, and what the errors say of those that cannot exist."""

import dataclasses
import re
import types

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.planner import hardware as hw
from tbjax.planner.catalogue import ALIASES, RECORDS
from tbjax.planner.device import GB, GiB
from tbjax.planner.hardware import Cluster, Hardware, cluster, hardware, names, recognise, register

TPUS = [record for record in RECORDS.values() if record.torus]
GPUS = [record for record in RECORDS.values() if record.vendor == "nvidia"]


@pytest.mark.parametrize(
    ("spec", "devices", "hosts", "fast_domain"),
    [
        ("h100", 1, 1, 1),
        ("h100:8", 8, 1, 8),
        ("h100:4", 4, 1, 4),
        ("h100:16x8", 128, 16, 8),
        ("h100:2x4", 8, 2, 4),  # half of each host: the network lies between the halves
        ("h100:4x4", 16, 4, 4),
        ("gb200:18x4", 72, 18, 72),  # one rack: its NVLink crosses hosts
        ("gb200:36x4", 144, 36, 72),
        ("gb200:20x4", 80, 20, 40),  # two racks hold ten trays each
        ("gb200:23x4", 92, 23, 4),  # 23 trays cannot stand equally in more than one rack
        ("v5p:4x4x4", 64, 16, 64),
        ("v5p:2*4x4x4", 128, 16, 64),
        ("v5p", 1, 1, 1),
        ("v5e:16x16", 256, 32, 256),
        ("v5e:2x2", 4, 1, 4),
        ("v6e:4x2", 8, 1, 8),
        ("v4:4x4x8", 128, 32, 128),
        ("tpu7x:2x2x1", 8, 1, 8),  # four chips, which JAX shows as eight devices
        ("cpu:8", 8, 1, 8),
    ],
)
def test_a_spec_names_so_many_devices_on_so_many_hosts(spec: str, devices: int, hosts: int, fast_domain: int):
    found = cluster(spec)
    assert (found.devices, found.hosts, found.fast_domain) == (devices, hosts, fast_domain)
    assert cluster(str(found)) == found
    assert cluster(found) is found


def test_a_spec_may_be_written_with_capitals_spaces_and_other_names():
    assert cluster(" A100-80GB:8 ") == cluster("a100:8") == cluster("a100-80:8")
    assert str(cluster("Trillium:2x4")) == "v6e:2x4"
    assert all(alias not in RECORDS and target in RECORDS for alias, target in ALIASES.items())


@given(st.sampled_from([record for record in RECORDS.values() if not record.torus]), st.integers(1, 5000), st.data())
def test_every_switched_cluster_reads_back_and_shares_out_evenly(record: Hardware, hosts: int, data: st.DataObject):
    built = Cluster(hardware=record, hosts=hosts, devices_per_host=data.draw(st.integers(1, record.devices_per_host)))
    assert cluster(str(built)) == built
    assert built.devices % built.fast_domain == 0
    assert built.fast_domain <= record.domain
    if record.domain <= record.devices_per_host:
        assert built.fast_domain == built.devices_per_host


@pytest.mark.parametrize("record", TPUS, ids=lambda record: record.name)
def test_every_slice_that_an_error_would_offer_exists(record: Hardware):
    for shape in hw._slices(record):
        built = cluster(f"{record.name}:{hw.spell(shape)}")
        assert built.devices == built.hosts * built.devices_per_host <= record.domain
        assert cluster(str(built)) == built


def test_a_domain_smaller_than_a_host_is_what_is_joined():
    bridged = dataclasses.replace(hardware("h100-pcie"), name="bridged", domain=2)
    assert [Cluster(hardware=bridged, devices_per_host=count).fast_domain for count in (1, 2, 3, 8)] == [1, 2, 1, 2]
    assert Cluster(hardware=bridged, hosts=4, devices_per_host=8).fast_domain == 2


def test_a_torus_wraps_where_optical_switches_or_a_whole_pod_close_it():
    # https://jax-ml.github.io/scaling-book/tpus, "TPU Networking": a 2x2x4 has none, a v5e 8x16 wraps on its long side.
    assert cluster("v5p:4x4x8").wraps == (True, True, True)
    assert cluster("v5p:2x2x4").wraps == (False, False, False)
    assert cluster("v5p:2x4x4").wraps == (False, False, False)
    assert cluster("v5e:8x16").wraps == (False, True)
    assert cluster("v5e:16x16").wraps == (True, True)
    assert cluster("v5e:8x8").wraps == (False, False)
    assert cluster("h100:8").wraps == ()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("h1000:8", r"hardware 'h1000' is unknown\. Did you mean 'h100'"),
        ("abacus", r"'abacus' is unknown\. tbjax knows .*h100.*v5p.*register\(\)"),
        ("h100:64", r"h100 hosts have 8 devices each, not 64\. 64 devices are h100:8x8"),
        ("b200:2x9", r"b200 hosts have 8 devices each, not 9\. Write b200:HOSTSxDEVICES with at most 8"),
        ("gb200:72", r"gb200 hosts have 4 devices each, not 72\. 72 devices are gb200:18x4"),
        ("h100:0", r"'0' must be whole numbers above zero"),
        ("h100:-8", r"'-8' must be whole numbers above zero"),
        ("h100:2.5", r"'2\.5' must be whole numbers above zero"),
        ("h100:8x", r"'8x' must be whole numbers above zero"),
        ("h100:²", r"must be whole numbers above zero"),
        ("v5p:0*4x4x4", r"'0' must be whole numbers above zero"),
        ("h100:", r"'h100:' is not a cluster: write a name and a count"),
        (":8", r"is not a cluster"),
        ("", r"is not a cluster"),
        ("h100:2*8", r"h100 is written h100:DEVICES or h100:HOSTSxDEVICES"),
        ("h100:4x4x4", r"h100 is written h100:DEVICES or h100:HOSTSxDEVICES"),
        ("v5p:64", r"v5p is a 3-D torus.*64 chips are v5p:4x4x4"),
        ("v5p:17", r"v5p is a 3-D torus.*It has .*2x4x4, and AxBxC of multiples of 4 up to 6144 chips"),
        ("v5e:4x4x4", r"v5e is a 2-D torus.*64 chips are v5e:8x8"),
        ("v5p:3x3x3", r"v5p has no slice 3x3x3\. It has 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC"),
        ("v5p:4x4x6", r"v5p has no slice 4x4x6"),
        ("v5p:16x20x28", r"v5p has no slice 16x20x28.*up to 6144 chips"),  # the pod, more than the largest slice
        ("v5e:4x16", r"v5e has no slice 4x16\. It has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16\."),
        ("v6e:16x32", r"v6e has no slice 16x32"),
    ],
)
def test_what_cannot_exist_is_named_with_what_can(spec: str, says: str):
    with pytest.raises(ValueError, match=says):
        cluster(spec)


def test_a_spec_that_is_no_string_is_named():
    with pytest.raises(ValueError, match="hardware=8 is not a cluster"):
        cluster(8)  # pyright: ignore


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"hosts": 0}, "Cluster.hosts must be a positive integer, not 0"),
        ({"hosts": 2.0}, "Cluster.hosts must be a positive integer, not 2.0"),
        ({"devices_per_host": True}, "devices_per_host must be a positive integer, not True"),
        ({"slices": 2}, "h100 has hosts, not slices"),
        ({"topology": (4, 4)}, "h100 devices are joined by a switch"),
    ],
)
def test_a_cluster_built_by_hand_is_checked(figures: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        Cluster(hardware=hardware("h100"), **figures)  # type: ignore[arg-type]


def test_a_tpu_cluster_built_by_hand_must_agree_with_its_topology():
    v5p = hardware("v5p")
    with pytest.raises(ValueError, match="needs its topology"):
        Cluster(hardware=v5p, hosts=16, devices_per_host=4)
    with pytest.raises(ValueError, match="has 16 hosts with 4 devices each, not 8 with 8"):
        Cluster(hardware=v5p, hosts=8, devices_per_host=8, topology=(4, 4, 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory": 0}, "Hardware.memory must be a positive integer, not 0"),
        ({"memory_bandwidth": 0.0}, "Hardware.memory_bandwidth must be positive bytes per second"),
        ({"host_link": float("nan")}, "Hardware.host_link must be positive"),
        ({"reserved": 200 * GiB}, "Hardware.reserved=.* must lie below memory"),
        ({"flops": {"float32": 1e12}}, "must give positive FLOP/s for float32 and bfloat16"),
        ({"flops": {"float32": 1e12, "bfloat16": -1.0}}, "must give positive FLOP/s"),
        ({"torus": 1}, "Hardware.torus=1 must be 0"),
        ({"vendor": "acme"}, "Hardware.vendor='acme' is unknown"),
        ({"name": "my gpu:2"}, "cannot stand in a spec"),
        ({"link_latency": -1.0}, "Hardware.link_latency must be seconds"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(change: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(hardware("h100"), **change)


def test_a_record_of_ones_own_is_known_once_registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hw, "_registered", {})
    mine = dataclasses.replace(hardware("h100"), name="Mine", device_kinds=("My GPU",))
    assert str(Cluster(hardware=mine, devices_per_host=2)) == "Mine:2"
    with pytest.raises(ValueError, match="'mine' is unknown"):
        cluster("mine:2")
    assert register(mine) is mine
    assert cluster("mine:2").hardware is mine
    assert recognise("My GPU") is mine
    assert "mine" in names()
    for taken in ("h100", "a100", "auto"):
        with pytest.raises(ValueError, match="is in the catalogue"):
            register(dataclasses.replace(mine, name=taken))


def test_a_slice_says_what_its_compiler_must_be_asked_for():
    assert cluster("v5p:2*4x4x4").libtpu_topology == {"topology_name": "v5p:4x4x4"}
    assert cluster("v4:2x2x1").libtpu_topology == {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"}
    assert cluster("v5e").libtpu_topology == {"topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
    with pytest.raises(ValueError, match="h100:8 has no TPU topology"):
        _ = cluster("h100:8").libtpu_topology


# --- The machine at hand ----------------------------------------------------------------------------------------------


def _device(kind: str, **place: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform="gpu", device_kind=kind, **place)


def test_auto_is_the_machine_at_hand():
    found = cluster("auto")
    assert found.hardware.name == "cpu"
    assert found.devices == len(jax.devices())
    assert 0 < found.hardware.memory * found.devices <= found.hardware.host_memory


def test_gpus_at_hand_are_recognised_by_their_kind(monkeypatch: pytest.MonkeyPatch):
    devices = [_device("NVIDIA H100 80GB HBM3", process_index=host) for host in (0, 1) for _ in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert str(cluster("auto")) == "h100:2x8"


def test_tpus_at_hand_are_recognised_with_their_topology(monkeypatch: pytest.MonkeyPatch):
    devices = [
        _device("TPU v5", process_index=0, coords=(x, y, z), slice_index=part)
        for part in range(2)
        for x in range(2)
        for y in range(2)
        for z in range(1)
    ]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert str(cluster("auto")) == "v5p:2*2x2x1"


def test_processes_with_unequal_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    devices = [_device("NVIDIA H100 80GB HBM3", process_index=host) for host in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match=r"the processes at hand have \[1, 2\] devices"):
        cluster("auto")


def test_an_unknown_device_at_hand_says_how_to_describe_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "devices", lambda: [_device("Abacus 3000", process_index=0)])
    with pytest.raises(ValueError, match=r"'Abacus 3000' is not in the catalogue\. Describe it with .*Hardware\("):
        cluster("auto")


# --- The records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: record.name)
def test_every_record_can_be_hashed_and_every_figure_has_a_source(record: Hardware):
    assert {record: 1}[record] == 1
    if record.vendor != "cpu":
        told = ("flops", "memory", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_link")
        told += ("host_memory", "link_latency", "network_latency", "reserved")
        assert all(record.sources.get(figure) for figure in told)
    assert record.devices_per_host % record.devices_per_chip == 0
    assert record.domain % record.devices_per_host == 0 or record.devices_per_host % record.domain == 0


def test_no_two_records_are_called_alike_by_jax():
    kinds = [kind for record in RECORDS.values() for kind in record.device_kinds]
    assert len(kinds) == len(set(kinds))


# What libtpu 0.0.42 says when a program needs more: "exceeds available HBM (30.75G)".
@pytest.mark.parametrize(
    ("name", "gibibytes"), [("v4", 30.75), ("v5e", 15.75), ("v5p", 95.74), ("v6e", 31.25), ("tpu7x", 94.75)]
)
def test_a_tpu_has_the_memory_that_its_compiler_grants(name: str, gibibytes: float):
    assert hardware(name).usable / GiB == pytest.approx(gibibytes, abs=1e-6)


# Dense bfloat16 TFLOP/s, GB/s of memory and GB/s into the switch, as commonly quoted.
@pytest.mark.parametrize(
    ("name", "teraflops", "memory_bandwidth", "link"),
    [
        ("a100-40", 312, 1555, 300),
        ("a100-80", 312, 2039, 300),
        ("h100", 989, 3352, 450),
        ("h200", 989, 4800, 450),
        ("b200", 2250, 7672, 900),
        ("gb200", 2500, 7928, 900),
    ],
)
def test_the_usual_figures_of_gpus(name: str, teraflops: float, memory_bandwidth: float, link: float):
    record = hardware(name)
    assert record.flops["bfloat16"] / 1e12 == pytest.approx(teraflops, rel=1e-3)
    assert record.memory_bandwidth / GB == pytest.approx(memory_bandwidth, rel=1e-3)
    assert record.link_bandwidth / GB == link


@pytest.mark.parametrize("record", GPUS, ids=lambda record: record.name)
def test_a_gpu_record_tells_the_compiler_what_it_must_know(record: Hardware):
    target = record.target
    assert target["device_memory_size"] == record.memory
    assert target["memory_bandwidth"] == record.memory_bandwidth
    assert target["name"] in record.device_kinds
    # Float32 units x 2 x clock is the datasheet's rate outside the tensor cores.
    rate = target["core_count"] * target["fpus_per_core"] * 2 * target["clock_rate_ghz"] * 1e9  # type: ignore[operator]
    assert rate == pytest.approx(record.flops.get("float32_exact", record.flops["float32"]), rel=0.03)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5p-128", "64 chips, whose topology it does not say: write v5p:4x4x4."),
        ("v5litepod-16", "16 chips, whose topology it does not say: write v5e:4x4."),
        ("v5p-4096", "v5p:8x16x16"),
        ("v5p-1", "cores there, 2 to a chip"),
        ("v5p-10", "5 chips, whose topology it does not say: "),
    ],
)
def test_the_names_of_google_cloud_are_told_as_topologies(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        cluster(name)
