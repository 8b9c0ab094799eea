"""The timeline's pictures show every task where it runs, and stand on their own."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given

from tbjax.pipeline.picture import coloured, describe, svg, text
from tbjax.pipeline.schedule import ZBH1, ZBV, ForwardOnly, GPipe, Interleaved1F1B, OneFOneB
from tbjax.pipeline.simulate import Times, simulate
from tests.pipeline.cases import simulations

UNIT = Times(forward=1, backward_input=1, backward_weight=1)
SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture):
    """Every task's box, by what its tooltip says."""
    root = ElementTree.fromstring(picture)
    found = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found[title.text.split(",")[0]] = rect
    return found


@given(simulations())
def test_the_svg_has_every_task_in_its_row_and_inside_the_picture(case):
    timeline = simulate(*case)
    picture = svg(timeline)
    root = ElementTree.fromstring(picture)
    _, _, width, height = map(float, root.get("viewBox").split())
    found = boxes(picture)
    assert len(found) == sum(map(len, timeline.tasks))
    for stage, row in enumerate(timeline.tasks):
        rects = [found[f"stage {stage}: {placed.task}"] for placed in row]
        assert len({rect.get("y") for rect in rects}) == 1
        edges = [float(rect.get("x")) for rect in rects]
        assert edges == sorted(edges)
        for rect in rects:
            assert float(rect.get("x")) >= 0
            assert float(rect.get("x")) + float(rect.get("width")) <= width + 0.2
            assert float(rect.get("y")) + float(rect.get("height")) <= height


def test_the_svg_is_to_scale():
    found = boxes(svg(simulate(OneFOneB(), 2, 2, UNIT), width=963))
    # Nine units of time over 900 pixels: (2 + 2 - 1) of three.
    forward, backward = (
        found["stage 0: forward of microbatch 0 (chunk 0)"],
        found["stage 0: backward of microbatch 1 (chunk 0)"],
    )
    assert float(forward.get("width")) == pytest.approx(100 - 0.5)
    assert float(backward.get("width")) == pytest.approx(200 - 0.5)
    assert float(backward.get("x")) - float(forward.get("x")) == pytest.approx(700)


def test_numbers_stand_only_where_they_fit():
    roomy = svg(simulate(GPipe(), 2, 4, UNIT))
    assert len(re.findall('class="number"', roomy)) == 16
    tight = svg(simulate(GPipe(), 2, 400, UNIT))
    assert 'class="number"' not in tight


def test_the_svg_needs_nothing_else_and_says_what_it_shows():
    picture = svg(simulate(ZBV(), 3, 6, UNIT))
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in picture
    assert "currentColor" in picture
    assert "var(--pipeline-forward," in picture
    root = ElementTree.fromstring(picture)
    assert root.get("role") == "img"
    assert root.get("aria-label") == describe(simulate(ZBV(), 3, 6, UNIT))
    assert "zb-v: 3 stages, 6 microbatches, total 18, bubble 0.00%" in root.get("aria-label")
    assert "stage 2 from 1 to 19, busy for 18 of it" in root.get("aria-label")


def test_large_pictures_do_without_tooltips():
    large = svg(simulate(ZBH1(), 16, 128, UNIT))
    assert "<title>" not in large
    assert len(large) < 1_000_000
    ElementTree.fromstring(large)


def test_text_shows_tasks_and_waiting():
    # Nine units of time over 27 columns after the stage's number.
    assert text(simulate(OneFOneB(), 2, 2, UNIT), width=2 + 27).split("\n") == [
        "0 F0 F1 ······B0    ···B1    ",
        "1    F0 B0    F1 B1          ",
    ]


@given(simulations())
def test_text_lines_are_as_wide_as_asked(case):
    timeline = simulate(*case)
    lines = text(timeline, width=80).split("\n")
    assert [len(line) for line in lines] == [80] * timeline.stages
    assert coloured(timeline, width=80).plain == "\n".join(lines)


def test_odd_chunks_have_small_letters():
    picture = text(simulate(Interleaved1F1B(2), 2, 2, UNIT), width=100)
    assert set(re.findall("[A-Za-z]", picture)) == set("FfBb")
    assert set(re.findall("[A-Za-z]", text(simulate(ForwardOnly(), 2, 2, UNIT)))) == {"F"}
