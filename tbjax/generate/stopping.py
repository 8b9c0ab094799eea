"""Where an answer ends, and what of it can be said while it is being written.

Tokens are not pieces of text: a character may take several, and what a token reads as may depend on those before it. So
stop strings are looked for in the text of the tokens together, and text is given out only once no later token can
change it: without a character of which bytes are missing, and without an end that a stop string may begin with.

An answer ends before its stop string, as it ends before its end token.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

End: TypeAlias = Literal["eos", "stop", "length"]

# What a decoder writes for bytes that are no character (yet).
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Bytes of one character in UTF-8: so many missing ones at the end of a text may still come.
CHARACTER = 4

# Tokens that are decoded again with those that follow: as many as a character may take, and a few for tokenizers that
# join a token to the one before it (a space that is left out at a beginning, say).
OVERLAP = 8


class Answer:
    """The tokens of one answer, and their text as far as it is settled."""

    def __init__(
        self,
        budget: int,
        eos: Sequence[int] = (),
        decode: Callable[[list[int]], str] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.end: End | None = None if budget else "length"
        self._budget = budget
        self._eos = frozenset(eos)
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._text = ""  # of all tokens so far
        self._settled = 0  # tokens whose text no later one changes
        self._settled_text = ""
        self._given = 0  # characters that `piece` has given out
        self._given_tokens = 0

    @property
    def text(self) -> str:
        """Of all tokens."""
        return self._text

    @property
    def missing(self) -> int:
        """How many tokens there may still be."""
        return 0 if self.end else self._budget - len(self.tokens)

    def take(self, tokens: Sequence[int], log_probabilities: Sequence[float] | None = None) -> None:
        """More tokens, up to where the answer ends; what is behind that is dropped."""
        for number, token in enumerate(tokens):
            if self.end is None and token in self._eos:
                self.end = "eos"
            if self.end:
                break  # not return: the tokens before it are still to be read
            self.tokens.append(token)
            if log_probabilities is not None:
                self.log_probabilities.append(log_probabilities[number])
            if self._stops:
                self._look_for_stops()
            if self.end is None and len(self.tokens) >= self._budget:
                self.end = "length"
        if self._decode is not None and not self._stops:
            self._read()

    def piece(self) -> str:
        """The text that has been settled since the last call; with the end of the answer, all that is left."""
        until = len(self._text) if self.end else len(self._text) - self._open()
        piece = self._text[self._given : until]
        self._given = max(self._given, until)
        return piece

    def new_tokens(self) -> list[int]:
        """The tokens since the last call that no stop string can take back."""
        until = len(self.tokens)
        if self._stops and self.end is None:
            kept = len(self._text) - self._begun()
            while until and len(self._of(self.tokens[:until])) > kept:
                until -= 1
        new = self.tokens[self._given_tokens : until]
        self._given_tokens = max(self._given_tokens, until)
        return new

    def _look_for_stops(self) -> None:
        before = len(self._text)
        self._read()
        # A stop string that ends in what is new.
        longest = max(map(len, self._stops))
        start = max(0, min(before, len(self._text)) - longest - CHARACTER)
        found = [place for stop in self._stops if (place := self._text.find(stop, start)) >= 0]
        if not found:
            return
        self.end = "stop"
        whole, self._text = self._text, self._text[: min(found)]
        while self.tokens and len(whole) > len(self._text):
            self.tokens.pop()
            whole = self._of(self.tokens)
        del self.log_probabilities[len(self.tokens) :]

    def _read(self) -> None:
        """The text of all tokens: of those before the last few as it was, of the last few anew."""
        if self._decode is None:
            return
        first = max(0, self._settled - OVERLAP)
        before = self._decode(self.tokens[first : self._settled])
        after = self._decode(self.tokens[first:])
        if after.startswith(before) and not before.endswith(REPLACEMENT):
            self._text = self._settled_text + after[len(before) :]
        else:  # the tokenizer has read the overlap otherwise: all at once
            self._text = self._decode(self.tokens)
        if not self._text.endswith(REPLACEMENT):
            self._settled, self._settled_text = len(self.tokens), self._text

    def _of(self, tokens: list[int]) -> str:
        return self._decode(tokens) if self._decode is not None and tokens else ""

    def _open(self) -> int:
        """Characters at the end of the text that may still change or be taken back."""
        bytes_missing = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        return max(min(bytes_missing, CHARACTER), self._begun())

    def _begun(self) -> int:
        """Characters at the end with which a stop string may have begun."""
        longest = max(map(len, self._stops), default=0)
        for length in range(min(longest - 1, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stops):
                return length
        return 0
