"""What the documentation shows runs: every Python block of a page in order, in one process, then its commands."""

import dataclasses
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tbjax.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = ["README.md"]

# The console scripts, by what they run: they need not be on the path.
SCRIPTS = {"tbjax": "tbjax.cli", "tbjax-convert": "interop.convert"}

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


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_runs(page, tmp_path):
    output = run([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)
    assert "Paris" in output
    for line in "".join(blocks(page, "sh")).splitlines():
        script, *arguments = shlex.split(line, comments=True)
        output = run([sys.executable, "-m", SCRIPTS[script], *arguments], tmp_path)
    assert "Paris" in output


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


def test_every_make_target_of_the_documentation_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        named = set(re.findall(r"^ {4}make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
        assert named <= targets, page
