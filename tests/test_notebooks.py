"""Every notebook runs from its first cell to its last, on eight virtual devices."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks.make import METADATA

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# They have the vendors' compilers compile 70B: minutes.
SLOW = {"02_plan_and_verify_70b", "06_llama_2_70b_on_a_tpu_vm"}

# Of one file, in bytes: pictures are drawings, or a few kilobytes.
LARGEST = 256 * 1024

# Of the plain text beside a picture, in characters: a table of a model's tensors, not the insides of a value.
LONGEST = 4000


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else []) for path in NOTEBOOKS],
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.delenv("XLA_FLAGS")  # they compute more than they compile
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parent.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_what_it_showed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= LARGEST
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert str(Path(__file__).parent.parent) not in path.read_text()
    assert "/tmp/" not in path.read_text()
    assert notebook.metadata == METADATA
    assert not [cell for cell in code if "execution" in cell.metadata]
    plain = [output.data["text/plain"] for output in outputs if "text/plain" in output.get("data", {})]
    assert [text for text in plain if len(text) > LONGEST] == []
