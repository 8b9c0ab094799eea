"""A tokenizer that is made when text is first used.

A model's weights are of use without it, so a tokenizer that is damaged or unknown does not stand in their way: what is
wrong is said when it is asked for. Until then it is the files that it comes from. They are also what is written back,
byte for byte, so that nothing is lost on the way through `transformers`.
"""

import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

from interop.advice import transformers
from interop.readers.gguf import parse

log = logging.getLogger(__name__)

CONFIG = "config.json"  # says which class of tokenizer it is where the tokenizer's own files do not
# Any of these holds a vocabulary; without one there is no tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
FILES = (
    CONFIG,
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


class Tokenizer:
    """What `make` gives, once. Two of one `identity` are equal: they come from the same bytes."""

    def __init__(
        self, where: str, identity: Hashable, make: Callable[[], Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        self._where = where  # for errors
        self._identity = identity
        self._make = make
        self._files = files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str) -> Self:
        """Of its files by name, as a folder of Hugging Face's has them."""
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{where}: the tokenizer's file {name!r} points outside its folder.")
        digest = hashlib.sha256()
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return cls(where, digest.hexdigest(), lambda: _from_files(files), files)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Of a folder, read now; None where there is no vocabulary in it."""
        if not any((folder / name).exists() for name in VOCABULARIES):
            return None
        found = sorted(path for pattern in FILES for path in folder.glob(pattern) if path.is_file())
        return cls.from_files({path.relative_to(folder).as_posix(): path.read_bytes() for path in found}, str(folder))

    @classmethod
    def from_gguf(cls, file: Path) -> Self | None:
        """Of a GGUF file; None where it has none."""
        kind = parse(file).metadata.get("tokenizer.ggml.model")
        if kind is None:
            return None
        state = file.stat()
        return cls(str(file), (str(file.resolve()), state.st_size, state.st_mtime_ns), lambda: _from_gguf(file, kind))

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """One that has been made."""
        return cls(type(tokenizer).__name__, id(tokenizer), lambda: tokenizer)

    @functools.cached_property
    def value(self) -> Any:
        """The `transformers` tokenizer."""
        try:
            return self._make()
        except Exception as error:  # the tokenizers library raises bare Exceptions
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{self._where}: its tokenizer cannot be made ({why}). The weights need none: token ids work in place "
                "of text."
            ) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write its files. One that has none and cannot be made is left out, which is logged."""
        if self._files is not None:
            _write(self._files, Path(folder))
            return
        try:
            tokenizer = self.value
        except ValueError as error:
            log.warning("written without a tokenizer. %s", error)
            return
        tokenizer.save_pretrained(folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _from_files(files: Mapping[str, bytes]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        _write(files, Path(folder))
        return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _from_gguf(file: Path, kind: str) -> Any:
    """Rebuilt by `transformers`."""
    # For a byte-level vocabulary the two give the same tokenizer (there is a test), but AutoTokenizer first reads the
    # whole file again for a config that it does not need, which takes twice as long as the rest.
    if kind == "gpt2":
        fast = transformers().PreTrainedTokenizerFast
        return fast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    return transformers().AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
