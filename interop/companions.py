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

from interop.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# Appended to the name of a file that is not text (a SentencePiece model).
ENCODED = ".base64"


class Companions(NamedTuple):
    """What stands beside the weights."""

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tokenizer: Tokenizer | None


def pack(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> dict[str, str]:
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


def unpack(files: Mapping[str, str], where: str) -> Companions | None:
    """What `pack` put there; None where the files are not Hugging Face's (a model made from a bare `ModelConfig`).

    `where` is what errors about the tokenizer name.
    """
    if CONFIG not in files:
        return None
    generation_config = files.get(GENERATION_CONFIG)
    its_own = dict(_as_bytes(name, text) for name, text in files.items() if name != GENERATION_CONFIG)
    return Companions(
        json.loads(files[CONFIG]),
        None if generation_config is None else json.loads(generation_config),
        Tokenizer.from_files(its_own, where) if its_own.keys() - {CONFIG} else None,
    )


def _as_text(path: Path) -> tuple[str, str]:
    content = path.read_bytes()
    try:
        return path.name, content.decode()
    except UnicodeDecodeError:
        return path.name + ENCODED, base64.b64encode(content).decode()


def _as_bytes(name: str, text: str) -> tuple[str, bytes]:
    if name.endswith(ENCODED):
        return name.removesuffix(ENCODED), base64.b64decode(text)
    return name, text.encode()
