"""The command line answers at once, and does what the library does."""

import json
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


def test_generate_asks_for_what_is_missing_or_too_much():
    for arguments, words in (
        ((), "Give --prompt"),
        (("--prompt", "a", "--stream", "--json"), "--stream shows one answer"),
        (("--prompt", "a", "--system", "b"), "give --chat too"),
    ):
        result = run("-m", "tbjax.cli", "generate", "model", *arguments)
        assert result.returncode == 2
        assert words in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_generate_answers_prompts_messages_and_conversations(tmp_path):
    from benchmarks.checkpoints import SMOLLM2

    def generate(*arguments, said=None):
        command = [sys.executable, "-m", "tbjax.cli", "generate", SMOLLM2, "--mesh", "1,1,1", "-q", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, input=said, timeout=900)
        assert result.returncode == 0, result.stderr
        return result.stdout

    length = ("--max-new-tokens", "12", "--greedy")
    plain = generate("--prompt", "The capital of France is", *length)
    assert plain.startswith(" Paris")
    assert generate("--prompt", "The capital of France is", "--stream", *length) == plain
    questions = tmp_path / "questions.jsonl"
    lines = [{"prompt": "The capital of France is"}, {"messages": [{"role": "user", "content": "Say hello."}]}]
    questions.write_text("\n".join(map(json.dumps, lines)))
    answers = [json.loads(line) for line in generate("--prompts", str(questions), "--json", *length).splitlines()]
    assert [answer["prompt"] for answer in answers] == [line.get("prompt", line.get("messages")) for line in lines]
    assert answers[0]["text"] + "\n" == plain
    talked = generate("--chat", "--stop", "\n", *length, said="Say hello.\nAnd again.\n").splitlines()
    assert len(talked) == 2
    assert talked[0] == answers[1]["text"].split("\n")[0]
