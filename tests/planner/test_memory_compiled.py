"""The planner's memory beside the vendors' compilers: figures kept in tests/data, and, slowly, compiled anew."""

from importlib.metadata import version

import pytest

from benchmarks.planner_memory import CASE, CASES, Case, compile_case, error, kept
from tbjax.planner.compilers import compiler_for, installed

COMPILED = kept()
KEPT = [case for case in CASES if case.name in COMPILED]


def test_the_cases_are_many_and_of_all_compilers() -> None:
    assert set(COMPILED) <= set(CASE)
    assert len(KEPT) >= 60
    assert {compiled.compiler for compiled in COMPILED.values()} == {"tpu", "cuda", "cpu"}


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_a_prediction_is_near_what_was_compiled(case: Case) -> None:
    assert abs(error(case, COMPILED[case.name])) <= 0.12


def test_predictions_are_within_five_percent_on_average() -> None:
    errors = [abs(error(case, COMPILED[case.name])) for case in KEPT]
    assert sum(errors) / len(errors) <= 0.05


def test_what_the_compiler_refuses_is_not_said_to_fit() -> None:
    refused = [case for case in KEPT if not COMPILED[case.name].fits]
    assert refused, "no case is too large: the test shows nothing"
    for case in refused:
        assert case.predicted().total > case.inputs()[3].hardware.usable, case.name


SAMPLE = (
    "tiny cpu float32 tp",
    "qwen2.5 0.5b cpu fsdp x tp",
    "7b fsdp",
    "gemma 2 2b fsdp",
    "mixtral ep x fsdp x tp",
    "7b serve tp",
    "7b tpu tp",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_the_compiler_still_says_what_was_kept(name: str) -> None:
    case = CASE[name]
    compiler = compiler_for(case.inputs()[3])
    if not installed(compiler):
        pytest.skip(f"the {compiler!r} compiler is not installed: tbjax[verify]")
    if (release := version("jax")) != COMPILED[name].jax:
        pytest.skip(f"what was kept is of JAX {COMPILED[name].jax}; the compilers of {release} allocate otherwise")
    assert compile_case(case).total == pytest.approx(COMPILED[name].total, rel=0.02)
