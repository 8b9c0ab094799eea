"""The page: whole, self-contained, escaped; and in a real browser nothing clipped, overlapping, pale or complained of.

What a browser finds wrong is found by `examine.js`, which has tests of its own here: pages that are wrong on purpose.
"""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tbjax.planner import compared, words
from tbjax.planner.page import RUNNERS_UP, fragment, page
from tests.planner import browser, plans

EXAMINATION = Path(__file__).with_name("examine.js").read_text(encoding="utf-8")

SIZES = {"phone": (390, 844), "laptop": (1280, 900)}

# Elements without an end tag.
VOID = {"meta", "br", "hr"}


class Reader(HTMLParser):
    """The elements and text of a page; raises where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def having(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


@pytest.fixture(scope="module", params=plans.PLANS)
def plan(request):
    return plans.PLANS[request.param]()


@pytest.fixture(scope="module")
def shown(plan):
    return Reader(page(plan, plans.verification(plan)))


def test_what_would_do_stands_once_where_nothing_fits(plan, shown):
    assert bool(plan.remedy) is not plan.fits
    assert [shown.text.count(sentence) for sentence in plan.remedy] == [1] * len(plan.remedy)


def test_every_number_of_the_plan_is_on_its_page(plan, shown):
    numbers = [words.gib(size) for size in plan.memory.parts.values()]
    numbers += [words.seconds(size) for size in plan.time.parts.values() if size]
    for contender in (plan, *plan.candidates[:RUNNERS_UP]):
        numbers += [words.gib(contender.memory.total), words.seconds(contender.time.total)]
    numbers += [words.count(plan.tokens_per_second), words.share(plan.mfu, 1), words.gib(plan.cluster.hardware.usable)]
    numbers += [f"{rejection.reason}" for rejection in plan.rejected]
    if not plan.workload.training:
        numbers += [words.seconds(plan.time.prefill), words.seconds(plan.time.decode)]
    assert [number for number in numbers if number not in shown.text] == []


def test_the_page_says_all_that_the_plan_explains(plan, shown):
    assert [line for line in plan.explain().splitlines() if line not in shown.text] == []


def test_a_verification_stands_beside_its_prediction(plan, shown):
    verification = plans.verification(plan)
    assert compared.verdict(verification) in shown.text
    cells = [cell for row in compared.memory(plan, verification) for cell in row]
    cells += [cell for row in compared.collectives(verification) for cell in row]
    assert [cell for cell in cells if cell not in shown.text] == []


def test_without_a_verification_the_page_does_not_speak_of_one(plan):
    assert "compiler" not in Reader(page(plan)).text


def test_the_plans_own_verification_is_shown_unless_another_is_given():
    plan = plans.PLANS["64 GPUs"]()
    verified = dataclasses.replace(plan, verification=plans.verification(plan))
    assert page(verified) == page(plan, verified.verification)


def test_the_page_asks_for_nothing_outside_itself(plan):
    text = page(plan, plans.verification(plan))
    read = Reader(text)
    tags = {tag for tag, _ in read.elements}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "image", "use", "a", "form"})
    assert not any(read.having(name) for name in ("src", "href", "xlink:href", "srcset", "action", "onload", "onclick"))
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)) + "".join(read.having("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "@font-face" not in styles
    assert "default-src 'none'; style-src 'unsafe-inline'" in read.having("content")


def test_every_picture_has_a_text_alternative(shown):
    pictures = [attributes for tag, attributes in shown.elements if tag == "svg" or attributes.get("role") == "img"]
    assert pictures
    assert all((attributes.get("aria-label") or "").strip() for attributes in pictures)


def test_names_are_escaped():
    plan = plans.PLANS["strange name"]()
    for text in (page(plan), fragment(plan)):
        assert "<script" not in text
        assert plan.model in Reader(text).text


def test_a_plan_without_runners_up_or_rejections_has_a_page():
    plan = dataclasses.replace(plans.PLANS["64 GPUs"](), candidates=(), rejected=())
    text = Reader(page(plan)).text
    assert "runners-up" not in text
    assert "Why not otherwise" not in text


def test_thousands_of_nodes_are_drawn_as_a_few_and_counted():
    text = Reader(page(plans.PLANS["16384 GPUs"]())).text
    drawn = re.findall(r"Node ([\d,]+)", text)
    hidden = [int(number) for number in re.findall(r"and (\d+) more between", text)]
    assert drawn[0] == "0"
    assert drawn[-1] == "2,047"
    per_stage = 2048 // 16
    stages = re.findall(r"Stage (\d+) of 16", text)
    assert len(drawn) + sum(hidden) == per_stage * len(stages)
    assert len(page(plans.PLANS["16384 GPUs"]())) < 1_000_000


@pytest.mark.parametrize("name", ["16384 GPUs", "cpu"])
def test_a_pipeline_has_its_timeline(name):
    plan = plans.PLANS[name]()
    assert f"{plan.layout.pp} stages" in Reader(page(plan)).text
    assert 'class="pipeline-timeline"' in page(plan)


def test_a_long_pipeline_is_drawn_with_fewer_microbatches_and_says_so():
    assert "Drawn with 32 of the 64 microbatches" in page(plans.PLANS["16384 GPUs"]())
    assert "Drawn with" not in page(plans.PLANS["cpu"]())


def test_a_plan_without_a_pipeline_has_no_timeline():
    assert "pipeline-timeline" not in page(plans.PLANS["64 GPUs"]()).split("</style>", 1)[1]


# The fragment.


def test_a_fragments_styles_touch_nothing_but_the_fragment(plan):
    style = re.search(r"<style>(.*?)</style>", fragment(plan), re.DOTALL)[1]
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    selectors = [
        selector.strip()
        for block in re.findall(r"([^{}]+)\{", style)
        if not block.strip().startswith("@")
        for selector in block.split(",")
    ]
    assert selectors
    assert [selector for selector in selectors if not selector.startswith(".tbjax-sheet")] == []


def test_a_fragment_is_what_a_notebook_shows(plan):
    text = fragment(plan)
    read = Reader(text)
    assert not {"html", "head", "body", "main", "script"} & {tag for tag, _ in read.elements}
    assert words.verdict(plan) in read.text
    assert plan._repr_html_() == text
    said = plans.verification(plan)
    assert compared.verdict(said) not in read.text
    assert compared.verdict(said) in Reader(plan.with_verification(said)._repr_html_()).text


# In a browser.


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    with browser.browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


def examined(running: browser.Browser, path: Path, size: str, *, dark: bool = False) -> list[str]:
    """Everything that is wrong with the page as it is shown."""
    running.open(path, *SIZES[size], dark=dark)
    found = running.evaluate(EXAMINATION)
    return [*running.complaints, *found]


def test_the_page_is_whole_on_a_phone_and_a_laptop_by_day_and_by_night(plan, chromium, tmp_path):
    path = tmp_path / "plan.html"
    path.write_text(page(plan, plans.verification(plan)), encoding="utf-8")
    for size in SIZES:
        for dark in (False, True):
            assert examined(chromium, path, size, dark=dark) == [], (size, dark)


def test_dark_mode_is_dark_and_light_mode_is_light(chromium, tmp_path):
    path = tmp_path / "plan.html"
    path.write_text(page(plans.PLANS["64 GPUs"]()), encoding="utf-8")
    ground = "getComputedStyle(document.querySelector('.tbjax-sheet')).backgroundColor.match(/\\d+/g).map(Number)"
    chromium.open(path, *SIZES["laptop"], dark=False)
    assert min(chromium.evaluate(ground)) > 240
    chromium.open(path, *SIZES["laptop"], dark=True)
    assert max(chromium.evaluate(ground)) < 40


@pytest.mark.parametrize("dark", [False, True])
def test_a_fragment_stands_in_a_notebook_of_any_looks(chromium, tmp_path, dark):
    path = tmp_path / "notebook.html"
    looks = "body { color: #777; background: #777; font: italic 9px serif } td, th { text-align: right; color: #777 }"
    shown = fragment(plans.PLANS["64 GPUs"]())
    path.write_text(f"<!DOCTYPE html><style>{looks}</style><div id='before'></div>{shown}", encoding="utf-8")
    assert examined(chromium, path, "laptop", dark=dark) == []
    assert chromium.evaluate("getComputedStyle(document.querySelector('#before')).fontSize") == "9px"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ('<div style="width: 2000px">wide</div>', "wide in a window"),
        ('<div style="width: 20px; overflow: hidden; white-space: nowrap">a long line</div>', "is clipped"),
        ('<div style="margin-left: -40px">left</div>', "outside the window"),
        ('<div>under</div><div style="margin-top: -1.2em">over</div>', "overlap"),
        ('<div style="color: #aaa">pale</div>', "contrast"),
        ('<svg width="20" height="20" aria-label="x"><text y="15">sticking out</text></svg>', "sticks out"),
        ('<svg width="20" height="20"></svg>text', "no text alternative"),
        (
            '<div><svg aria-label="x"><rect class="device" fill="#eee" width="9" height="9"/></svg></div>x',
            "surroundings",
        ),
        ('<script>console.error("oh")</script>text', "console.error"),
        ('<script>throw Error("oh")</script>text', "Error"),
        ('<img src="http://localhost:1/x.png" alt="">text', "asked for"),
    ],
)
def test_the_examination_finds_what_is_wrong(chromium, tmp_path, wrong, complaint):
    path = tmp_path / "wrong.html"
    path.write_text(f'<!DOCTYPE html><meta name="viewport" content="width=device-width">{wrong}', encoding="utf-8")
    assert any(complaint in found for found in examined(chromium, path, "phone"))
