"""The terminal's tables: everything that a plan knows, within the columns that there are."""

import dataclasses
import io

import pytest
from rich.console import Console

from tbjax.planner import compared, words
from tbjax.planner.report import report, verified
from tests.planner import plans

WIDTHS = (80, 117, 120, 140)


def shown(renderable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", plans.PLANS)
def test_every_number_of_a_plan_is_in_its_table(name, width):
    plan = plans.PLANS[name]()
    text = shown(report(plan), width)
    numbers = [words.gib(size) for size in plan.memory.parts.values()]
    numbers += [words.seconds(size) for size in plan.time.parts.values() if size]
    for contender in (plan, *plan.candidates):
        numbers += [words.gib(contender.memory.total), words.seconds(contender.time.total)]
    numbers += [words.count(plan.tokens_per_second), words.share(plan.mfu, 1), words.gib(plan.cluster.hardware.usable)]
    numbers += [words.count(rejection.count) for rejection in plan.rejected]
    numbers += [str(size) for size in plan.layout.mesh.values() if size > 1]
    if not plan.workload.training:
        numbers += [words.seconds(plan.time.prefill), words.seconds(plan.time.decode)]
    assert [number for number in numbers if number not in text] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", plans.PLANS)
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(name, width):
    text = shown(report(plans.PLANS[name]()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


@pytest.mark.parametrize("name", ["64 GPUs", "does not fit", "serving"])
def test_the_reasons_against_the_others_are_given_in_full(name):
    plan = plans.PLANS[name]()
    text = shown(report(plan), 140)
    assert all(rejection.reason in text for rejection in plan.rejected)


def test_memory_and_time_stand_side_by_side_where_there_is_room():
    plan = plans.PLANS["64 GPUs"]()
    both = [line for line in shown(report(plan), 140).splitlines() if "Memory of one GPU" in line]
    assert "Time of a step" in both[0]
    alone = [line for line in shown(report(plan), 80).splitlines() if "Memory of one GPU" in line]
    assert "Time of a step" not in alone[0]


def test_a_name_that_looks_like_markup_of_the_terminal_stays_a_name():
    plan = dataclasses.replace(plans.PLANS["one node"](), model="[bold]llama[/bold]")
    assert "[bold]llama[/bold]" in shown(report(plan), 80)


def test_color_only_repeats_what_words_say():
    assert "✗ Does not fit" in shown(report(plans.PLANS["does not fit"]()), 80)
    assert "✓ Fits" in shown(report(plans.PLANS["64 GPUs"]()), 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_verification_stands_beside_its_prediction(width):
    plan = plans.PLANS["64 GPUs"]()
    verification = plans.verification(plan)
    text = shown(verified(plan, verification), width)
    assert max(map(len, text.splitlines())) <= width
    for row in (*compared.memory(plan, verification), *compared.collectives(verification)):
        line = next(line for line in text.splitlines() if all(cell in line for cell in row))
        assert line.strip()
    assert "Extrapolated" in text
    within = shown(report(dataclasses.replace(plan, verification=verification)), width)
    assert compared.verdict(verification) in " ".join(within.split())
    assert "compiler" not in shown(report(plan), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_that_does_not_fit_says_what_is_missing_and_what_would_do(width):
    plan = plans.PLANS["does not fit"]()
    said = " ".join(shown(report(plan), width).split())
    assert words.gib(plan.missing) in plan.remedy[0]
    assert str(plan.smallest) in plan.remedy[1]
    assert all(sentence in said for sentence in plan.remedy)
    assert "Nothing fits" not in shown(report(plans.PLANS["64 GPUs"]()), width)
