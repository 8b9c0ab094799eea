"""Data sets of whatever a trainer has: one function that recognises it, and one for each kind.

    from tbjax.training import data

    dataset = data.load("corpus/*.txt", tokenizer, seq_len=512, batch_size=8)
    dataset = data.jsonl("conversations.jsonl", tokenizer, messages="messages", seq_len=2048, batch_size=8)
    dataset = data.tokens("tokens.npy", vocabulary=32000, end=2, seq_len=4096, batch_size=64)
    training, held_out = dataset.hold_out(0.05)

Text is tokenized when the data set is made, in every process. What takes long to tokenize, or does not fit into memory,
is better written to a folder once (`write_tokens`) and mapped from there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import numpy as np

from tbjax.training.data import corpus as corpora
from tbjax.training.data import sources
from tbjax.training.data.chat import Learn
from tbjax.training.data.corpus import Corpus, Document, Shard
from tbjax.training.data.dataset import Dataset, Options
from tbjax.training.data.encoder import Encoder, Tokenizer
from tbjax.training.data.sources import Documents, OnBad, Paths, Place, Refusals
from tbjax.training.data.text import Fields, columns, documents_of

# What the files of each kind end in; compressed text and JSON lines end in .gz, .bz2 or .xz besides.
ENDINGS: Mapping[str, Sequence[str]] = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
    "tokens": (".npy", ".bin"),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Ids: TypeAlias = np.ndarray | Sequence[np.ndarray | Sequence[int]]


class TextOptions(Options, total=False):
    """Options of text besides those of every data set."""

    on_bad: OnBad  # "error" (default) stops at the first bad record, "skip" leaves such records out and counts them


class RecordOptions(TextOptions, total=False):
    """Options of records with fields.

    Where no field is named, the usual ones are looked for: messages, prompt with completion, text.
    """

    field: str  # of a text
    messages: str  # of a conversation: a list of {"role": ..., "content": ...}
    prompt: str  # of what is only read, a text or messages, and
    completion: str  # of what follows it
    learn: Learn  # "completions" (default): all that the assistant says; "last": its last turn; "all": prompts too


def load(source: Any, tokenizer: Tokenizer | None = None, **options: Any) -> Dataset:
    """The data set of `source`, whatever it is.

    A file, a pattern, a folder of files of one kind, a folder that `write_tokens` or `datasets` wrote, the name of a
    data set on the Hugging Face hub, an object of `datasets`, an array of token ids, or a list: of texts, of records,
    of arrays, of `Path`s. `options` are those of the function for this kind.
    """
    kind = kind_of(source)
    if kind == "tokens":
        return tokens(source, tokenizer, **options)
    if tokenizer is None:
        raise ValueError(f"{_name(source)} is read as {kind}, which needs a tokenizer: load(source, tokenizer, ...).")
    return _of_records(kind, source, tokenizer, options)


def text(
    source: Paths, tokenizer: Tokenizer, *, documents: Documents = "file", **options: Unpack[TextOptions]
) -> Dataset:
    """Plain text: each file is a document, or each line, or each paragraph between blank lines."""
    return _of_records("text", source, tokenizer, {"documents": documents, **options})


def jsonl(source: Paths, tokenizer: Tokenizer, **options: Unpack[RecordOptions]) -> Dataset:
    """JSON lines, or a `.json` file that is one array."""
    return _of_records("jsonl", source, tokenizer, {**options})


def parquet(source: Paths, tokenizer: Tokenizer, **options: Unpack[RecordOptions]) -> Dataset:
    """Parquet files, whose columns are the fields."""
    return _of_records("parquet", source, tokenizer, {**options})


def arrow(source: Paths, tokenizer: Tokenizer, **options: Unpack[RecordOptions]) -> Dataset:
    """Arrow files, whose columns are the fields."""
    return _of_records("arrow", source, tokenizer, {**options})


def hugging_face(
    source: Any,
    tokenizer: Tokenizer,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    **options: Unpack[RecordOptions],
) -> Dataset:
    """A data set of Hugging Face: an object of `datasets`, a folder that it saved, or a name on the hub.

    A streamed one is read to its end before the first step: take what you need of it (`.take(n)`).
    """
    where = {"split": split, "config": config, "revision": revision}
    return _of_records("hugging_face", source, tokenizer, {**where, **options})


def records(
    source: Iterable[str | Mapping[str, Any]], tokenizer: Tokenizer, **options: Unpack[RecordOptions]
) -> Dataset:
    """Texts, or dicts."""
    return _of_records("records", source, tokenizer, {**options})


def tokens(
    source: Paths | Ids,
    tokenizer: Tokenizer | None = None,
    *,
    vocabulary: int | None = None,
    end: int | None = None,
    dtype: str | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Token ids: `.npy` files, files of nothing but ids, a folder of `write_tokens`, or arrays.

    What a file of nothing but ids holds is `dtype`: uint16 by default, or uint32 where the vocabulary needs it.
    `end` is the id that ends a document (default: the tokenizer's, if one is given). Without it each file and each
    array is one document, and so is each row of an array [documents, tokens]. `vocabulary` (default: the tokenizer's)
    is what the ids must be less than.
    """
    if tokenizer is not None:
        vocabulary = vocabulary or len(tokenizer)
        end = tokenizer.eos_token_id if end is None else end
    return Dataset(_corpus_of_ids(source, vocabulary, end, dtype), **options)


