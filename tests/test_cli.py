"""The command line answers at once, and does what the library does."""

import os
import resource
import subprocess
import sys

import pytest

from tests import tiny


def run(*arguments):
    """A command in a process of its own: what it prints, says and returns."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("module", ["tbjax.cli", "interop.convert"])
def test_help_imports_nothing_slow(module):
    code = f"import sys, {module}; print([m for m in ('jax', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run("-c", code).stdout == "[]\n"


def test_help_takes_less_than_half_a_second_of_the_processor():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("-m", "tbjax.cli", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Not the clock's: that would count whatever else the machine is doing. The help waits for nothing, it only imports.
    assert min(seconds() for _ in range(5)) < 0.5


def test_an_unknown_command_is_a_usage_error():
    result = run("-m", "tbjax.cli", "conquer")
    assert result.returncode == 2
    assert "No such command" in result.stderr


def test_generate_says_what_is_missing_and_fails(tmp_path):
    result = run("-m", "tbjax.cli", "generate", str(tmp_path), "--prompt", "hello", "--mesh", "1,2,1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_without_a_tokenizer_asks_for_token_ids(tmp_path):
    tiny.save(tiny.BY_NAME["llama"], tmp_path)
    result = run("-m", "tbjax.cli", "generate", str(tmp_path), "--prompt", "hello", "--mesh", "1,2,1")
    assert result.returncode == 1
    assert "tokenizer" in result.stderr
