"""`tbjax plan` and `tbjax verify`, as users of a command line expect them."""

import json
import re
from typing import get_args

import pytest
from typer.testing import CliRunner

from tbjax.cli import app
from tbjax.planner import command, compilers, search, workload
from tbjax.planner import plan as plans
from tbjax.planner.plan import Plan
from tbjax.sharding import ShardingStrategy
from tests import tiny


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(tmp_path, *arguments):
    """What a plan that was asked for came to."""
    file = tmp_path / "plan.json"
    result = run("plan", *arguments, "--out", file, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    return Plan.from_json(file)


def test_a_plan_is_printed():
    result = run("plan", "llama-2-7b-hf", "--hardware", "h100:8", "--global-batch", "64")
    assert result.exit_code == 0
    assert re.search("^llama-2-7b-hf on 8 . NVIDIA H100", result.stdout)
    assert "Runners-up" in result.stdout
    assert result.stderr == ""


def test_the_plan_is_that_of_the_library(tmp_path):
    import tbjax

    options = ["--global-batch", "64", "--seq-len", "2048", "--optimizer", "lion", "--precision", "bfloat16"]
    found = planned(tmp_path, "llama-2-7b-hf", "--hardware", "h100:8", *options)
    assert found == tbjax.plan(
        "llama-2-7b-hf", "h100:8", global_batch=64, seq_len=2048, optimizer="lion", precision="bfloat16"
    )


def test_serving(tmp_path):
    options = ["--task", "inference", "--global-batch", "4", "--new-tokens", "64", "--quantization", "int8"]
    found = planned(tmp_path, "llama-2-7b-hf", "--hardware", "h100:8", *options)
    assert (found.workload.task, found.workload.new_tokens, found.workload.quantization) == ("inference", 64, "int8")


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        (["--mesh", "1,4,2"], {"dp": 1, "fsdp": 4, "tp": 2, "pp": 1}),
        (["--mesh", "1,-1,2"], {"fsdp": 4, "tp": 2}),
        (["--mesh", "tp=2"], {"tp": 2}),
        (["--tp", "2", "--pp", "2"], {"tp": 2, "pp": 2}),
        (["--mesh", "tp=2", "--fsdp", "4"], {"tp": 2, "fsdp": 4}),
    ],
)
def test_a_mesh_or_single_sizes_are_fixed(tmp_path, options, mesh):
    found = planned(tmp_path, "llama-2-7b-hf", "--hardware", "h100:8", "--global-batch", "32", *options)
    assert {axis: found.mesh[axis] for axis in mesh} == mesh


def test_settings_are_fixed(tmp_path):
    options = ["--remat", "full", "--microbatches", "2", "--sharding", "OPTIMIZER", "--no-sequence-parallel"]
    layout = planned(tmp_path, "llama-2-7b-hf", "--hardware", "h200:8", "--global-batch", "32", *options).layout
    assert (layout.remat, layout.microbatches, layout.strategy) == ("full", 2, "OPTIMIZER")
    assert not layout.sequence_parallel


@pytest.mark.parametrize(
    ("choice", "offload"),
    [("none", ()), ("optimizer", ("optimizer",)), ("both", ("optimizer", "activations"))],
)
def test_offloading_is_fixed(tmp_path, choice, offload):
    options = ["--global-batch", "32", "--offload", choice]
    assert planned(tmp_path, "llama-2-7b-hf", "--hardware", "h200:8", *options).layout.offload == offload


def test_json_may_go_to_standard_output():
    result = run("plan", "llama-2-7b-hf", "--hardware", "h100:8", "--json")
    assert Plan.from_json(result.stdout).fits


