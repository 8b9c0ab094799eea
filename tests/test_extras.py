"""Without the packages of an extra, what needs them says which one to install; nothing else needs them.

Each is hidden from the import system, one extra at a time. (`tests/test_packaging.py` has environments that lack them.)
"""

import dataclasses
import re
import sys
import tomllib
from pathlib import Path

import pytest

from interop import to_torch
from interop.readers import gguf, pickled
from tbjax.doctor.hints import hints
from tbjax.doctor.machine import examine
from tbjax.hosts.joining import _Store
from tbjax.planner import compilers
from tbjax.quantize import weight
from tbjax.training import data
from tbjax.training.data import sources
from tbjax.training.logs import TensorBoard
from tests.training.vocabulary import byte_tokenizer

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

# Of the repository's own work rather than the library's.
OURS = {"dev", "notebooks"}
# JAX itself finds them, or runs without.
PLUGINS = {"cuda12", "tpu"}

FILE = Path("model.bin")

# An extra, the package of it that is not there, and what cannot be done then.
NEEDED = [
    ("interop", "torch", lambda: pickled._load(FILE)),
    ("interop", "torch", lambda: to_torch(None)),
    ("interop", "torch", lambda: _Store("localhost:1", 1.0)),
    ("gguf", "gguf", lambda: gguf.parse(FILE)),
    ("train", "grain", lambda: next(iter(data.tokens([[1, 2, 3]], vocabulary=4, seq_len=2, batch_size=1)))),
    ("train", "datasets", lambda: data.load("nobody/nothing", byte_tokenizer(), seq_len=2, batch_size=1)),
    ("train", "pyarrow", sources._pyarrow),
    ("tensorboard", "tensorboardX", lambda: TensorBoard("events")),
    ("quantize", "qwix", weight._qwix),
]


@pytest.mark.parametrize(
    ("extra", "package", "call"), NEEDED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_needs_an_extra_names_it(extra, package, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=re.escape(f"pip install 'tbjax[{extra}]'")):
        call()


def test_a_missing_compiler_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "FOLDER", tmp_path)
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda _: None)
    for compiler in ("cuda", "tpu"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'tbjax\[verify\]'"):
            compilers.require(compiler)


def test_gpus_that_jax_does_not_use_name_theirs():
    machine = dataclasses.replace(examine(), gpus_of_the_host=8, platform="cpu")
    assert any("pip install 'tbjax[cuda12]'" in hint for hint in hints(machine, []))


def test_no_extra_is_forgotten():
    tried = {extra for extra, *_ in NEEDED} | {"verify"}
    assert set(PROJECT["optional-dependencies"]) == tried | OURS | PLUGINS
