"""Every example runs as its page says: its `--tiny` line, in a process of its own."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla import flags

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = re.compile(r"^ {4}python examples/(.* --tiny[^#\n]*)", re.MULTILINE)

DEVICES = 8

# What each prints when it has done what it is for.
SHOWN = {
    "falcon_180b_plan.py": "compiled for cpu:8: it fits",
    "finetune_and_export.py": "transformers loads it",
    "llama_70b_distributed.py": "after tokens 1, 2, 3: [",
    "load_distributed.py": "after tokens 1, 2, 3: [",
    "long_context_ring.py": "losses over sequences of 1024",
    "mixtral_expert_parallel.py": "experts/ep",
    "train_llama_7b_fsdp.py": "held-out perplexity",
}


def commands(name):
    """The lines of an example's page that need neither accelerators nor the network."""
    return [shlex.split(line) for line in TINY.findall((EXAMPLES / name).read_text())]


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_an_example_runs(name):
    (command,) = commands(name)
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "XLA_FLAGS": flags(DEVICES)}
    arguments = ["--steps", "4"] if name == "train_llama_7b_fsdp.py" else []  # a minute's worth by itself
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / command[0]), *command[1:], *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert SHOWN[name] in result.stdout


# Command lines of the documents that these examples are from, less what launches them.
DOCUMENTED = [
    ("load_distributed.py", "--model-name hf-internal-testing/tiny-random-LlamaForCausalLM"),
    ("load_distributed.py", "--model-name meta-llama/Llama-3.1-8B --tp-size 2"),
    ("load_distributed.py", "--model-name meta-llama/Llama-3.1-8B --dp-size 4"),
    ("load_distributed.py", "--model-name meta-llama/Llama-3.1-8B --tp-size 2 --dp-size 2"),
    ("load_distributed.py", "--model-name meta-llama/Llama-3.1-8B --tp-size 2 --use-device-mesh"),
    (
        "train_llama_7b_fsdp.py",
        "--model_name meta-llama/Llama-2-7b-hf --batch_size 1 --gradient_accumulation_steps 4 --mixed_precision "
        "--activation_checkpointing",
    ),
    ("train_llama_7b_fsdp.py", "--sharding_strategy HYBRID_SHARD"),
]


@pytest.mark.parametrize(("name", "flags"), DOCUMENTED)
def test_an_example_takes_the_flags_of_the_documents(name, flags, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    found = vars(importlib.import_module(name.removesuffix(".py")).parse_arguments())
    for flag, *values in (part.split() for part in flags.split("--") if part):
        value = found[flag.replace("-", "_")]
        assert value is True if not values else str(value) == values[0]


def test_every_page_is_an_example_that_is_run():
    pages = {path.name for path in EXAMPLES.glob("*.py")}
    assert pages - set(SHOWN) == {"demo.py", "tiny.py"}  # `make demo`, and the models of the others
