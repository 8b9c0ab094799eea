"""Batches, in an order that is the same however many processes share it.

The rows of all data are numbered (`packing`). Epoch after epoch, each in an order of its own that the seed gives, they
make one endless sequence; a batch is the next `batch_size` of it, and each process takes its contiguous share of every
batch. So where a run stands is one number, how many rows have been given out, and any number of processes goes on from
there: no row comes twice in an epoch, none is left out, and a batch may begin in one epoch and end in the next.

Order, batching and reading ahead are Grain's; it is imported when the first batch is asked for.
"""

import contextlib
import copy
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Required, Self, TypedDict

import numpy as np

from tbjax.training.data.corpus import Corpus
from tbjax.training.data.packing import Packing, Rows, pack
from tbjax.training.state import Batch

AHEAD = 4  # batches that are read while the devices work


class Options(TypedDict, total=False):
    """What every data set has besides its source."""

    seq_len: Required[int]  # tokens of a row
    batch_size: Required[int]  # rows of a batch, over all processes
    seed: int  # of the order of rows, and of which documents share one (default: 0)
    packing: Packing  # "fit" (default), "concat", or None: see tbjax.training.data.packing
    separate: bool  # True (default): documents in one row do not see each other
    shuffle: bool  # False: everything in the order in which it was given, each epoch the same


class Dataset:
    """Batches of this process without end. Iterating goes on from where the data set stands; `len` is an epoch's.

    A batch has `tokens` and `targets` and, where documents are kept apart, `segments`: int32 arrays [B, S]. Its targets
    are IGNORED at a document's end, in padding, and where a prompt is only to be read; its padding is of segment 0.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        packing: Packing = "fit",
        separate: bool = True,
        shuffle: bool = True,
        documents: np.ndarray | None = None,
        skipped: int = 0,
    ) -> None:
        """`documents` are the numbers of those to use (default: all)."""
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r} must be a whole number that is not negative.")
        self.corpus = corpus
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.packing: Packing = packing
        self.separate = separate
        self.shuffle = shuffle
        self.skipped = skipped  # bad records that were left out
        self.documents = np.arange(len(corpus.lengths)) if documents is None else documents
        mixing = seed if shuffle else None
        self.rows: Rows = pack(corpus, self.documents, seq_len, packing, separate=separate, seed=mixing)
        self._examples = 0
        self._share: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches in an epoch; the last may be filled up from the next epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.corpus.name}: {len(self.documents):,} documents, {self.rows.tokens:,} tokens in "
            f"{len(self.rows):,} rows of {self.seq_len} ({self.efficiency:.1%} full), {self.batch_size} to a batch>"
        )

    @property
    def efficiency(self) -> float:
        """The share of all places where a token stands rather than padding."""
        return self.rows.efficiency

    @property
    def epoch(self) -> float:
        """How often all rows have been given out."""
        return self._examples / len(self.rows)

    def share(self, index: int, count: int) -> Self:
        """The same data for process `index` of `count`. Without it, JAX is asked which process this is."""
        if self.batch_size % count:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared by {count} processes: it must be a multiple of {count}."
            )
        if not 0 <= index < count:
            raise ValueError(f"index={index} is no process of {count}: they are 0 to {count - 1}.")
        shared = copy.copy(self)
        shared._share = index, count
        return shared

    def hold_out(self, share: float) -> tuple[Self, Self]:
        """Two data sets: all but a `share` of the documents, and those, drawn by the seed (at least one)."""
        if not 0 < share < 1 or len(self.documents) < 2:
            raise ValueError(
                f"hold_out({share}) of {self.corpus.name} ({len(self.documents)} documents): a share is between 0 and "
                "1, and both parts need a document. Text has more of them with documents='line' or 'paragraph', and a "
                "file of tokens with end=, the token that ends one."
            )
        count = min(max(1, round(share * len(self.documents))), len(self.documents) - 1)
        order = np.random.default_rng((self.seed, len(self.documents))).permutation(self.documents)
        return self._with(np.sort(order[count:])), self._with(np.sort(order[:count]))

    def evaluation(self, batches: int | None = None) -> "Evaluation":
        """All rows once in a fixed order, or those of the first `batches`."""
        return Evaluation(self, batches)

    def state(self) -> dict[str, Any]:
        """Where the data set stands: the same on every process, for JSON."""
        return {"examples": self._examples} | self._identity()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with any number of processes and any batch size.

        The data and how its rows are made and ordered must be the same.
        """
        examples = state.get("examples")
        if not isinstance(examples, int) or examples < 0:
            raise ValueError(f"the state of the data has examples={examples!r}, not how many rows have been given out.")
        differing = [
            f"{name} {state.get(name)!r}, here {value!r}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self.corpus.name}: the state is of other data or of another order of it: {'; '.join(differing)}. "
                "Its place means nothing here: give the same data and options, or begin anew without it."
            )
        self._examples = examples

    def __iter__(self) -> Iterator[Batch]:
        at, source = -1, contextlib.ExitStack()
        with source:
            batches: Any = None
            while True:
                if at != self._examples:  # at the first batch, or when something else has moved it
                    source.close()
                    batches = self._batches()
                    source.callback(batches.close)
                batch = next(batches)
                self._examples += self.batch_size
                at = self._examples
                yield batch

    def _batches(self) -> Any:
        """Grain's iterator over this process's share of every batch from here on."""
        grain = import_grain()
        rows = grain.MapDataset.source(self.rows)
        if self.shuffle:
            rows = rows.shuffle(seed=int(np.random.SeedSequence(self.seed).generate_state(1)[0]))
        return batches_of(rows.repeat()[self._examples :], self)

    def _identity(self) -> dict[str, Any]:
        """What decides which row comes when."""
        return {
            "rows": len(self.rows),
            "documents": zlib.crc32(self.documents.astype(np.int64).tobytes()),  # which of the corpus
            "seq_len": self.seq_len,
            "seed": self.seed,
            "packing": self.packing,
            "separate": self.separate,
            "shuffle": self.shuffle,
            "corpus": self.corpus.fingerprint,
        }

    def _with(self, documents: np.ndarray) -> Self:
        options = {name: getattr(self, name) for name in Options.__annotations__}
        other = type(self)(self.corpus, documents=documents, **options)
        other._share = self._share
        return other


