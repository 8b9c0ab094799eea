"""The tables of `benchmarks.scaling` and `benchmarks.depth`: their arithmetic, what is kept, and the drawing."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import depth, scaling
from benchmarks.scaling import CURVES, MODELS, Case, Compiled, efficiencies, point
from benchmarks.scaling_plot import TARGET, plot
from tbjax.planner.compilers import compiler_for, installed
from tbjax.planner.hlo import collective
from tbjax.planner.memory import memory
from tbjax.planner.workload import Layout
from tbjax.planning import model_config
from tbjax.sharding import ShardingStrategy

GIB = 1 << 30
KEPT = scaling.kept()
SVG = "{http://www.w3.org/2000/svg}"


def compiled(hosts: int, layout: Layout, **figures: int) -> Compiled:
    """A case of a small model, as if a compiler had said so."""
    kinds = {"argument": 2, "output": 2, "alias": 1, "temp": 3, "peak": 5} | figures
    return Compiled(
        case=Case("smollm2-135m", f"h100:{hosts}x8", 1, 512),
        layout=layout,
        place=1,
        jax="0.10.2",
        cycles=0,
        untold=0,
        seconds=1.5,
        collectives=(
            collective("all-gather", ("fsdp",), 4, 800, layout.mesh),
            collective("reduce-scatter", ("fsdp",), 4, 80, layout.mesh),
            collective("all-reduce", ("dp", "fsdp"), 1, 160, layout.mesh),
            collective("all-reduce", (), 1, 4, layout.mesh),
        ),
        **{name: size * GIB for name, size in kinds.items()},
    )


CASES = [compiled(hosts, Layout(dp=hosts, fsdp=8)) for hosts in (1, 2, 4)]
CURVE = [point(one.case, {one.case: one}) for one in CASES]


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_summed_by_axes() -> None:
    assert CASES[1].sent == {"fsdp": 700 + 70, "dp+fsdp": 2 * 150}


def test_a_gpu_must_hold_its_arguments_its_temporaries_and_what_results_beside_them() -> None:
    assert CASES[0].total == (2 + 2 - 1 + 3) * GIB
    assert CASES[0].fits
    assert not compiled(1, Layout(fsdp=8), temp=80).fits


def test_efficiency_is_throughput_per_device_beside_that_of_the_smallest_cluster() -> None:
    shares = efficiencies(CURVE)
    assert shares[0] == 1
    for one, share in zip(CURVE, shares, strict=True):
        assert share == pytest.approx(CURVE[0].time.total / one.time.total)


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    layout = Layout(
        fsdp=16, tp=4, microbatches=4, sequence_parallel=True, remat="dots", strategy=ShardingStrategy.SHARD_GRAD_OP
    )
    found = [*CASES, compiled(8, layout)]
    scaling.keep(found, tmp_path / "kept.csv")
    assert list(scaling.kept(tmp_path / "kept.csv").values()) == found
    measured = {
        ("h100:8x8", 4): [depth.Seconds(3.5, 4.0), depth.Seconds(3.0, 9.0)],
        ("h100:8x8", 80): [depth.Seconds(3.6, 5.0)],
    }
    depth.keep(measured, tmp_path / "depth.csv")
    assert depth.kept(tmp_path / "depth.csv") == measured
    assert depth.ratio(measured, "h100:8x8") == pytest.approx((1.2, 1.25))


@pytest.mark.parametrize("case", KEPT, ids=lambda case: f"{case.model} {case.cluster}")
def test_what_was_compiled_fits_and_is_what_the_planner_said_of_it(case: Case) -> None:
    found = KEPT[case]
    assert found.fits
    assert found.layout.devices == case.where.devices
    predicted = memory(model_config(case.model)[0], case.workload, found.layout, case.where.hardware).total
    assert predicted == pytest.approx(found.total, rel=0.03)
    assert found.sent.total() > 0


def test_every_model_was_compiled_for_both_vendors() -> None:
    assert set(MODELS) <= set(KEPT)
    assert {case.where.hardware.vendor for case in MODELS} == {"nvidia", "google"}


@pytest.mark.parametrize("title", CURVES)
def test_efficiency_stays_above_the_target_up_to_thousands_of_devices(title: str) -> None:
    # What was not compiled is planned here, which takes a second for a cluster: the largest is enough.
    curve = [point(case, KEPT) for case in CURVES[title] if case in KEPT or case == CURVES[title][-1]]
    assert curve[0].devices == 64
    assert curve[-1].devices >= 4096
    assert min(efficiencies(curve)) > TARGET


@pytest.mark.parametrize("case", depth.CASES, ids=lambda case: case.cluster)
def test_the_time_to_compile_hardly_grew_with_depth(case: Case) -> None:
    assert depth.ratio(depth.kept(), case.cluster).processor <= depth.RATIO


# --- Drawing ----------------------------------------------------------------------------------------------------------


def test_the_drawing_has_every_point_with_its_figure() -> None:
    planned = CURVE[1]._replace(compiled=None)
    root = ET.fromstring(plot({"H100": CURVE, "others": [CURVE[0], planned], "nobody": []}))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert "H100, 32 devices: 6.0 GiB" in titles
    lines = list(root.iter(f"{SVG}polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 2, 3, 1, 3, 1]
    assert len(titles) == 3 + 2 + 3 + 1 + 3 + 1
    text = " ".join(part for part in root.itertext())
    assert "target 80%" in text
    assert "nobody" not in text
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for mark in root.iter(f"{SVG}circle"):
        assert 0 < float(mark.attrib["cx"]) < width
        assert 0 < float(mark.attrib["cy"]) < height


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="compile something"):
        plot({"H100": [CURVE[0]._replace(compiled=None)]})


# --- Compiling anew, slowly -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", depth.CASES, ids=lambda case: case.cluster)
def test_twenty_times_the_layers_compile_in_about_the_same_time(case: Case) -> None:
    if not installed(compiler_for(case.where)):
        pytest.skip("its compiler is not installed: tbjax[verify]")
    plan = case.plan()
    assert plan.config.layers == 80
    shallow, deep = (depth.measure(plan, layers).processor for layers in depth.DEPTHS)
    # One measurement of each on a machine that does other things: a program without the scan would take 20 times.
    assert deep <= 1.6 * shallow
    assert math.isfinite(shallow)
