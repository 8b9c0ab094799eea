"""The small files beside a checkpoint's weights (config, generation config, tokenizer), as texts for an Orbax one.

So that Hugging Face -> Orbax -> Hugging Face loses nothing, although the format between knows nothing of Hugging
Face: to it these are names and texts.
"""

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Appended to the name of a file that is not text (a SentencePiece model).
ENCODED = ".base64"


class Companions(NamedTuple):
    """What stands beside the weights."""

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tokenizer: Any  # a transformers tokenizer, or None


def pack(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, tokenizer: Any) -> dict[str, str]:
    """File names and texts, to be read again by `unpack`."""
    files = {CONFIG: json.dumps(dict(config))}
    if generation_config:
        files[GENERATION_CONFIG] = json.dumps(dict(generation_config))
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    name, text = _as_text(path)
                    files.setdefault(f"{path.parent.relative_to(folder) / name}", text)
    return files


def unpack(files: Mapping[str, str]) -> Companions | None:
    """What `pack` put there; None where the files are not Hugging Face's (a model made from a bare `ModelConfig`)."""
    if CONFIG not in files:
        return None
    generation_config = files.get(GENERATION_CONFIG)
    return Companions(
        json.loads(files[CONFIG]),
        None if generation_config is None else json.loads(generation_config),
        _tokenizer(files),
    )


def _as_text(path: Path) -> tuple[str, str]:
    content = path.read_bytes()
    try:
        return path.name, content.decode()
    except UnicodeDecodeError:
        return path.name + ENCODED, base64.b64encode(content).decode()


def _tokenizer(files: Mapping[str, str]) -> Any:
    if not any("tokenizer" in name for name in files):
        return None
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = (Path(folder) / name.removesuffix(ENCODED)).resolve()
            if not path.is_relative_to(Path(folder).resolve()):
                raise ValueError(f"the checkpoint's companion file {name!r} points outside its folder.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(text) if name.endswith(ENCODED) else text.encode())
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
