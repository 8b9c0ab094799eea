"""Records out of files, each with the place it came from.

A trainer who is told "a record is bad" has been told nothing: what helps is the file and the line. So every reader here
yields a record together with its `Place`, and what cannot be read goes to `Refusals`, which stops there or, where asked
to, counts it and goes on.

JSON lines and text need only Python; Parquet and Arrow are read by `pyarrow`, which comes with Hugging Face `datasets`.
"""

import bz2
import dataclasses
import glob
import gzip
import json
import logging
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias, cast, get_args

log = logging.getLogger(__name__)

OnBad: TypeAlias = Literal["error", "skip"]
Documents: TypeAlias = Literal["file", "line", "paragraph"]
Paths: TypeAlias = str | Path | Sequence[str | Path]
# Which of a table's columns to read: pictures beside the text need not be decoded.
Choice: TypeAlias = Callable[[Sequence[str]], list[str]]

COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows' editors begin UTF-8 files with it


class Place(NamedTuple):
    """Where a record stands."""

    source: str
    number: int | None = None  # None: the whole of it
    unit: str = "line"

    def __str__(self) -> str:
        return self.source if self.number is None else f"{self.source}, {self.unit} {self.number}"


class BadRecord(ValueError):
    """A record that cannot be learned from; its message names the file and the line."""


@dataclasses.dataclass
class Refusals:
    """What becomes of bad records: the first raises `BadRecord`, or all are left out and counted."""

    on_bad: OnBad = "error"
    count: int = 0
    first: str = ""

    def __post_init__(self) -> None:
        if self.on_bad not in get_args(OnBad):
            raise ValueError(f"on_bad={self.on_bad!r} is unknown: it is 'error' or 'skip'.")

    def refuse(self, place: Place, why: str, cause: Exception | None = None) -> None:
        if self.on_bad == "error":
            raise BadRecord(f"{place}: {why} (on_bad='skip' leaves such records out.)") from cause
        self.count += 1
        self.first = self.first or f"{place}: {why}"

    def report(self) -> None:
        """Say once what was left out."""
        if self.count:
            log.warning("bad records left out: %d. The first of them: %s", self.count, self.first)


