"""A family's weight table, read as plainly as it can be: numpy arrays, one row after the other.

The loader and the exporter read the same table with care for bytes and devices; this is what they must agree with.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from interop.families import Weight, family
from tbjax.config import ModelConfig
from tbjax.model import Decoder


class Entry(NamedTuple):
    """One row of the table for one layer and expert: where the tensor `source` lies in our tree."""

    source: str
    path: str
    index: tuple[int, ...]  # of the layer in its stack, and of the expert
    weight: Weight


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a decoder (or of a tree of its shape) by dotted path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of our parameters by path."""
    return {path: leaf.shape for path, leaf in paths(jax.eval_shape(lambda: Decoder(config))).items()}


def entries(config: ModelConfig) -> Iterator[Entry]:
    """The whole table, spelled out."""
    known = shapes(config)
    for weight in family(config.family).weights(config):
        if not weight.target.startswith("block."):
            yield Entry(weight.source, weight.target, (), weight)
            continue
        for layer in range(config.layers):
            group, position, index = config.place(layer)
            path = f"stacks.{group}.{position}.{weight.target.removeprefix('block.')}"
            if path not in known:
                continue
            if "{expert}" not in weight.source:
                yield Entry(weight.source.format(layer=layer), path, (index,), weight)
                continue
            for expert in range(config.moe.experts):
                yield Entry(weight.source.format(layer=layer, expert=expert), path, (index, expert), weight)


def read(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by path, from a checkpoint's tensors."""
    ours = {path: np.zeros(shape, next(iter(tensors.values())).dtype) for path, shape in shapes(config).items()}
    for entry in entries(config):
        value = tensors[entry.source]
        if entry.weight.rows is not None:
            value = np.concatenate([value[start:stop] for start, stop in entry.weight.rows])
        value = value.T if entry.weight.transpose else value
        place = _place(config, ours, entry)
        assert place.shape == value.shape, f"{entry.source}: {value.shape} does not fit {entry.path}: {place.shape}"
        place[...] = value
    return ours


def write(config: ModelConfig, ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, from our parameters by path."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for entry in entries(config):
        value = _place(config, ours, entry)
        value = value.T if entry.weight.transpose else value
        taken = 0
        for start, stop in entry.weight.rows or ((0, len(value)),):
            parts.setdefault(entry.source, []).append((start, value[taken : taken + stop - start]))
            taken += stop - start
        assert taken == len(value), f"{entry.source}: {len(value)} rows of {entry.path}, {taken} of them in the table"
    tensors = {}
    for source, runs in parts.items():
        runs.sort(key=lambda run: run[0])
        stops = np.cumsum([len(value) for _, value in runs])
        assert [start for start, _ in runs] == [0, *stops[:-1]], f"{source}: rows used twice, or not at all"
        tensors[source] = np.concatenate([value for _, value in runs])
    return tensors


def with_parameters(model: Decoder, ours: Mapping[str, np.ndarray]) -> Decoder:
    """The decoder with these parameters."""

    def replace(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        value = ours[jax.tree_util.keystr(path, simple=True, separator=".")]
        assert value.shape == leaf.shape
        return leaf.replace(jax.numpy.asarray(value, leaf.dtype))

    return jax.tree_util.tree_map_with_path(replace, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _place(config: ModelConfig, ours: Mapping[str, np.ndarray], entry: Entry) -> np.ndarray:
    """The part of our parameter that the entry is about, without the padding of the vocabulary."""
    place = ours[entry.path][entry.index]
    return place[: config.vocab_size] if entry.path in ("embedding.weight", "head.weight") else place
