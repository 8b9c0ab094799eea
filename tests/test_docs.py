"""What the documentation shows runs: every Python block of a page in order, in one process, then its commands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_make_target_of_the_documentation_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        named = set(re.findall(r"^ {4}make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE))
        assert named <= targets, page
