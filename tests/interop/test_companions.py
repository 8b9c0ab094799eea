"""The small files beside the weights, as texts."""

import json

import pytest

from interop import companions
from interop.tokenizer import Tokenizer


class Folderful:
    """Stands for a tokenizer: writes these files."""

    def __init__(self, files):
        self.files = files

    def save_pretrained(self, folder):
        for name, content in self.files.items():
            path = folder + "/" + name
            with open(path, "wb") as file:
                file.write(content)


def test_text_is_kept_as_text_and_what_is_not_is_encoded():
    files = companions.pack({"a": 1}, {"b": 2}, Folderful({"merges.txt": "é".encode(), "spiece.model": b"\xff\x00"}))
    assert json.loads(files["config.json"]) == {"a": 1}
    assert json.loads(files["generation_config.json"]) == {"b": 2}
    assert files["merges.txt"] == "é"
    assert files["spiece.model.base64"] == "/wA="


def test_a_tokenizer_does_not_replace_the_config():
    assert json.loads(companions.pack({"a": 1}, None, Folderful({"config.json": b"{}"}))["config.json"]) == {"a": 1}


def test_what_was_packed_is_unpacked():
    files = companions.pack({"a": 1}, {"b": [2]}, None)
    assert companions.unpack(files, "x") == companions.Companions({"a": 1}, {"b": [2]}, None)
    assert companions.unpack(companions.pack({"a": 1}, None, None), "x").generation_config is None


def test_files_of_somebody_else_are_left_alone():
    assert companions.unpack({"note.txt": "for the reader"}, "x") is None


@pytest.mark.parametrize("name", ["../tokenizer.json", "/tmp/tokenizer.json", "a/../../tokenizer.json"])
def test_a_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(ValueError, match=f"run/final: the tokenizer's file '{name}' points outside"):
        companions.unpack({"config.json": "{}", name: "{}"}, "run/final")


def test_a_tokenizer_comes_out_as_the_bytes_that_went_in(tmp_path):
    files = {"tokenizer.model": b"\xff\x00", "additional_chat_templates/tool_use.jinja": "é".encode()}
    packed = companions.pack({"a": 1}, None, Tokenizer.from_files(files, "here"))
    companions.unpack(packed, "there").tokenizer.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
