"""The command line answers at once, and does what the library does."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import typer

import tbjax
from tbjax import cli, terminal
from tbjax.generate.command import sampled
from tests import tiny


def run(*arguments, variables=None):
    """A command in a process of its own: what it prints, says and returns."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"COLUMNS": "200", **(variables or {})}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


COMMANDS = ("plan", "verify", "convert", "generate", "train", "pipeline", "hardware", "doctor", "models")

# What takes long to import, one way or another; the help and the completion of a shell wait for none of it.
SLOW = ("jax", "flax", "numpy", "torch", "transformers", "huggingface_hub", "optax", "orbax")

HELPED = f"""
import io, contextlib, json, sys
from tbjax.cli import app

texts = {{}}
for command in (None, *{COMMANDS}):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        app([*([command] if command else []), "--help"], prog_name="tbjax", standalone_mode=False)
    texts[command or ""] = said.getvalue()
print(json.dumps([texts, [name for name in {SLOW} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def helped():
    """What the help of each command says, and what was imported for all of them."""
    result = run("-c", HELPED)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def words(text):
    """A page of the terminal without its frames and lines."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_no_help_imports_anything_slow(helped):
    assert helped[1] == []


def test_the_conversion_script_s_help_imports_nothing_slow():
    code = f"import sys, interop.convert; print([name for name in {SLOW} if name in sys.modules])"
    assert run("-c", code).stdout == "[]\n"


def test_every_command_is_listed_and_its_help_ends_with_an_example_and_its_exit_codes(helped):
    texts = helped[0]
    listed = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert listed == set(COMMANDS) == set(cli.EXAMPLES)
    for command in COMMANDS:
        said = words(texts[command])
        assert command in texts[""]
        assert said.index(f"Example: {cli.EXAMPLES[command]}") < said.index("Exit codes: 0 done, 1 could not be done")
        assert "130 Ctrl-C" in said
        assert "--debug" in said
        assert "--json" in said
    assert "--install-completion" in texts[""]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_help_is_a_command_line_that_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").touch()
    whole = typer.main.get_command(cli.app)
    script, name, *arguments = shlex.split(cli.EXAMPLES[command])
    assert (script, name) == ("tbjax", command)
    whole.commands[name].make_context(name, arguments)  # parses, and runs nothing


@pytest.mark.parametrize("option", ["--mesh", "--json", "--debug", "--quiet", "--revision", "--trust-pickle"])
def test_an_option_that_commands_share_is_the_same_in_all(option):
    whole = typer.main.get_command(cli.app)
    found = {
        tuple(parameter.opts)
        for command in whole.commands.values()
        for parameter in command.params
        if option in parameter.opts
    }
    assert len(found) == 1


def test_the_version_is_that_of_the_package():
    assert run("-m", "tbjax", "--version").stdout.strip() == metadata.version("tbjax") == tbjax.__version__


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("tbjax pl", {"plan"}), ("tbjax plan --hard", {"--hardware"}), ("tbjax plan --task inf", {"inference"})],
)
def test_a_shell_s_completion_knows_commands_options_and_values(typed, offered):
    asked = {"_TBJAX_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert set(run("-m", "tbjax", variables=asked).stdout.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_can_be_shown(shell):
    # Which shell this is would be asked of the parent process: here it is said.
    result = run(
        "-m", "tbjax", "--show-completion", shell, variables={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert f"complete_{shell}" in result.stdout


def test_completion_is_installed_where_the_shell_looks(tmp_path):
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    result = run("-m", "tbjax", "--install-completion", "bash", variables=variables)
    assert result.returncode == 0, result.stderr
    assert "tbjax" in (tmp_path / ".bashrc").read_text()


WAITING = """
import signal, sys, typer
from tbjax.terminal import readable_errors, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the one who started this has set
app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def wait():
    with readable_errors(debug=False):
        print("waiting", flush=True)
        sys.stdin.read()

run(app, "wait")
"""


def test_ctrl_c_ends_a_command_with_130_and_a_word():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted\n"


def test_one_who_has_read_enough_is_no_error():
    """`tbjax models | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-m", "tbjax", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "error:" not in errors


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
        (("--prompt", "a", "--greedy", "--top-p", "0.9"), "and --top-p does: leave out one of them"),
    ):
        result = run("-m", "tbjax.cli", "generate", "model", *arguments)
        assert result.returncode == 2
        assert words in " ".join(result.stderr.replace("│", " ").split())


def test_an_option_of_sampling_means_sampling():
    asked = [sampled(asked, given) for asked in (None, True) for given in ({}, {"--top-k": 5})]
    assert asked == [None, True, True, True]
    assert sampled(False, {}) is False


def test_a_temperature_of_0_means_the_best():
    cold = {"--temperature": 0.0}
    assert sampled(None, cold) is False
    assert sampled(False, cold) is False
    assert sampled(None, {"--temperature": 0.5}) is True
    for asked, more, drawing in ((True, {}, "--sample"), (None, {"--top-p": 0.9}, "--top-p")):
        with pytest.raises(typer.BadParameter, match=f"--temperature 0 leaves nothing to chance, and {drawing} does"):
            sampled(asked, cold | more)


def test_a_temperature_of_0_reaches_the_model_as_greedy(monkeypatch, capsys):
    asked = {}

    def load(*_, **__):
        return SimpleNamespace(generate=answer)

    def answer(questions, **options):
        asked.update(options)
        return [SimpleNamespace(text="an answer") for _ in questions]

    monkeypatch.setattr("tbjax.load", load, raising=False)
    monkeypatch.setattr("sys.argv", ["tbjax", "generate", "model", "--prompt", "a", "--temperature", "0", "-q"])
    with pytest.raises(SystemExit, match="0"):
        terminal.run(cli.app, "tbjax")
    assert capsys.readouterr().out == "an answer\n"
    assert asked["do_sample"] is False
    assert asked["temperature"] is None


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
