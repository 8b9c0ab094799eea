"""Texts to token ids.

A tokenizer is anything that acts like one of `transformers`. Texts go through it many at a time, which its threads
need; a very long one in pieces that end where a line does, because an encoding takes a hundred times the memory of its
text. (A tokenizer that looks across a line's end may then give other ids at those few places.)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tbjax.training.data.corpus import Document

# So many characters are tokenized together, and at most so many of one text in one piece.
TOGETHER = 2**20


class Tokenizer(Protocol):
    """What data needs of a tokenizer; those of `transformers` have it."""

    @property
    def bos_token_id(self) -> Any: ...
    @property
    def eos_token_id(self) -> Any: ...
    def __call__(self, text: Any, /, **options: Any) -> Mapping[str, Any]: ...
    def __len__(self) -> int: ...


class Encoder:
    """A tokenizer, with the tokens that begin and end a document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not callable(tokenizer):
            raise TypeError(f"a tokenizer is called with texts, as those of transformers are; this is {tokenizer!r}.")
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        # A beginning goes in front where the tokenizer itself puts one; an end always, as that is how a model learns to
        # stop.
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.begin = [begin] if begin is not None and self(["a"], special=True)[0][0] == begin else []
        self.end = [] if end is None else [end]

    def __call__(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The ids of each text."""
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options)["input_ids"]

    def documents(self, texts: Iterable[str]) -> Iterator[Document]:
        """Each text as a document of its own, with its beginning and end."""
        pieces: list[str] = []
        counts: list[int] = []
        size = 0
        for text in texts:
            cut = list(in_pieces(text, TOGETHER))
            pieces += cut
            counts.append(len(cut))
            size += len(text)
            if size >= TOGETHER:
                yield from self._together(pieces, counts)
                pieces, counts, size = [], [], 0
        yield from self._together(pieces, counts)

    def _together(self, pieces: Sequence[str], counts: Sequence[int]) -> Iterator[Document]:
        encoded = iter(self(pieces) if pieces else [])
        for count in counts:
            parts = [self.begin, *(next(encoded) for _ in range(count)), self.end]
            yield Document(np.concatenate([np.asarray(part, np.int64) for part in parts]))


def in_pieces(text: str, size: int) -> Iterator[str]:
    """`text` in pieces of up to `size` characters that end behind a line if one ends there, behind a word otherwise."""
    start = 0
    while len(text) - start > size:
        newline = text.rfind("\n", start, start + size)
        # A space belongs to the word behind it in most vocabularies.
        stop = newline + 1 if newline >= start else text.rfind(" ", start + 1, start + size)
        stop = stop if stop > start else start + size
        yield text[start:stop]
        start = stop
    yield text[start:]
