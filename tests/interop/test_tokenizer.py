"""Tokenizers: made when asked for, written back as they came, in nobody's way when they are broken."""

import json
import logging

import pytest
import tokenizers
import transformers

import tbjax
from interop.tokenizer import Tokenizer
from tests import tiny
from tests.interop import gguf_files


@pytest.fixture
def folder(tmp_path):
    """A model with a tokenizer that has several chat templates."""
    path = tmp_path / "model"
    tiny.save(tiny.BY_NAME["llama"], path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools"}
    tokenizer.save_pretrained(path)
    return path


def load(path):
    return tbjax.load(path, mesh=(8, 1, 1), progress=False)


def files(folder):
    names = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {str(name): content for name, content in names.items() if "token" in name.name or name.suffix == ".jinja"}


def test_it_is_made_on_first_use_and_once(folder, monkeypatch):
    made = []
    make = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: made.append(a) or make(*a, **k))
    model = load(folder)
    assert not made
    assert model.tokenizer("hello")["input_ids"] == [1]
    assert model.tokenizer is model.tokenizer
    assert len(made) == 1


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_its_files_are_written_as_they_were_read(folder, tmp_path, form):
    assert "additional_chat_templates/tool_use.jinja" in files(folder)
    tbjax.save(load(folder), tmp_path / "there", form)
    load(tmp_path / "there").save_pretrained(tmp_path / "back")
    assert files(tmp_path / "back") == files(folder)
    load(folder).save_pretrained(tmp_path / "back", overwrite=True)  # which holds a folder of templates
    assert load(tmp_path / "back").tokenizer.chat_template == {
        "default": "{{ messages[0]['content'] }}",
        "tool_use": "tools",
    }


@pytest.mark.parametrize(
    "damage",
    [
        {"tokenizer.json": "{broken"},
        {"tokenizer.json": "{}"},
        {"tokenizer_config.json": '{"tokenizer_class": "NobodysTokenizer"}', "tokenizer.json": None},
    ],
    ids=["not JSON", "empty", "unknown"],
)
def test_a_broken_one_is_in_nobodys_way_until_there_is_text(folder, tmp_path, damage):
    (folder / "vocab.json").write_text("{}")
    for name, text in damage.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    model = load(folder)
    assert len(model.generate([1, 2, 3], max_new_tokens=2)) <= 2
    with pytest.raises(ValueError, match=rf"{folder}: its tokenizer cannot be made \(.*token ids") as raised:
        model.generate("hello")
    assert raised.value.__cause__ is not None
    model.save_pretrained(tmp_path / "out")
    assert files(tmp_path / "out") == files(folder)


def test_one_that_only_transformers_could_write_is_left_out_with_a_word(tmp_path, caplog, monkeypatch):
    """OLMo 2 as GGUF: its weights are read, but transformers does not know its tokenizer."""
    write = gguf_files.write_metadata

    def with_tokenizer(writer, architecture, config):
        write(writer, architecture, config)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * config["vocab_size"])
        writer.add_token_types([1] * config["vocab_size"])

    monkeypatch.setattr(gguf_files, "write_metadata", with_tokenizer)
    _, file = gguf_files.make("olmo2", tmp_path)
    model = load(file)
    with pytest.raises(ValueError, match=r"model\.gguf: its tokenizer cannot be made"):
        model.generate("hello")
    with caplog.at_level(logging.WARNING, logger="interop.tokenizer"):
        model.save_pretrained(tmp_path / "out")
    assert next(record.message for record in caplog.records if record.name == "interop.tokenizer").startswith(
        f"written without a tokenizer. {file}: its tokenizer cannot be made"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors"}
    assert not files(tmp_path / "out")


def test_two_of_the_same_bytes_are_equal(tmp_path):
    ours = {"tokenizer.json": b"{}", "config.json": b"{}"}
    one, two = (Tokenizer.from_files(dict(ours), where) for where in ("here", "there"))
    assert one == two
    assert hash(one) == hash(two)
    assert one != Tokenizer.from_files({**ours, "tokenizer.json": b"[]"}, "here")
    assert one != Tokenizer.from_files({"tokenizer.jsonn": b"{}", "config.json": b"{}"}, "here")
    assert one != json
    made = object()
    assert Tokenizer.of(made) == Tokenizer.of(made)
    assert Tokenizer.of(made) != Tokenizer.of(object())
