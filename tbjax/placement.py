"""Where each parameter of a model lies: how its dimensions are cut, and how many bytes that puts on each device.

Works on a model and on an abstract one, on a mesh of devices and on one that exists on paper only.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from rich import box
from rich.markup import escape
from rich.table import Table

from tbjax.dtypes import nbytes
from tbjax.sharding import Dims, axes_of, leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """One parameter."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    dims: Dims  # what each dimension means
    axes: tuple[tuple[str, ...], ...]  # the mesh axes that cut each dimension
    nbytes: int
    nbytes_per_device: int

    @property
    def layout(self) -> str:
        """`layers, heads/tp, embed/fsdp`: each dimension, and what cuts it."""
        return ", ".join("/".join([dim or "-", *axes]) for dim, axes in zip(self.dims, self.axes, strict=True))


def placements(model: nnx.Module) -> Iterator[Placement]:
    """The parameters of a sharded or abstract model, in tree order."""
    for leaf, array in zip(leaves(model), jax.tree.leaves(model), strict=True):
        shape, sharding = tuple(array.shape), array.sharding
        spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
        yield Placement(
            path=leaf.path,
            shape=shape,
            dtype=array.dtype.name,
            dims=leaf.dims,
            axes=tuple(map(axes_of, spec)),
            nbytes=nbytes(shape, array.dtype),
            nbytes_per_device=nbytes(sharding.shard_shape(shape), array.dtype),
        )


def table(model: nnx.Module, title: str | None = None) -> Table:
    """A table for the terminal, with the sums in its last line."""
    rows = list(placements(model))
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    result.add_column("parameter", f"{len(rows)} parameters", no_wrap=True)
    result.add_column("shape", overflow="fold")
    result.add_column("dimensions/axes that cut them", overflow="fold")
    result.add_column("bytes", readable(sum(row.nbytes for row in rows)), justify="right", no_wrap=True)
    result.add_column("a device", readable(sum(row.nbytes_per_device for row in rows)), justify="right", no_wrap=True)
    for row in rows:
        shape = escape(f"{row.dtype}[{','.join(map(str, row.shape))}]")  # as JAX writes it
        result.add_row(row.path, shape, row.layout, readable(row.nbytes), readable(row.nbytes_per_device))
    return result


def bytes_held(model: nnx.Module) -> dict[Any, int]:
    """What each device of this process holds of the model, counted from the arrays themselves."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(model):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + nbytes(shard.data.shape, shard.data.dtype)
    return held


def readable(nbytes: float) -> str:
    """`1234567` as `1.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
