"""`tbjax pipeline` on the command line."""

import json

import pytest
from typer.testing import CliRunner

from tbjax.cli import app
from tbjax.pipeline.schedule import NAMED, named
from tbjax.pipeline.simulate import Times, simulate


def run(*arguments):
    return CliRunner().invoke(app, ["pipeline", *map(str, arguments)])


def figures(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_figures():
    measured = ("--forward", 18.522, "--backward-input", 18.086, "--backward-weight", 9.337, "--comm", 0.601)
    found = figures("--schedule", "zb-h1", "--stages", 8, "--microbatches", 24, *measured)
    timeline = simulate(
        named("zb-h1"), 8, 24, Times(forward=18.522, backward_input=18.086, backward_weight=9.337, communication=0.601)
    )
    assert found == {
        "schedule": "zb-h1",
        "stages": 8,
        "microbatches": 24,
        "chunks": 1,
        "total": timeline.total,
        "makespan": timeline.makespan,
        "bubble_rate": timeline.bubble_rate,
        "peak_activations": [8.0] * 8,
        "wraps": "first",
    }


@pytest.mark.parametrize("schedule", [*NAMED, "auto"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (4, 4), (4, 8)])
def test_every_schedule_can_be_asked_for(schedule, stages, microbatches):
    found = figures("--schedule", schedule, "--stages", stages, "--microbatches", microbatches, "--comm", 0.1)
    assert len(found["peak_activations"]) == stages
    assert 0 <= found["bubble_rate"] < 1
    assert found["total"] > 0
    if stages == 1:
        assert found["bubble_rate"] == pytest.approx(0, abs=1e-12)


def test_interleaved_is_as_published_unless_asked_otherwise():
    """The row of the 6.2B model with 24 microbatches."""
    measured = ("--forward", 29.718, "--backward-input", 29.444, "--backward-weight", 19.927, "--comm", 0.527)
    asked = ("--schedule", "interleaved", "--chunks", 4, "--stages", 8, "--microbatches", 24, *measured)
    published, strict = figures(*asked), figures(*asked, "--wraps", "all")
    assert round(published["bubble_rate"], 4) == 0.0808
    assert (published["wraps"], strict["wraps"]) == ("first", "all")
    assert f"(--wraps all): total {strict['total']:.6g}, bubble {strict['bubble_rate']:.2%}" in run(*asked).output
    assert strict["total"] - published["total"] == pytest.approx(8 * 0.527)


def test_times_may_differ_by_stage():
    slow = figures("--stages", 3, "--forward", "1,9,1", "--backward-input", "1,9,1")
    assert slow["total"] > 8 * 19
    assert slow["bubble_rate"] > 0.5


def test_the_picture_is_written_and_shown(tmp_path):
    result = run("--schedule", "1f1b", "--stages", 4, "--microbatches", 8, "--svg", tmp_path / "out.svg")
    assert result.exit_code == 0
    assert (tmp_path / "out.svg").read_text().startswith("<svg")
    assert "1f1b: 4 stages, 8 microbatches, total 33, bubble 27.27%" in result.output
    assert "activations held, by stage: 4, 3, 2, 1" in result.output
    assert "wrote" in result.output
    assert "F0" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--schedule", "interleaved", "--microbatches", 6), "microbatches=6 is not a multiple of stages=4; 4 or 8"),
        (("--forward", "fast"), "--forward fast: give one number"),
        (("--forward", "-1"), "Times.forward=-1.0: times are finite numbers, zero or more"),
        (("--comm", "nan"), "Times.communication=nan"),
        (("--forward", "1,2,3"), "Times.forward has 3 figures: give one, or 4 for stages=4"),
        (("--schedule", "gpipe", "--chunks", 3), "chunks=3: the gpipe schedule has 1 a stage"),
        (("--schedule", "auto", "--chunks", 3), "--chunks 3: the auto schedule has one chunk a stage"),
        (("--memory", 3), "--memory 3 is for the auto schedule"),
        (("--svg", "/nowhere/out.svg"), "No such file or directory"),
    ],
)
def test_what_is_wrong_is_one_paragraph_and_exit_code_1(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


@pytest.mark.parametrize(
    "arguments", [("--stages", 0), ("--microbatches", 0), ("--schedule", "fastest"), ("--weight-activations", 2)]
)
def test_what_cannot_be_understood_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2