def write_tokens(source: Any, tokenizer: Tokenizer, folder: str | Path, **options: Any) -> Path:
    """Tokenize `source` into `folder`, once, for `tokens(folder, ...)` and `load(folder, ...)`.

    `options` are those that say how this kind of source is read. Memory holds a stretch of it at a time.
    """
    kind = kind_of(source)
    if kind == "tokens":
        raise ValueError(f"{_name(source)} is tokens already.")
    documents, encoder, _, rest = _documents(kind, source, tokenizer, options)
    if rest:
        raise TypeError(f"{', '.join(rest)}: batches are made when the tokens are read, not when they are written.")
    corpora.write(documents, Path(folder).expanduser(), encoder.vocabulary)
    return Path(folder).expanduser()


def python_topics() -> list[str]:
    """A small text corpus that every CPython has: the reference that `help()` shows, about 65,000 words of English.

    Its 79 chapters (of Python 3.11; other versions differ a little) are under Python's own permissive licence (PSF).
    Good for examples and tests, where a corpus must not be fetched.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def kind_of(source: Any) -> str:
    """Which of the constructors reads `source`."""
    if isinstance(source, str | Path):
        return _kind_of_path(source)
    if type(source).__module__.partition(".")[0] == "datasets":
        return "hugging_face"
    if isinstance(source, np.ndarray):
        return "tokens"
    if isinstance(source, Sequence) and len(source):
        first = source[0]
        if isinstance(first, Path):
            return _kind_of_path(first)
        if isinstance(first, str | Mapping):
            return "records"
        if isinstance(first, np.ndarray | Sequence):
            return "tokens"
    raise TypeError(
        f"{type(source).__name__} is no data that can be recognised: give a path, a name, an array of ids, a data set "
        "of `datasets`, or a list of texts, records, arrays or Paths that is not empty."
    )


def _kind_of_path(source: str | Path) -> str:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / corpora.DESCRIPTION).is_file():
            return "tokens"
        if sources.is_saved_dataset(path):
            return "hugging_face"
        kinds = {kind for file in path.rglob("*") if file.is_file() and (kind := _kind_by_ending(file))}
        if len(kinds) == 1:
            return kinds.pop()
        raise ValueError(
            f"{source}: the folder holds {' and '.join(sorted(kinds)) or 'nothing that is known as data'}: give a "
            f"pattern such as {path / '*.jsonl'}, or use the function for one kind (data.text, data.jsonl, ...)."
        )
    if kind := _kind_by_ending(path):
        return kind
    if not path.exists() and not HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: there is no such file or folder, and it is no data set's name on the hub.")
    if path.exists():
        raise ValueError(
            f"{source}: what it is cannot be told from its ending {path.suffix!r}: use the function for its kind "
            "(data.text, data.jsonl, data.parquet, data.arrow, data.tokens)."
        )
    return "hugging_face"


def _kind_by_ending(path: Path) -> str | None:
    suffix = sources.plain_suffix(path)
    return next((kind for kind, endings in ENDINGS.items() if suffix in endings), None)


# How the records of each kind are read, with the options that are its own.


def _read_text(
    source: Paths, fields: Fields, refusals: Refusals, documents: Documents = "file"
) -> Iterator[tuple[Place, Any]]:
    return sources.text_records(sources.find(source, ENDINGS["text"]), documents, refusals)


def _read_jsonl(source: Paths, fields: Fields, refusals: Refusals) -> Iterator[tuple[Place, Any]]:
    return sources.json_records(sources.find(source, ENDINGS["jsonl"]), refusals)


def _read_parquet(source: Paths, fields: Fields, refusals: Refusals) -> Iterator[tuple[Place, Any]]:
    return sources.parquet_records(sources.find(source, ENDINGS["parquet"]), partial(columns, fields))


def _read_arrow(source: Paths, fields: Fields, refusals: Refusals) -> Iterator[tuple[Place, Any]]:
    return sources.arrow_records(sources.find(source, ENDINGS["arrow"]), partial(columns, fields))


def _read_hugging_face(
    source: Any,
    fields: Fields,
    refusals: Refusals,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Iterator[tuple[Place, Any]]:
    return sources.hugging_face_records(source, split, config, revision, partial(columns, fields))


def _read_list(source: Iterable[Any], fields: Fields, refusals: Refusals) -> Iterator[tuple[Place, Any]]:
    return ((Place("records", number, "number"), record) for number, record in enumerate(source))


READERS: Mapping[str, tuple[Callable[..., Iterator[tuple[Place, Any]]], Sequence[str]]] = {
    "text": (_read_text, ["documents"]),
    "jsonl": (_read_jsonl, []),
    "parquet": (_read_parquet, []),
    "arrow": (_read_arrow, []),
    "hugging_face": (_read_hugging_face, ["split", "config", "revision"]),
    "records": (_read_list, []),
}


def _of_records(kind: str, source: Any, tokenizer: Tokenizer, options: Mapping[str, Any]) -> Dataset:
    documents, encoder, refusals, rest = _documents(kind, source, tokenizer, options)
    corpus = corpora.gather(documents, _name(source), encoder.vocabulary)
    return Dataset(corpus, skipped=refusals.count, **rest)


def _documents(
    kind: str, source: Any, tokenizer: Tokenizer, options: Mapping[str, Any]
) -> tuple[Iterator[Document], Encoder, Refusals, dict[str, Any]]:
    """The documents of a source; and, once they have been read, what was refused; and the options that are left."""
    read, own = READERS[kind]
    rest = dict(options)
    take: Callable[[Iterable[str]], dict[str, Any]] = lambda names: {n: rest.pop(n) for n in names if n in rest}  # noqa: E731
    named = take(["field", "messages", "prompt", "completion"])
    fields = Fields(named.pop("field", None), **named).checked()
    refusals = Refusals(rest.pop("on_bad", "error"))
    encoder, learn = Encoder(tokenizer), rest.pop("learn", "completions")
    placed = read(source, fields, refusals, **take(own))
    return documents_of(placed, encoder, fields, learn, refusals), encoder, refusals, rest


def _corpus_of_ids(source: Any, vocabulary: int | None, end: int | None, dtype: str | None) -> Corpus:
    if isinstance(source, str | Path) and (Path(source).expanduser() / corpora.DESCRIPTION).is_file():
        return corpora.read_folder(Path(source).expanduser(), vocabulary)
    if isinstance(source, np.ndarray):
        arrays = [("array", source)]
    elif isinstance(source, str | Path) or isinstance(source[0], str | Path):
        stored = np.dtype(dtype or (np.uint32 if (vocabulary or 0) > 2**16 else np.uint16))
        arrays = [(str(path), corpora.map_file(path, stored)) for path in sources.find(source, ENDINGS["tokens"])]
    else:
        arrays = [(f"array {number}", np.asarray(ids)) for number, ids in enumerate(source)]
    shards, lengths = [], []
    for name, ids in arrays:
        corpora.check_integers(ids, name)
        shards.append(Shard(name, ids.reshape(-1)))
        lengths.append(np.full(len(ids), ids.shape[1]) if ids.ndim == 2 else corpora.ends_of(ids, end))
    return Corpus(shards, np.concatenate(lengths), vocabulary).check_ids()


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
