"""What the planner knows by name, on the command line."""

import json

import pytest
from typer.testing import CliRunner

from tbjax.cli import app
from tbjax.planner import hardware, models


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_all_hardware_is_listed():
    result = run("hardware")
    assert result.exit_code == 0
    for name in hardware.names():
        assert f" {name} " in result.stdout
    (h100,) = [line for line in result.stdout.splitlines() if line.strip().startswith("h100 ")]
    assert "79.1 GiB" in h100
    assert "989.4 TFLOP" in h100


def test_one_record_has_its_sources():
    result = run("hardware", "V5P")
    assert "Google TPU v5p" in result.stdout
    assert "docs.cloud.google.com" in result.stdout


def test_records_for_a_program():
    records = json.loads(run("hardware", "--json").stdout)
    assert [record["name"] for record in records] == list(hardware.names())
    assert json.loads(run("hardware", "h100", "--json").stdout)["memory"] == hardware.hardware("h100").memory


def test_models_are_listed_and_found_by_a_part_of_their_names():
    everything = json.loads(run("models", "--json").stdout)
    assert [model["name"] for model in everything] == list(models.names())
    found = run("models", "mixtral")
    assert "mistralai/Mixtral-8x7B-v0.1" in found.stdout
    assert "46.7B" in found.stdout
    assert "12.9B" in found.stdout  # that a token meets
    assert "llama" not in found.stdout.lower().replace("mistral", "")


def test_one_model_is_described():
    result = run("models", "llama-2-70b-hf")
    assert "68,976,648,192" in result.stdout
    assert json.loads(run("models", "llama-2-70b-hf", "--json").stdout)["kv_heads"] == 8


@pytest.mark.parametrize(
    ("arguments", "near"), [(["hardware", "h10"], "h100"), (["models", "lamma-2-70b-hf"], "Llama-2-70b-hf")]
)
def test_what_is_unknown_is_an_error_with_what_is_near(arguments, near):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert near in result.stderr
