"""Documents as token ids, one behind the other, in memory or in files that are mapped into it.

Whatever data is given as, this is what it becomes before the first step: one long sequence of ids, and where each
document begins in it. The lengths of all documents are then known, which packing, exact resumption and the length of an
epoch need; and tokenising is over before a device waits for it.

A corpus that is to be used again, or that memory does not hold, is written to a folder once (`write`) and mapped from
there (`read_folder`): `ids.bin`, `lengths.npy`, `learn.bin` where some tokens are only to be read, and `corpus.json`.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

DESCRIPTION = "corpus.json"
FORMAT = 1

# Of ids in files, so many are held against the vocabulary before the first step (a second or two); of what lies beyond,
# each row is when it is read.
CHECKED = 2**29
CHUNK = 2**24

# A fingerprint reads this many stretches of this many ids, evenly spread: a few pages of a file of any size.
STRETCHES, STRETCH = 64, 1024


class Document(NamedTuple):
    """One document's ids."""

    ids: np.ndarray
    learn: np.ndarray | None = None  # bool: which of them are to be learned, rather than only read; None: all


@dataclasses.dataclass(frozen=True)
class Shard:
    """Ids of one source: an array, or a file that is mapped."""

    name: str
    ids: np.ndarray
    learn: np.ndarray | None = None


class Part(NamedTuple):
    """Some ids that follow each other."""

    ids: np.ndarray  # int32
    learn: np.ndarray | None

    def learned(self) -> np.ndarray:
        return np.ones(len(self.ids), bool) if self.learn is None else self.learn.astype(bool)