class Evaluation:
    """The rows of a data set once, in a fixed order; each `for` begins anew. Empty rows fill the last batch."""

    def __init__(self, dataset: Dataset, batches: int | None = None) -> None:
        if batches is not None and batches < 1:
            raise ValueError(f"evaluation({batches}) needs at least one batch.")
        self._dataset = dataset
        self._batches = len(dataset) if batches is None else min(batches, len(dataset))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        rows = _Filled(self._dataset.rows, len(self) * self._dataset.batch_size)
        with contextlib.closing(batches_of(import_grain().MapDataset.source(rows), self._dataset)) as batches:
            yield from batches


class _Filled:
    """Rows, and empty ones behind them, up to a number of rows."""

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows = rows
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Batch:
        return self._rows[row] if row < len(self._rows) else self._rows.empty()


def batches_of(rows: Any, dataset: Dataset) -> Any:
    """Of Grain's data set of rows, in batches, this process's share of each: rows that follow each other."""
    index, count = dataset._share or _process()
    dataset.share(index, count)
    options = import_grain().ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    batched = rows.batch(dataset.batch_size // count, drop_remainder=True)
    return iter(batched[index::count].to_iter_dataset(options))


def _process() -> tuple[int, int]:
    import jax

    return jax.process_index(), jax.process_count()


def import_grain() -> Any:
    """Grain, or what to install."""
    try:
        import grain
    except ImportError as error:
        raise ImportError("data is put in order and batched by `grain`: pip install 'tbjax[train]'.") from error
    return grain
