"""The small files beside the weights, as texts."""

import json

import pytest

from interop import companions


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
    assert companions.unpack(files) == companions.Companions({"a": 1}, {"b": [2]}, None)
    assert companions.unpack(companions.pack({"a": 1}, None, None)).generation_config is None


def test_files_of_somebody_else_are_left_alone():
    assert companions.unpack({"note.txt": "for the reader"}) is None


def test_a_name_that_leaves_the_folder_is_refused():
    with pytest.raises(ValueError, match=r"'\.\./tokenizer\.json' points outside"):
        companions.unpack({"config.json": "{}", "../tokenizer.json": "{}"})
