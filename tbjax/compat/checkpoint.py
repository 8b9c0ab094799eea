"""`torch.distributed.checkpoint`: a wrapped model's parameters to a folder and back, each process its own part.

    save(state_dict=model.state_dict(), storage_writer=FileSystemWriter(path))
    load(state_dict=model.state_dict(), storage_reader=FileSystemReader(path))

The folder is a checkpoint of tbjax's, which goes onto any mesh.
"""

import dataclasses
from pathlib import Path

import jax

from tbjax import api, checkpoint
from tbjax.compat.wrapped import StateDict
from tbjax.training.holding import adopt


@dataclasses.dataclass(frozen=True)
class FileSystemWriter:
    """Where to write."""

    path: str | Path


@dataclasses.dataclass(frozen=True)
class FileSystemReader:
    """Where to read."""

    path: str | Path


def save(state_dict: StateDict, storage_writer: FileSystemWriter) -> None:
    """Write what `state_dict()` gave."""
    api.save(_checked(state_dict).model, storage_writer.path, format="orbax")


def load(state_dict: StateDict, storage_reader: FileSystemReader) -> None:
    """Give the model whose `state_dict()` this is what was saved, on whatever mesh."""
    source = _checked(state_dict).source
    there = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), source)
    adopt(source, checkpoint.restore(there, storage_reader.path))


def _checked(state: StateDict) -> StateDict:
    if not isinstance(state, StateDict):
        raise TypeError(f"state_dict is a {type(state).__name__}: a wrapped model's state_dict() is needed.")
    return state
