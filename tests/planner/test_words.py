import dataclasses

import pytest

from tbjax.planner import words
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.workload import Layout
from tests.planner import plans


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (0, "0.0 GiB"),
        (100, "0.1 KiB"),
        (10 * 2**10, "10.0 KiB"),
        (50 * 2**20, "50.0 MiB"),
        (2**29, "512 MiB"),
        (80 * 2**30, "80.0 GiB"),
        (1500 * 2**30, "1,500 GiB"),
    ],
)
def test_bytes_are_written_in_gib_or_where_they_are_fewer_in_what_is_less(count, written):
    assert words.gib(count) == written


@pytest.mark.parametrize(
    ("time", "written"),
    [
        (0, "0 s"),
        (2e-9, "2.00 ns"),
        (1.5e-5, "15.0 µs"),
        (0.0123, "12.3 ms"),
        (0.9996, "1.00 s"),
        (12.34, "12.3 s"),
        (257.2, "257 s"),
        (86400, "86,400 s"),
    ],
)
def test_times_have_three_digits_and_a_fitting_unit(time, written):
    assert words.seconds(time) == written


@pytest.mark.parametrize(
    ("number", "written"), [(0, "0"), (999, "999"), (1000, "1.00K"), (68_976_648_192, "69.0B"), (999.9e9, "1.00T")]
)
def test_large_counts_have_three_digits_and_a_letter(number, written):
    assert words.short_count(number) == written


def test_a_share_of_nothing_is_not_a_number():
    assert words.share(1, 4) == "25.0 %"
    assert words.share(0, 0) == "-"


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("saved activations", "Saved activations"),
        ("KV cache", "KV cache"),
        ("adamw", "AdamW"),
        ("optimizer", "Optimizer state"),
    ],
)
def test_parts_have_titles_with_the_usual_abbreviations(key, title):
    assert words.title(key) == title


def test_a_part_of_time_is_not_mistaken_for_a_part_of_memory():
    assert words.time_title("optimizer") == "Optimizer update"
    assert words.time_title("attention") == "Attention"


@pytest.mark.parametrize(
    ("spec", "layout", "axis", "said"),
    [
        ("h100:8x8", Layout(fsdp=8, tp=8), "tp", "inside a node"),
        ("h100:8x8", Layout(fsdp=8, tp=8), "fsdp", "across nodes"),
        ("h100:8x8", Layout(fsdp=32, tp=2), "fsdp", "4 inside a node, 8 ways across nodes"),
        ("gb200:36x4", Layout(fsdp=2, tp=72), "tp", "inside a fast domain of 72 GPUs"),
        ("gb200:36x4", Layout(fsdp=2, tp=72), "fsdp", "across domains"),
        ("v5p:4x4x4", Layout(fsdp=16, tp=4), "fsdp", "along y and z of the torus"),
        ("v5p:4x4x4", Layout(fsdp=32, tp=2), "tp", "along part of x of the torus"),
        ("v5p:4x4x4", Layout(fsdp=32, tp=2), "fsdp", "along y, z and part of x of the torus"),
        ("v5p:2*4x4x4", Layout(dp=2, fsdp=64), "dp", "across slices"),
        ("v5p:2*4x4x4", Layout(fsdp=128), "fsdp", "64 along x, y and z of the torus, 2 ways across slices"),
        ("tpu7x:4x4x4", Layout(fsdp=64, tp=2), "tp", "over the two devices of a chip"),
    ],
)
def test_where_an_axis_lies_is_said_in_the_words_of_the_hardware(spec, layout, axis, said):
    assert words.lies(axis, layout, cluster(spec)) == said


def test_a_node_whose_devices_are_not_all_joined_is_not_called_fast():
    pairs = dataclasses.replace(cluster("h100:8").hardware, name="pairs", domain=2)
    where = Cluster(hardware=pairs, devices_per_host=8)
    assert words.lies("tp", Layout(tp=8), where) == "inside the node, 2 of it on a fast link"
    assert words.lies("fsdp", Layout(fsdp=4, tp=2), where) == "inside the node, none of it on a fast link"
    assert words.lies("tp", Layout(fsdp=4, tp=2), where) == "inside a node"


def test_the_verdict_gives_the_margin_either_way():
    fits, too_large = plans.PLANS["64 GPUs"](), plans.PLANS["does not fit"]()
    limit = fits.cluster.hardware.usable
    assert words.gib(limit - fits.memory.total) in words.verdict(fits)
    assert words.verdict(fits).startswith("✓ Fits")
    assert words.gib(too_large.memory.total - limit) in words.verdict(too_large)
    assert words.verdict(too_large).startswith("✗ Does not fit")


def test_options_name_only_what_was_opted_for():
    assert words.options(Layout(remat="none")) == "plain"
    layout = Layout(pp=2, remat="full", microbatches=4, schedule="interleaved", chunks=2, offload=("optimizer",))
    assert words.options(layout) == "remat full, 4 microbatches, interleaved 1F1B, 2 chunks, optimizer offloaded"
