"""What is built from the repository is whole, and a wheel works where only its own dependencies are.

Environments are made of what is installed here: a bare virtual environment gets links to the files of exactly those
distributions that the wheel asks for, and that those ask for. So nothing that it has forgotten to ask for is there.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tbjax.planner.compilers import FOLDER

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow

# What the repository has: what git does not ignore.
LISTED = ("git", "ls-files", "--cached", "--others", "--exclude-standard")

# What no environment without extras may have.
FURTHER = "torch gguf grain datasets pyarrow tensorboardX qwix accelerate chex hypothesis pytest".split()

# What cuDNN asks for to run. Compiling does without, and so does `python -m tbjax.planner.compilers`.
LEFT_OUT = {"nvidia-cublas-cu12"}

SMOKE = f"""
import importlib.util, sys, tempfile
from pathlib import Path
there = [name for name in {FURTHER} if importlib.util.find_spec(name)]
assert not there, there
import numpy as np
import tbjax, interop
assert Path(tbjax.__file__).is_relative_to(sys.prefix), tbjax.__file__
config = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
folder = Path(tempfile.mkdtemp())
model = tbjax.from_config(config, (2, 2, 2), dtype="float32")
model.save_pretrained(folder / "model")
loaded = tbjax.load(folder / "model", (1, 4, 2))
assert loaded.generate([1, 2, 3], max_new_tokens=4) == model.generate([1, 2, 3], max_new_tokens=4)
tokens = np.arange(8 * 16, dtype=np.int32).reshape(8, 16) % 64
batches = [dict(tokens=tokens, targets=np.roll(tokens, -1, 1))] * 2
result = tbjax.train(loaded, batches, tbjax.TrainConfig(steps=2), checkpoint_dir=folder / "run", progress=False)
assert result.losses[1] < result.losses[0]
plan = tbjax.plan("llama-2-70b-hf", "h100:8x8", global_batch=512)
assert plan.fits
plan.to_html(folder / "plan.html")
model.show_sharding().to_html(folder / "map.html")
print("done")
"""

# What each extra is for, done.
EXTRAS = {
    "interop": "from interop import from_torch, to_torch\nmodel = to_torch(from_torch(to_torch(made())))",
    "gguf": "from gguf import GGUFWriter\nimport numpy as np\nfrom interop.readers.gguf import parse\n"
    "writer = GGUFWriter(folder / 'one.gguf', 'llama'); writer.add_tensor('one', np.ones((32, 32), np.float32))\n"
    "writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()\n"
    "assert parse(folder / 'one.gguf')",
    "train": "from tbjax.training import data\n"
    "batch = next(iter(data.tokens([list(range(60))], vocabulary=64, seq_len=8, batch_size=1)))",
    "tensorboard": "from tbjax.training.logs import TensorBoard\n"
    "log = TensorBoard(folder / 'events'); log.write(1, {'loss': 1.0})\n"
    "assert list((folder / 'events').iterdir())",
    "quantize": "made(quantization='int8').generate([1, 2, 3], max_new_tokens=2)",
    "verify": """
for hardware, compiler in (("h100:8", "cuda"), ("v5e:2x4", "tpu")):
    verification = tbjax.plan("smollm2-135m", hardware, seq_len=512, global_batch=8).verify()
    assert verification.compiler == compiler
    assert verification.fits
""",
    "notebooks": """