def find(source: Paths, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files that `source` means, in an order that is the same on every machine.

    A file, a pattern such as `corpus/**/*.txt`, a folder (its files that end in one of `suffixes`), or several of them.
    """
    if not isinstance(source, str | Path):
        return [path for entry in source for path in find(entry, suffixes)]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and plain_suffix(p) in suffixes]
        if not found:
            raise FileNotFoundError(f"{source}: the folder holds no file that ends in {' or '.join(suffixes)}.")
        return sorted(found)
    if glob.has_magic(str(path)):
        found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        if not found:
            raise FileNotFoundError(f"{source}: no file is matched by this pattern (in {Path.cwd()}).")
        return sorted(found)
    raise FileNotFoundError(f"{source}: there is no such file or folder (in {Path.cwd()}).")


def plain_suffix(path: Path) -> str:
    """What a file is, whether compressed or not: `.jsonl` of `a.jsonl.gz`."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def text_records(paths: Iterable[Path], documents: Documents, refusals: Refusals) -> Iterator[tuple[Place, str]]:
    """Texts: whole files, lines that are not blank, or paragraphs between blank lines."""
    if documents not in get_args(Documents):
        raise ValueError(f"documents={documents!r} is unknown: it is one of {', '.join(get_args(Documents))}.")
    for path in paths:
        if documents == "file":
            with _open(path) as file:
                content = file.read()
            text = _decoded(Place(str(path)), content.removeprefix(BYTE_ORDER_MARK), refusals)
            if text is not None:
                yield Place(str(path)), text
            continue
        start, kept = 1, []
        for number, line in _lines(path):
            text = _decoded(Place(str(path), number), line, refusals)
            if text is None:
                continue
            if documents == "line":
                if text.strip():
                    yield Place(str(path), number), text.rstrip("\r\n")
            elif text.strip():
                start = start if kept else number
                kept.append(text)
            elif kept:
                yield Place(str(path), start), "".join(kept).rstrip("\r\n")
                kept = []
        if kept:
            yield Place(str(path), start), "".join(kept).rstrip("\r\n")


def json_records(paths: Iterable[Path], refusals: Refusals) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects of JSON lines, or of a `.json` file that is one array of them; blank lines are passed over."""
    for path in paths:
        if plain_suffix(path) == ".json" and (array := _json_array(path)) is not None:
            placed = ((Place(str(path), number, "record"), entry) for number, entry in enumerate(array, 1))
        else:
            placed = _json_lines(path, refusals)
        for place, record in placed:
            if isinstance(record, dict):
                yield place, record
            else:
                refusals.refuse(place, f"a record must be a JSON object, this is {_kind(record)}.")


def parquet_records(paths: Iterable[Path], choose: Choice = list) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of Parquet files, a batch of them at a time."""
    arrow = _pyarrow()
    for path in paths:
        try:
            with arrow.parquet.ParquetFile(path) as file:
                yield from _rows(path, file.iter_batches(columns=choose(file.schema_arrow.names)))
        except arrow.ArrowException as error:
            raise BadRecord(f"{path}: it cannot be read as Parquet: {error}") from error


def arrow_records(paths: Iterable[Path], choose: Choice = list) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of Arrow files, in either of the two forms: with an index at the end, or a stream."""
    arrow = _pyarrow()
    for path in paths:
        try:
            with arrow.memory_map(str(path)) as file:
                try:
                    reader = arrow.ipc.open_file(file)
                    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
                except arrow.ArrowInvalid:
                    file.seek(0)
                    batches = arrow.ipc.open_stream(file)
                yield from _rows(path, (batch.select(choose(batch.schema.names)) for batch in batches))
        except arrow.ArrowException as error:
            raise BadRecord(f"{path}: it cannot be read as Arrow: {error}") from error


def hugging_face_records(
    source: Any, split: str | None, config: str | None, revision: str | None, choose: Choice = list
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of a data set of the library `datasets`: one of its objects, a folder that it saved, or a hub name."""
    dataset, name = _hugging_face(source, split, config, revision)
    if isinstance(dataset, Mapping):  # a DatasetDict
        splits = ", ".join(dataset)
        if split is None and len(dataset) != 1:
            raise ValueError(f"{name} has several splits: say which with split= ({splits}).")
        if split is not None and split not in dataset:
            raise ValueError(f"{name} has no split {split!r}: it has {splits}.")
        dataset = dataset[split] if split is not None else next(iter(dataset.values()))
    if dataset.column_names:  # a streamed one may not know them
        dataset = dataset.select_columns(choose(dataset.column_names))
    for number, record in enumerate(dataset):
        yield Place(name, number, "row"), cast(dict[str, Any], record)


def _hugging_face(source: Any, split: str | None, config: str | None, revision: str | None) -> tuple[Any, str]:
    if not isinstance(source, str | Path):
        return source, f"datasets.{type(source).__name__}"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source}: data sets of Hugging Face are read by `datasets`: pip install 'tbjax[train]'."
        ) from error
    if is_saved_dataset(Path(source)):
        return datasets.load_from_disk(str(source)), str(source)
    try:
        return datasets.load_dataset(str(source), config, split=split, revision=revision), str(source)
    except OSError as error:  # not there, not reached, or refused
        raise FileNotFoundError(
            f"{source}: there is no such file or folder, and the Hugging Face hub did not give it: {error}"
        ) from error


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield Place(str(path), number, "row"), record
            number += 1


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet and Arrow files are read by `pyarrow`: pip install 'tbjax[train]'.") from error
    return pyarrow


def _open(path: Path) -> BinaryIO:
    return COMPRESSED[path.suffix](path) if path.suffix in COMPRESSED else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line


def _json_lines(path: Path, refusals: Refusals) -> Iterator[tuple[Place, Any]]:
    for number, line in _lines(path):
        place = Place(str(path), number)
        text = _decoded(place, line, refusals)
        if text is None or not text.strip():
            continue
        try:
            yield place, json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            refusals.refuse(place, f"not JSON: {error.msg} at column {error.colno}.", error)


def _json_array(path: Path) -> list[Any] | None:
    """What a `.json` file holds if that is an array; None where it is lines after all."""
    with _open(path) as file:
        if not file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            return None
        file.seek(0)
        try:
            return json.loads(file.read())
        except json.JSONDecodeError as error:
            raise BadRecord(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}.") from error
        except UnicodeDecodeError as error:
            raise BadRecord(f"{path}: not UTF-8 at byte {error.start}: {error.reason}.") from error


def _decoded(place: Place, content: bytes, refusals: Refusals) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        if place.number is None:
            place = place._replace(number=before.count(b"\n") + 1)
        column = error.start - (before.rfind(b"\n") + 1) + 1
        refusals.refuse(place, f"not UTF-8 at byte {column} of the line ({error.reason}).", error)
        return None


def _kind(value: Any) -> str:
    known = {type(None): "null", bool: "a truth value", str: "a string", list: "an array", dict: "an object"}
    return known.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
