"""Which tokens stand together in a row.

A row has a fixed length, documents do not. Three ways to bring them together:

    fit      whole documents, each put into the row that it fills best (best fit, in decreasing order of length; the
             idea is that of Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Only a
             document longer than a row is cut.
    concat   documents one behind the other, cut wherever a row is full: no padding but in the last row.
    None     one document to a row, the rest of the row is padding.

The plan is made from the lengths alone, once, and says for every row which tokens it holds; so a row can be had by its
number. That is what makes the rest simple: an epoch is an order of row numbers, a process takes some of them, and where
a run stands is one integer. (Packers that work on a stream, such as Grain's, have a state of their own in each process,
and it is of no use to another number of processes.)

The target of a token is the one that follows it in its document, even where a row ends between the two. A document's
last token has none.

S tokens of a row, R rows, D documents, P pieces of documents.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import defaultdict
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from tbjax.training.data.corpus import Corpus
from tbjax.training.loss import IGNORED
from tbjax.training.state import Batch

Packing: TypeAlias = Literal["fit", "concat"] | None
PADDING = 0  # the token of padding: any would do, nothing is learned from it and nothing attends to it


class Rows(ABC):
    """Rows of one length by their number, each a `Batch` of [S] arrays."""

    def __init__(self, corpus: Corpus, seq_len: int, tokens: int) -> None:
        self.corpus = corpus
        self.seq_len = seq_len
        self.tokens = tokens  # of all documents

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Batch: ...

    @abstractmethod
    def empty(self) -> Batch:
        """A row from which nothing is learned."""

    @property
    def efficiency(self) -> float:
        """The share of the rows' places where a token stands."""
        return self.tokens / (len(self) * self.seq_len)

    def _blank(self) -> Batch:
        """Padding, documents apart."""
        tokens, targets, segments = (np.full(self.seq_len, fill, np.int32) for fill in (PADDING, IGNORED, 0))
        return Batch(tokens, targets, segments=segments)


def pack(
    corpus: Corpus, documents: np.ndarray, seq_len: int, packing: Packing, *, separate: bool, seed: int | None
) -> Rows:
    """Rows of `documents` (their numbers); a seed mixes which of them come together, None keeps their order."""
    if packing is not None and packing not in get_args(get_args(Packing)[0]):
        raise ValueError(f"packing={packing!r} is unknown: it is 'fit', 'concat' or None.")
    if seed is not None:
        documents = np.random.default_rng(seed).permutation(documents)
    if packing == "concat":
        return Concatenated(corpus, seq_len, documents) if separate else Joined(corpus, seq_len, documents)
    if not separate:
        raise ValueError(
            f"separate=False lets documents run on into each other: that is packing='concat', not {packing!r}."
        )
    return Fitted(corpus, seq_len, documents, share=packing == "fit")


class Fitted(Rows):
    """Whole documents, several to a row or one."""

    def __init__(self, corpus: Corpus, seq_len: int, documents: np.ndarray, *, share: bool) -> None:
        lengths = corpus.lengths[documents]
        super().__init__(corpus, seq_len, int(lengths.sum()))
        pieces = split(corpus.offsets[documents], lengths, seq_len)
        row = best_fit(pieces.lengths, seq_len) if share else np.arange(len(pieces.lengths))
        order = np.argsort(row, kind="stable")
        self._pieces = Pieces(*(array[order] for array in pieces))
        self._rows = np.concatenate([[0], np.cumsum(np.bincount(row))])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, row: int) -> Batch:
        batch, place = self._blank(), 0
        for segment, piece in enumerate(range(self._rows[row], self._rows[row + 1]), 1):
            start, length, ends = (int(array[piece]) for array in self._pieces)
            here = slice(place, place + length)
            ids, targets = _with_targets(self.corpus, start, start + length, ends=bool(ends))
            batch.tokens[here], batch.targets[here], batch.segments[here] = ids, targets, segment
            place += length
        return batch

    def empty(self) -> Batch:
        return self._blank()


