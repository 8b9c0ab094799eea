"""The Python that docstrings show runs: each module's examples in the order in which they stand there, on small things.

A docstring's indented block is Python if it reads as such; the others are tables of words, or commands, which
`tests/test_docs.py` tries. Around an example are the names of its own module and those of `AROUND`. `SMALLER` is the
one place where an example is not run as it stands.
"""

import ast
import functools
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

import interop
import tbjax
import tbjax.compat
from interop.families import Fields
from tbjax.compat import torch
from tbjax.planner.hardware import Cluster, cluster, hardware
from tbjax.planner.plan import plan
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import by_path
from tbjax.training import data
from tests.planner import plans
from tests.training.vocabulary import byte_tokenizer

LARGE = ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-3.1-8B", "HuggingFaceTB/SmolLM2-135M-Instruct")

# What stands in an example, as a regular expression, and what is put in its place: a small model for one that is to be
# loaded (plans are made of the large ones themselves), and one machine with eight CPU devices.
SMALLER = {
    rf'(?<!\bplan\()(?<!describe\()"({"|".join(LARGE)})"': '"model"',
    r"steps=1000": "steps=2",
    r"warmup=100": "warmup=1",
    r"seq_len=\d+": "seq_len=16",
    r"batch_size=\d+": "batch_size=8",
    r"num_nodes=2": "num_nodes=1",
    r'(?<=verify\(config, workload, layout, cluster\()"h100:8x8"': '"cpu:8"',
    r'"nccl"': '"gloo"',
}

SIZES = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64}


def docstrings(module):
    """Of the module and of all that is defined in it."""
    source = Path(inspect.getsourcefile(importlib.import_module(module))).read_text()
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    return [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]


def examples(module):
    """The Python in the docstrings of a module."""
    found = []
    for block in re.findall(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+", "\n\n".join(docstrings(module)) + "\n"):
        code = textwrap.dedent(block)
        try:
            ast.parse(code)
        except SyntaxError:
            continue
        found.append(code)
    return "".join(found)


def modules():
    for package in (tbjax, interop):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield found.name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model that spells, something to read, and a DeepSpeed config."""
    folder = tmp_path_factory.mktemp("docstrings")
    model = tbjax.from_config({"model_type": "llama", **SIZES, **HEADS}, (1, 4, 2), dtype="float32")
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    chat = '{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'
    (folder / "conversations.jsonl").write_text(chat * 64)
    np.save(folder / "tokens.npy", np.arange(4096, dtype=np.uint16) % 384)
    (folder / "deepspeed_config.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    return folder


def tokens():
    return np.random.default_rng(0).integers(0, 384, (8, 16), np.int32)


def batches():
    return [{"tokens": tokens(), "targets": np.roll(tokens(), -1, 1)}] * 2


def loaded(mesh=(1, 4, 2)):
    return tbjax.load("model", mesh, progress=False)


def of_torch():
    return transformers.AutoModelForCausalLM.from_pretrained("model")


def loss(logits):
    return jax.nn.logsumexp(logits.astype("float32"), -1).mean()


def mesh():
    return tbjax.make_mesh((1, 4, 2))


def training():
    return {"model": loaded(), "data": batches(), "tbjax": tbjax, "TrainConfig": tbjax.TrainConfig}


def llama():
    return {"config": plans.llama(8), "workload": plans.TRAINING}


# What each module's example takes for granted.
AROUND = {
    "interop": lambda: {"transformers_model": of_torch(), "interop": interop},
    "interop.families": lambda: {"transformers_config": of_torch().config, "Fields": Fields},
    "interop.families.table": dict,
    "interop.torch_bridge": lambda: {"module": of_torch(), "interop": interop},
    "interop.writer": lambda: {"folder": Path("written"), "array": np.ones((4, 2), np.float32), "config": {}},
    "tbjax": lambda: {"tbjax": tbjax, "tokens": tokens(), "data": batches()},
    "tbjax.checkpoint": lambda: {"model": loaded(), "mesh": mesh(), "tbjax": tbjax},
    "tbjax.compat.auto": lambda: {"mesh": mesh()},
    "tbjax.compat.checkpoint": lambda: {"model": tbjax.compat.FullyShardedDataParallel(loaded()), "path": "sharded"},
    "tbjax.compat.distributed": dict,
    "tbjax.compat.hosts": dict,
    "tbjax.compat.models": dict,
    "tbjax.compat.pipeline": lambda: {"model": loaded(), "tokens": tokens(), "loss_fn": loss}
    | {name: getattr(tbjax.compat, name) for name in ("InterleavedScheduler", "split_batch")},
    "tbjax.compat.torch": lambda: {"model": tbjax.compat.FullyShardedDataParallel(loaded()), "local_rank": 0},
    "tbjax.compat.training": training,
    "tbjax.compat.wrapped": lambda: {"model": loaded(), "batches": [tokens()] * 2, "torch": torch},
    "tbjax.compat.zero": training,
    "tbjax.plain": lambda: {"plan": plans.PLANS["one node"](), "Plan": tbjax.Plan, "json": json},
    "tbjax.planner.device": lambda: llama() | {"hardware": hardware, "Cluster": Cluster, "plan": plan},
    "tbjax.planner.hardware": dict,
    "tbjax.planner.models": dict,
    "tbjax.planner.plan": lambda: llama() | {"cluster": cluster},
    "tbjax.planner.verify": lambda: {
        "config": loaded().config, "workload": Workload(global_batch=8, seq_len=16), "layout": Layout(fsdp=8),
        "cluster": cluster,
    },
    "tbjax.quantize": lambda: {"tbjax": tbjax},
    "tbjax.shown": lambda: {"TrainConfig": tbjax.TrainConfig},
    "tbjax.stored": lambda: {"folder": Path("stored").absolute(), "array": np.ones((4, 2), np.float32)},
    "tbjax.training": lambda: training() | {"data": data, "train": tbjax.train},
    "tbjax.training.config": dict,
    "tbjax.training.data.constructors": lambda: {"tokenizer": byte_tokenizer()},
    "tbjax.training.loop": lambda: training() | {"held_out": batches()},
    "tbjax.writing": lambda: {"arrays": by_path(loaded()), "folder": Path("run/500").absolute()},
}  # fmt: skip


def test_every_module_that_shows_python_is_tried():
    assert {module for module in modules() if examples(module)} == set(AROUND)


@pytest.mark.parametrize("module", AROUND)
def test_the_examples_of_a_module_run(module, place, monkeypatch):
    monkeypatch.chdir(place)
    code = functools.reduce(lambda text, pair: re.sub(*pair, text), SMALLER.items(), examples(module))
    names = {**vars(importlib.import_module(module)), **AROUND[module]()}
    exec(compile(code, f"the docstring of {module}", "exec"), names)  # noqa: S102 (it is our own)