class Corpus:
    """Documents, by their number; a token, by its place in all of them."""

    def __init__(self, shards: Sequence[Shard], lengths: np.ndarray, vocabulary: int | None = None) -> None:
        """`lengths` of the documents, of which none crosses from one shard into the next."""
        self.shards = tuple(shards)
        self.lengths = np.asarray(lengths, np.int64)
        self.vocabulary = vocabulary
        self._shard_starts = np.cumsum([0, *(len(shard.ids) for shard in shards)])
        if not len(self.lengths):
            raise ValueError(f"{self.name}: there is no document to learn from.")

    @property
    def name(self) -> str:
        names = [shard.name for shard in self.shards]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def read(self, start: int, stop: int) -> Part:
        """The ids from `start` to `stop`, which are of one document."""
        number = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        shard, base = self.shards[number], int(self._shard_starts[number])
        here = slice(start - base, stop - base)
        ids = shard.ids[here]
        if self.vocabulary is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            _refuse_ids(shard, ids, start - base, self.vocabulary)
        return Part(ids.astype(np.int32), None if shard.learn is None else np.asarray(shard.learn[here]))

    def check_ids(self) -> Self:
        """Hold the ids against the vocabulary, as far as that takes no noticeable time."""
        if self.vocabulary is None:
            return self
        left = CHECKED
        for shard in self.shards:
            for start in range(0, min(len(shard.ids), left), CHUNK):
                ids = shard.ids[start : start + min(CHUNK, left - start)]
                if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
                    _refuse_ids(shard, ids, start, self.vocabulary)
            left = max(0, left - len(shard.ids))
        return self

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same documents, wherever they lie."""
        digest = hashlib.sha256()
        total = int(self._shard_starts[-1])
        digest.update(f"{total} {len(self.lengths)}".encode())
        digest.update(_spread(self.lengths).tobytes())
        for start in np.unique(np.linspace(0, max(0, total - STRETCH), STRETCHES, dtype=np.int64)).tolist():
            for shard, base in zip(self.shards, self._shard_starts.tolist(), strict=False):
                low, high = max(start, base), min(start + STRETCH, base + len(shard.ids))
                if low < high:
                    digest.update(shard.ids[low - base : high - base].astype(np.int64).tobytes())
                    if shard.learn is not None:
                        digest.update(np.asarray(shard.learn[low - base : high - base], bool).tobytes())
        return digest.hexdigest()[:16]


def gather(documents: Iterable[Document], name: str, vocabulary: int | None) -> Corpus:
    """A corpus in memory."""
    ids, learn = io.BytesIO(), io.BytesIO()
    lengths, dtype = _append(documents, ids, learn, vocabulary)
    return Corpus([_shard(name, np.frombuffer(ids.getbuffer(), dtype), learn.getbuffer())], lengths, vocabulary)


def write(documents: Iterable[Document], folder: Path, vocabulary: int | None) -> None:
    """A corpus in a folder. It appears there when it is complete."""
    if folder.exists():
        raise FileExistsError(f"{folder}: it exists. Tokens are written to a folder of their own.")
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with (unfinished / "ids.bin").open("wb") as ids, (unfinished / "learn.bin").open("wb") as learn:
        lengths, dtype = _append(documents, ids, learn, vocabulary)
    if not len(lengths):
        raise ValueError(f"{folder}: there is no document to write.")
    np.save(unfinished / "lengths.npy", lengths)
    description = {"format": FORMAT, "dtype": dtype.name, "documents": len(lengths), "tokens": int(lengths.sum())}
    (unfinished / DESCRIPTION).write_text(json.dumps(description | {"vocabulary": vocabulary}, indent=2) + "\n")
    unfinished.rename(folder)


def read_folder(folder: Path, vocabulary: int | None = None) -> Corpus:
    """A corpus that `write` wrote, mapped."""
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        dtype, known, tokens = np.dtype(description["dtype"]), description["vocabulary"], description["tokens"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: it does not describe a corpus ({error!r}).") from error
    if description.get("format") != FORMAT:
        raise ValueError(f"{file}: it is of format {description.get('format')!r}, this tbjax reads {FORMAT}.")
    ids = map_file(folder / "ids.bin", dtype)
    if len(ids) != tokens:
        raise ValueError(f"{folder / 'ids.bin'}: it holds {len(ids)} ids, {file} says {tokens}.")
    learn = folder / "learn.bin"
    flags = np.memmap(learn, np.uint8, "r") if learn.stat().st_size else np.empty(0, np.uint8)
    lengths = np.load(folder / "lengths.npy", allow_pickle=False)
    if int(lengths.sum()) != tokens:
        raise ValueError(
            f"{folder / 'lengths.npy'}: the documents have {int(lengths.sum())} ids, {file} says {tokens}."
        )
    return Corpus([_shard(str(folder), ids, flags)], lengths, vocabulary or known).check_ids()


def map_file(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The ids of a file: `.npy`, or nothing but ids of `dtype`."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: it is no array of numbers: {error}") from error
    else:
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            raise ValueError(f"{path}: its {size} bytes are no whole number of {dtype.name} ids. Give dtype=.")
        ids = np.memmap(path, dtype, "r")
    return check_integers(ids, str(path))


def check_integers(ids: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2) or not ids.size:
        raise ValueError(
            f"{name}: token ids are integers [tokens] or [documents, tokens], not {ids.dtype}{list(ids.shape)}."
        )
    return ids


def ends_of(ids: np.ndarray, end: int | None) -> np.ndarray:
    """The lengths of the documents in `ids`, each up to and with its `end`; without one all is one document."""
    if end is None:
        return np.array([len(ids)])
    chunks = range(0, len(ids), CHUNK)
    found = np.concatenate([np.flatnonzero(ids[start : start + CHUNK] == end) + start + 1 for start in chunks])
    if not len(found) or found[-1] != len(ids):
        found = np.append(found, len(ids))
    return np.diff(found, prepend=0)


def _append(
    documents: Iterable[Document], ids: io.BytesIO | BinaryIO, learn: io.BytesIO | BinaryIO, vocabulary: int | None
) -> tuple[np.ndarray, np.dtype[Any]]:
    dtype = np.dtype(np.uint16 if vocabulary is not None and vocabulary <= 2**16 else np.int32)
    lengths = []
    for document in documents:
        ids.write(document.ids.astype(dtype).tobytes())
        if document.learn is not None:
            learn.write(document.learn.astype(np.uint8).tobytes())
        lengths.append(len(document.ids))
    return np.array(lengths, np.int64), dtype


def _shard(name: str, ids: np.ndarray, learn: Any) -> Shard:
    return Shard(name, ids, np.frombuffer(learn, np.uint8) if len(learn) else None)


def _spread(values: np.ndarray) -> np.ndarray:
    return values[np.unique(np.linspace(0, len(values) - 1, min(len(values), 2**16), dtype=np.int64))]


def _refuse_ids(shard: Shard, ids: np.ndarray, start: int, vocabulary: int) -> None:
    wrong = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
    raise ValueError(
        f"{shard.name}: id {int(ids[wrong])} at place {start + wrong} is outside the vocabulary of {vocabulary}. The "
        "ids are of another tokenizer, or the file is of another dtype."
    )
