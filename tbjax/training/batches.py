"""From a process's rows of a batch to one array over all devices.

Data comes as each process's own rows, in numpy: the processes' rows one after another are the batch. Where tp or pp
crosses processes, several of them hold the same rows and must be given the same; `share_of_rows` says which share.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from tbjax.sharding import Sharding
from tbjax.training.state import Batch


class Shape(NamedTuple):
    """What all batches of a run have in common."""

    rows: int  # over all processes
    sequence: int
    fields: tuple[str, ...]  # those that are not None


class Feed:
    """Batches of a run, checked and laid over the devices, one at a time."""

    def __init__(self, data: Iterable[Any], sharding: Sharding, vocab_size: int, name: str = "data") -> None:
        self.shape: Shape | None = None
        self._rows: Iterator[Any] = iter(data)
        self._sharding = sharding
        _, self._shares = share_of_rows(sharding)
        self._vocab_size = vocab_size
        self._name = name
        self._taken = 0

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        for _ in range(count):
            self._next()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        batch = self._next()
        shape = Shape(
            self._shares * batch.tokens.shape[0],
            batch.tokens.shape[1],
            tuple(field for field, value in zip(Batch._fields, batch, strict=True) if value is not None),
        )
        if self.shape is not None and shape != self.shape:
            # Another shape would compile another step, in the middle of the run and on every process at once.
            raise ValueError(f"{self._place()} has {_spell(shape)}, but those before it {_spell(self.shape)}.")
        self.shape = shape
        return to_devices(batch, shape.rows, self._sharding)

    def _next(self) -> Batch:
        given = next(self._rows)
        self._taken += 1
        if not isinstance(given, Batch):
            try:
                given = Batch(**given) if hasattr(given, "keys") else Batch(*given)
            except TypeError as error:
                raise TypeError(
                    f"{self._place()} is a {type(given).__name__}: a Batch is needed, or a dict or tuple of its fields "
                    f"({', '.join(Batch._fields)})."
                ) from error
        batch = Batch(*(None if value is None else np.asarray(value) for value in given))
        self._check(batch)
        return batch

    def _check(self, batch: Batch) -> None:
        for field, value in zip(Batch._fields, batch, strict=True):
            if value is None:
                if field in ("tokens", "targets"):
                    raise ValueError(f"{self._place()} has no {field}.")
                continue
            if value.ndim != 2 or value.dtype.kind not in "iub" or value.shape != batch.tokens.shape:
                raise ValueError(
                    f"{self._place()}: {field} is {value.dtype}{list(value.shape)}; integers [batch, sequence] of the "
                    f"shape of tokens, {list(batch.tokens.shape)}, are needed."
                )
        for field, least in (("tokens", 0), ("targets", None)):
            value = getattr(batch, field)
            low, high = (int(value.min()), int(value.max())) if value.size else (0, 0)
            if high >= self._vocab_size or (least is not None and low < least):
                raise ValueError(
                    f"{self._place()}: {field} holds {high if high >= self._vocab_size else low}, but the model's "
                    f"vocabulary is 0 to {self._vocab_size - 1}. Was the data tokenised for another model?"
                )

    def _place(self) -> str:
        return f"batch {self._taken} of {self._name}"


def share_of_rows(sharding: Sharding) -> tuple[int, int]:
    """Which share of a batch's rows is this process's, and how many shares there are."""
    ways = sharding.size("dp", "fsdp", "ep")
    spec = sharding.activation(("batch", "sequence"), (ways, 1))
    places = NamedSharding(sharding.mesh, spec).devices_indices_map((ways, 1))
    rows: dict[int, set[int]] = {}
    for device, index in places.items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(ways)))
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, shares)) != ways:
        raise ValueError(
            f"the processes' devices hold rows of the batch that overlap in part ({shares[:3]}, ... of {ways}): order "
            "the mesh's devices so that each process holds rows of its own, or the same as another."
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def own_share(data: Any, sharding: Sharding) -> Any:
    """The data of this process: where tp or pp crosses processes, several have the same."""
    share = share_of_rows(sharding)
    if hasattr(data, "share") and share != (jax.process_index(), jax.process_count()):
        return data.share(*share)
    return data


def to_devices(batch: Batch, rows: int, sharding: Sharding) -> Batch:
    """This process's rows of a batch of `rows`, as arrays over all devices."""

    def put(value: np.ndarray) -> jax.Array:
        shape = (rows, value.shape[1])
        where = NamedSharding(sharding.mesh, sharding.activation(("batch", "sequence"), shape))
        # One dtype for all: token files have many, and each would compile a step of its own.
        return jax.make_array_from_process_local_data(where, value.astype(np.int32, copy=False), shape)

    return jax.tree.map(put, batch)


def _spell(shape: Shape) -> str:
    return f"{shape.rows} sequences of {shape.sequence} tokens ({', '.join(shape.fields)})"