import os
os.environ.update({name: str(folder) for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")})
import nbformat
from nbclient import NotebookClient
cells = ["import tbjax", "tbjax.plan('smollm2-135m', 'h100:8').mesh['tp']"]
notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
NotebookClient(notebook, kernel_name="python3").execute()
assert notebook.cells[1].outputs[0].data["text/plain"] == "1"
""",
    "dev": """
import subprocess, sys
import accelerate, chex, safetensors, yaml
chex.assert_trees_all_equal({"a": 1}, {"a": 1})
(folder / "test_one.py").write_text(
    "from hypothesis import given, strategies\\n\\n\\n@given(strategies.integers())\\n"
    "def test_one(number: int) -> None:\\n    assert number + 0 == number\\n"
)
checked = f"basedpyright --level error --pythonpath {sys.executable}"
for tool in ("ruff check", "ruff format --check", checked, "pytest -n 1 -p no:cacheprovider"):
    subprocess.run([sys.executable, "-m", *tool.split(), "test_one.py"], cwd=folder, check=True)
""",
}

MADE = """
import tempfile
from pathlib import Path
import tbjax
folder = Path(tempfile.mkdtemp())
def made(**options):
    config = dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    return tbjax.from_config(config, (1, 1, 8) if not options else (1, 8, 1), dtype="float32", **options)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, built from a copy of what the repository has."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    names = run(*LISTED, cwd=ROOT).splitlines()
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--target", folder / "backend", "hatchling")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=source, PYTHONPATH=str(folder / "backend"))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def about(wheel):
    return wheel_metadata(wheel)


def run(*command, cwd=None, **variables):
    """What a command prints; `variables` are added to an environment that knows of nothing."""
    bare = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment = dict(os.environ) if "pip" in command else bare  # pip has its own settings, of registries say
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def needed(requirements, extras=frozenset()):
    """The distributions that requirements ask for, and all that those ask for, as they are installed here."""
    found: dict[str, metadata.Distribution] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset(extras)) for text in requirements]
    while waiting:
        requirement, around = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *around}):
            continue
        name, own = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, own) in asked or name in LEFT_OUT:
            continue
        asked.add((name, own))
        places = [*sys.path, str(FOLDER)]
        found[name] = next(iter(metadata.distributions(name=name, path=places)), None) or metadata.distribution(name)
        waiting += [(Requirement(text), own) for text in found[name].requires or []]
    return found.values()


def is_program(file: Path) -> bool:
    """Whether a file is a program of its own: a script's first line would start another environment's Python."""
    return file.parent.name == "bin" and file.is_file() and not file.read_bytes().startswith(b"#!")


def environment(folder, wheel, about, extras=()):
    """A virtual environment with the wheel and what it needs. Gives its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in needed(about.get_all("Requires-Dist"), extras):
        for file in distribution.files or []:
            here, there = Path(str(distribution.locate_file(file))), packages / file
            if "__pycache__" not in file.parts and (file.parts[0] != ".." or is_program(here)):
                there.parent.mkdir(parents=True, exist_ok=True)
                if not there.exists():
                    there.symlink_to(here)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def test_a_wheel_works_with_the_core_dependencies_alone(wheel, about, tmp_path):
    python = environment(tmp_path / "core", wheel, about)
    output = run(python, "-W", "error::UserWarning", "-c", SMOKE, cwd=tmp_path)
    assert output.endswith("done\n")
    scripts = python.parent
    assert "Exit codes" in run(scripts / "tbjax", "--help")
    assert run(scripts / "tbjax", "--version").strip() == PROJECT["version"]
    assert json.loads(run(scripts / "tbjax", "models", "llama-2-70b-hf", "--json"))["layers"] == 80
    assert "Exit codes" not in run(scripts / "tbjax-convert", "--help")


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_is_for(extra, wheel, about, tmp_path):
    python = environment(tmp_path / extra, wheel, about, [extra])
    run(python, "-c", MADE + EXTRAS[extra], cwd=tmp_path)


def test_every_extra_is_tried_or_is_hardware_s():
    assert set(PROJECT["optional-dependencies"]) == {*EXTRAS, "cuda12", "tpu"}


def test_the_wheel_has_the_packages_with_their_data_and_nothing_else(wheel, about):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"tbjax", "interop"}
    known = run(*LISTED, "tbjax", "interop", cwd=ROOT).split()
    assert {name for name in names if ".dist-info" not in name} == {n for n in known if (ROOT / n).is_file()}
    assert {"tbjax/py.typed", "interop/py.typed", "tbjax/planner/models.json", "tbjax/pages/sheet.css"} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (about["Name"], about["Version"], about["License-Expression"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
    assert (about.get_payload() or "").startswith("# tbjax")  # the README, as the registry shows it


def test_the_sdist_has_all_that_a_newcomer_needs(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    wanted = "LICENSE README.md CHANGELOG.md CONTRIBUTING.md Makefile constraints.txt pyproject.toml .ci/run .ci/python"
    wanted = {
        *wanted.split(),
        "tbjax/py.typed",
        "tests/conftest.py",
        "examples/demo.py",
        "notebooks/01_quickstart.ipynb",
    }
    assert wanted <= names
    assert not [name for name in names if re.search(r"__pycache__|\.venv|\.cache", name)]


def test_the_version_stands_in_one_place():
    files = run(*LISTED, "*.py", "*.toml", "*.md", "Makefile", cwd=ROOT).split()
    told = [
        name
        for name in files
        if (ROOT / name).is_file()
        and re.search(
            rf"^\W*(__version__|version)\W*=\W*{re.escape(PROJECT['version'])}", (ROOT / name).read_text(), re.M
        )
    ]
    assert told == ["pyproject.toml"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
