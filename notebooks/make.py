"""Runs the notebooks and keeps what they show in them: `make notebooks`, or some of them by their numbers.

    python -m notebooks.make            # all: ten minutes, most of it the vendors' compilers in 02 and 06
    python -m notebooks.make 01 05

They run on eight virtual CPU devices, each in a folder of its own, as in the tests. What would differ from one run to
the next for no reason (times of execution, the version of the kernel, where one piece of a cell's text ends) is left
out, so that a changed notebook is one that shows something else.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

# Longer than any cell takes: it is for one that hangs.
SECONDS = 1800


def run(path: Path) -> None:
    """Execute a notebook in place."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["PYTHONPATH"] = str(FOLDER.parent)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.name[:2] in sys.argv[1:]:
            before = path.stat().st_size
            run(path)
            print(f"{path.name}: {before / 1e3:.0f} kB, now {path.stat().st_size / 1e3:.0f} kB", flush=True)