def test_a_page_is_written(tmp_path):
    page = tmp_path / "plan.html"
    assert run("plan", "llama-2-7b-hf", "--hardware", "h100:8", "--html", page, "-q").exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_does_not_fit_fails_and_says_what_would_do(tmp_path):
    file = tmp_path / "plan.json"
    result = run("plan", "llama-2-70b-hf", "--hardware", "h100:2", "--global-batch", "16", "--out", file, "-q")
    assert result.exit_code == 1
    assert "Nothing fits" in result.stderr
    assert str(Plan.from_json(file).smallest) in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt3", "--hardware", "h100:8"], ["gpt3"]),
        (["llama-2-7b-hf", "--hardware", "h1000:8"], ["'h1000'", "'h100'"]),
        (["llama-2-7b-hf", "--hardware", "h100:8", "--mesh", "1,8,4"], ["(1, 8, 4)", "would do"]),
        (["llama-2-7b-hf", "--hardware", "h100:8", "--html", "/no/such/folder/plan.html"], ["/no/such/folder"]),
    ],
)
def test_what_goes_wrong_is_one_paragraph(arguments, words):
    result = run("plan", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["llama-2-7b-hf"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--task", "serve"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--global-batch", "0"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--global-batch", "many"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--tp", "0"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--mesh", "4"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--mesh", "1,4,2", "--tp", "2"],
        ["llama-2-7b-hf", "--hardware", "h100:8", "--mesh", "tp=4", "--tp", "2"],
    ],
)
def test_what_is_not_understood_is_a_usage_error(arguments):
    result = run("plan", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_the_choices_are_the_planners():
    for name in ("Task", "Optimizer", "Precision", "Quantization", "Remat", "Schedule"):
        assert get_args(getattr(command, name)) == get_args(getattr(workload, name))
    assert get_args(command.Objective) == get_args(search.Objective)
    assert get_args(command.Search) == get_args(plans.Search)
    assert get_args(command.Strategy) == tuple(ShardingStrategy)
    assert set(get_args(command.Compiler)) == {"auto", *get_args(compilers.Compiler)}
    offloads = {part for choice in command._OFFLOADED.values() if choice != "any" for part in choice}
    assert offloads == set(get_args(workload.Offloaded))
    assert set(command._OFFLOADED) == set(get_args(command.Offload))


# --- tbjax verify -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A small plan, planned and verified by one command."""
    folder = tmp_path_factory.mktemp("verified")
    tiny.save(tiny.BY_NAME["llama"], folder / "model")
    arguments = [folder / "model", "--hardware", "cpu:4", "--global-batch", "8", "--seq-len", "32", "--tp", "2"]
    result = run("plan", *arguments, "--verify", "--out", folder / "plan.json", "--html", folder / "plan.html")
    return folder, result


def test_a_plan_is_verified_by_its_compiler(verified):
    folder, result = verified
    assert result.exit_code == 0, result.stderr
    assert "Compiled" in result.stdout
    verification = Plan.from_json(folder / "plan.json").verification
    assert verification
    assert verification.compiler == "cpu"
    assert "ompile" in (folder / "plan.html").read_text(encoding="utf-8")


def test_a_saved_plan_is_verified(verified, tmp_path):
    folder, _ = verified
    result = run("verify", folder / "plan.json", "--out", tmp_path / "again.json", "--html", tmp_path / "again.html")
    assert result.exit_code == 0, result.stderr
    assert "Compiled" in result.stdout
    before, after = (Plan.from_json(path).verification for path in (folder / "plan.json", tmp_path / "again.json"))
    assert before
    assert after
    assert after.compiled.bytes == before.compiled.bytes
    assert (tmp_path / "again.html").exists()


def test_verifying_says_what_is_wrong(tmp_path):
    missing = run("verify", tmp_path / "plan.json")
    assert missing.exit_code == 1
    assert "plan.json" in missing.stderr
    (tmp_path / "plan.json").write_text(json.dumps({"format": 1}))
    damaged = run("verify", tmp_path / "plan.json")
    assert damaged.exit_code == 1
    assert "config" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_a_plan_whose_compiler_does_not_compile_for_its_devices_says_so(tmp_path):
    file = tmp_path / "plan.json"
    planned = run("plan", "smollm2-135m", "--hardware", "h100:8", "--task", "inference", "--out", file, "-q")
    assert planned.exit_code == 0
    result = run("verify", file, "--compiler", "tpu")
    assert result.exit_code == 1
    assert "compiler='tpu' does not compile for h100:8" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