class Concatenated(Rows):
    """Documents one behind the other, that do not see each other."""

    def __init__(self, corpus: Corpus, seq_len: int, documents: np.ndarray) -> None:
        self._starts = corpus.offsets[documents]
        self._places = np.concatenate([[0], np.cumsum(corpus.lengths[documents])])  # of each document in the stream
        super().__init__(corpus, seq_len, int(self._places[-1]))

    def __len__(self) -> int:
        return -(-self.tokens // self.seq_len)

    def __getitem__(self, row: int) -> Batch:
        batch, first = self._blank(), row * self.seq_len
        for segment, (start, stop, place, ends) in enumerate(self._parts(first, first + self.seq_len), 1):
            here = slice(place - first, place - first + stop - start)
            ids, targets = _with_targets(self.corpus, start, stop, ends=ends)
            batch.tokens[here], batch.targets[here], batch.segments[here] = ids, targets, segment
        return batch

    def empty(self) -> Batch:
        return self._blank()

    def _parts(self, first: int, last: int) -> Any:
        """What stands from `first` to `last` in the stream: (start and stop in the corpus, place, document ends)."""
        last = min(last, self.tokens)
        document = int(np.searchsorted(self._places, first, side="right")) - 1
        while first < last:
            end = int(self._places[document + 1])
            stop = min(end, last)
            start = int(self._starts[document]) + first - int(self._places[document])
            yield start, start + stop - first, first, stop == end
            first, document = stop, document + 1


class Joined(Concatenated):
    """Documents that run on into each other, as if they were one: rows without padding, and without segments.

    Every token but the first of all is a target once. The last row begins early enough to be full; what it repeats is
    there to be read, not to be learned again.
    """

    def __init__(self, corpus: Corpus, seq_len: int, documents: np.ndarray) -> None:
        super().__init__(corpus, seq_len, documents)
        if self.tokens <= seq_len:
            raise ValueError(
                f"separate=False fills rows of seq_len={seq_len} from the next document, but there are only "
                f"{self.tokens} tokens in all: a row needs {seq_len + 1}. A smaller seq_len or separate=True would do."
            )

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self.seq_len)

    def __getitem__(self, row: int) -> Batch:
        first = min(row * self.seq_len, self.tokens - 1 - self.seq_len)
        parts = [self.corpus.read(start, stop) for start, stop, _, _ in self._parts(first, first + self.seq_len + 1)]
        ids = np.concatenate([part.ids for part in parts])
        learn = np.concatenate([part.learned() for part in parts])
        learn[: row * self.seq_len - first + 1] = False  # the first has nothing in front, the others have been learned
        return Batch(ids[:-1], np.where(learn, ids, IGNORED)[1:].astype(np.int32))

    def empty(self) -> Batch:
        return Batch(*(np.full(self.seq_len, fill, np.int32) for fill in (PADDING, IGNORED)))

    @property
    def efficiency(self) -> float:
        return (self.tokens - 1) / (len(self) * self.seq_len)


class Pieces(NamedTuple):
    """Parts of documents that stand in one row each."""

    starts: np.ndarray  # [P] in the corpus
    lengths: np.ndarray  # [P]
    ends: np.ndarray  # [P] bool: the document's last


def split(starts: np.ndarray, lengths: np.ndarray, size: int) -> Pieces:
    """Documents in pieces of at most `size`, in order; all but a document's last are of that size."""
    counts = -(-lengths // size)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    inside = number * size
    return Pieces(
        starts[document] + inside, np.minimum(size, lengths[document] - inside), number == counts[document] - 1
    )


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The row of each piece: the longest first, each into the row with the least space that is enough.

    Rows are numbered by the first piece in each, so that an order in the pieces is one in the rows.
    """
    rows = np.empty(len(lengths), np.int64)
    spaces: list[int] = []  # that rows have left, each once, in ascending order: at most `size` different ones
    rows_with: defaultdict[int, list[int]] = defaultdict(list)
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        best = bisect_left(spaces, length)
        if best == len(spaces):
            row, space, count = count, size, count + 1
        else:
            space = spaces[best]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[best]
        rows[piece] = row
        if left := space - length:
            if not rows_with[left]:
                insort(spaces, left)
            rows_with[left].append(row)
    _, first, row = np.unique(rows, return_index=True, return_inverse=True)
    numbers = np.empty(count, np.int64)
    numbers[np.argsort(first)] = np.arange(count)
    return numbers[row]


def _with_targets(corpus: Corpus, start: int, stop: int, *, ends: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and what follows each, for a part of one document."""
    part = corpus.read(start, stop if ends else stop + 1)
    targets = np.where(part.learned(), part.ids, IGNORED)[1:]
    return part.ids[: stop - start], np.append(targets, IGNORED) if ends else targets
