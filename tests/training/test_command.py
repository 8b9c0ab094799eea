"""`tbjax train`, as users of a command line expect it."""

import dataclasses
import json
import os
import re
import signal
from typing import get_args

import pytest
import tokenizers
import transformers
from typer.testing import CliRunner

from tbjax.cli import app
from tbjax.sharding import ShardingStrategy
from tbjax.training import command, config, learning_rate, logs, optimizer, precision
from tbjax.training.saving import saved_steps
from tests import tiny


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model that spells, and something to read."""
    folder = tmp_path_factory.mktemp("training")
    tiny.save(tiny.BY_NAME["llama"], folder / "model")
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i): 3 + i for i in range(26)} | {" ": 29}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder / "model")
    lines = [json.dumps({"text": f"the {size} cat sat on the {size} mat"}) for size in ("big", "small", "odd") * 8]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


OPTIONS = ["--mesh", "1,8,1", "--batch-size", "8", "--seq-len", "32", "--precision", "float32", "--log-every", "2"]


def test_a_run_from_the_command_line(place, tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps({"steps": 99, "learning_rate": 0.02, "schedule": "constant"}))
    result = run(
        *("train", place / "model", "--data", place / "data.jsonl", "--hold-out", "0.25", *OPTIONS),
        *("--config", tmp_path / "run.json", "--steps", "6", "--eval-every", "3"),
        *("--checkpoint-dir", tmp_path / "run", "--log", tmp_path / "log.jsonl", "--out", tmp_path / "out", "--json"),
        *("--html", tmp_path / "pages" / "run.html"),
    )
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^6 steps: loss .*, perplexity .*; wrote", result.stderr, re.MULTILINE)
    said = json.loads(result.stdout)
    assert (said["step"], said["end"], said["out"]) == (6, "finished", str(tmp_path / "out"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] == said["loss"] < 0.8 * losses[0]
    assert [line["step"] for line in lines if "perplexity" in line] == [3, 6]
    page = (tmp_path / "pages" / "run.html").read_text(encoding="utf-8")
    assert page.count("<circle") == 2  # the evaluations, on the curve
    assert "in steps 1 to 6" in page
    # What was written is what was trained, to others too.
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    assert not written.lm_head.weight.equal(before.lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").decode([3, 4]) == "ab"
    again = run(
        *("train", place / "model", "--data", place / "data.jsonl", "--hold-out", "0.25", *OPTIONS, "--steps", "6"),
        *("--checkpoint-dir", tmp_path / "run", "--json", "--quiet"),
    )
    assert (again.exit_code, again.stderr) == (0, "")
    assert json.loads(again.stdout)["step"] == 6  # it had them already
    # A scheduler's warning, after two steps more: saved, and said by the exit code.
    monkeypatch.setattr(logs.JsonLines, "write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ended = run(
        *(
            "train",
            place / "model",
            "--data",
            place / "data.jsonl",
            "--hold-out",
            "0.25",
            *OPTIONS,
            "--json",
            "--quiet",
        ),
        *("--config", tmp_path / "run.json", "--checkpoint-dir", tmp_path / "run", "--log", tmp_path / "log.jsonl"),
    )
    assert ended.exit_code == 128 + signal.SIGTERM
    said = json.loads(ended.stdout)
    assert said["end"] == "SIGTERM"
    assert 6 < said["step"] == saved_steps(tmp_path / "run")[-1] < 99


def test_the_part_of_the_data_that_is_meant_is_the_datas_options(place):
    hub = command._asked("wikitext", split="train", field="text", messages=None)
    assert hub == {"split": "train", "field": "text"}
    assert command._asked(str(place / "data.jsonl"), split=None, field=None, messages="turns") == {"messages": "turns"}
    assert command._asked("nowhere", split=None, field=None, messages=None) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{place}/data.jsonl", "--steps", "2", "--split", "train"], ["split 'train'", "jsonl"]),
        (["--data", "{place}/data.jsonl", "--steps", "2", "--field", "body"], ["body"]),
        (["--data", "nowhere.jsonl", "--steps", "2"], ["nowhere.jsonl"]),
        (["--data", "{place}/data.jsonl"], ["how many steps?", "--steps"]),
        (["--data", "{place}/data.jsonl", "--steps", "2", "--warmup", "2"], ["warmup=2", "steps=2"]),
        (["--data", "{place}/data.jsonl", "--steps", "2", "--save-every", "1"], ["save_every=1", "checkpoint_dir"]),
    ],
)
def test_what_goes_wrong_is_one_paragraph(place, arguments, words):
    result = run("train", place / "model", *OPTIONS, *(text.replace("{place}", str(place)) for text in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model"],
        ["model", "--data", "a.txt", "--steps", "0"],
        ["model", "--data", "a.txt", "--steps", "1", "--optimizer", "adam"],
        ["model", "--data", "a.txt", "--steps", "1", "--mesh", "4"],
        ["model", "--data", "a.txt", "--steps", "1", "--eval-every", "1"],
        ["model", "--data", "a.txt", "--steps", "1", "--eval-data", "b.txt", "--hold-out", "0.1"],
        ["model", "--data", "a.txt", "--steps", "1", "--eval-split", "test"],
        ["model", "--data", "a.txt", "--steps", "1", "--field", "text", "--messages", "turns"],
    ],
)
def test_what_is_not_understood_is_a_usage_error(arguments):
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_a_config_that_is_no_object_or_is_another_library_s_is_told(tmp_path):
    for text, words in (
        ("[1]", "a JSON object of TrainConfig's fields"),
        ('{"steps": 1, "max_grad_norm": 1}', "clip_norm"),
    ):
        (tmp_path / "run.json").write_text(text)
        result = run("train", "model", "--data", "a.txt", "--config", tmp_path / "run.json")
        assert result.exit_code == 1
        assert words in result.stderr


def test_the_choices_are_the_trainers():
    assert get_args(command.Optimizer) == get_args(optimizer.Name)
    assert get_args(command.Schedule) == get_args(learning_rate.Schedule)
    assert set(get_args(command.Precision)) == set(precision.DTYPES)
    assert get_args(command.Strategy) == tuple(ShardingStrategy)
    assert set(get_args(command.NotFinite)) == set(get_args(precision.OnNonfinite))
    assert get_args(command.FailedSave) == get_args(config.FailedSavePolicy)


def test_the_defaults_that_the_help_names_are_the_configs():
    defaults = {field.name: field.default for field in dataclasses.fields(config.TrainConfig)} | config.USUAL
    help_text = re.sub(r"[\s│]+", " ", CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"]).stdout)
    for name in "optimizer learning_rate schedule warmup weight_decay clip_norm on_nonfinite precision".split():
        option = f"--{name.replace('_', '-')}"
        said = re.search(rf"{option} .*?\[default: \(?([^)\]]*)\)?\]", help_text)
        assert said, option
        assert said[1] == str(defaults[name]), option
