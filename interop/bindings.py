"""A family's table, spelled out for one model: which rectangle of which tensor is which part of which parameter.

A table row speaks of every layer and expert at once, and does not know how the decoder stacks its layers. `bindings`
resolves it: one `Binding` for each source tensor and each parameter that has a part in it. Reading a checkpoint and
writing one are then the same work in two directions: `rectangles` says, for any part of a parameter, where it lies in
its source.

A wrong table must not pass. Every element of every parameter is bound exactly once, and the rows that several
parameters take from one fused tensor must tile it, or `bindings` and `source_shapes` raise.
"""

import collections
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp

from interop.families import Family, Weight
from interop.readers.base import Checkpoint, CheckpointError, Index
from tbjax.config import ModelConfig
from tbjax.sharding import Leaf, whole_leaves

BLOCK = "block."
EXPERT = "{expert}"

# How many names an error lists before it only counts.
NAMED = 5

Bounds = Sequence[tuple[int, int]]


class Binding(NamedTuple):
    """A part of the parameter `path` and the source tensor that it is read from and written to."""

    source: str
    path: str
    part: tuple[int, ...]  # which part, along the parameter's first dimensions: in a stack (row[, expert])
    shape: tuple[int, ...]  # of that part, without the padding of the vocabulary
    rows: tuple[tuple[int, int], ...]  # runs of the source's first dimension that put together are the part's
    transpose: bool  # the source is the part with its two dimensions swapped
    fused: bool  # other bindings have the rest of the source


class Rectangle(NamedTuple):
    """A rectangle of a source tensor, and where it lies in an array that holds some of the parameter."""

    source: Index
    target: tuple[int | slice, ...]


def bindings(model: Any, config: ModelConfig, family: Family) -> tuple[Binding, ...]:
    """Every binding of `model` (abstract or not): first what stands outside the blocks, then layer after layer.

    A quantised weight is bound like a full one.
    """
    parameters = {leaf.path: leaf for leaf in whole_leaves(model)}
    table = family.weights(config)
    found: list[Binding] = []
    used: set[Weight] = set()
    for weight in table:
        if not weight.target.startswith(BLOCK):
            used.add(weight)
            if weight.target not in parameters:
                _refuse(family, f"{weight.source} is bound to {weight.target}, which the model does not have")
            found.append(_bind(weight, weight.source, parameters[weight.target], (), config, family))
    rows = [model.sharding.stack(group.repeats).places for group in config.groups]
    for layer in range(config.layers):
        place = config.place(layer)
        row = rows[place.group][place.repeat]
        for weight in table:
            path = f"stacks.{place.group}.{place.position}.{weight.target.removeprefix(BLOCK)}"
            if not weight.target.startswith(BLOCK) or path not in parameters:
                continue
            used.add(weight)
            for index, source in _sources(weight, layer, row, config):
                found.append(_bind(weight, source, parameters[path], index, config, family))
    for weight in table:
        if weight not in used:
            _refuse(family, f"{weight.source} is bound to {weight.target}, which no layer has")
    _check_covered(found, parameters, rows, family)
    return tuple(found)


def source_shapes(bound: Sequence[Binding]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, in the order of `bound`; raises where fused rows do not tile a tensor."""
    parts: dict[str, list[Binding]] = collections.defaultdict(list)
    for binding in bound:
        parts[binding.source].append(binding)
    shapes = {}
    for name, sharing in parts.items():
        runs = sorted(run for binding in sharing for run in binding.rows)
        end = 0
        for start, stop in runs:
            if start != end:
                what = "used twice" if start < end else "in no parameter"
                rows = f"rows {min(start, end)} to {max(start, end)}"
                paths = ", ".join(binding.path for binding in sharing)
                raise ValueError(f"{name}: {rows} are {what}; the tensor is shared by {paths}.")
            end = stop
        rests = {_turned(binding)[1:] for binding in sharing}
        if len(rests) > 1:
            raise ValueError(f"{name}: its rows have different sizes in different parameters: {sorted(rests)}.")
        shapes[name] = (end, *rests.pop())
    return shapes


def check_checkpoint(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, config: ModelConfig, family: Family
) -> tuple[tuple[str, str], ...]:
    """Raises unless the checkpoint holds exactly these tensors. Reads names and shapes alone.

    A tied model may hold its embedding a second time; such pairs (copy, original) are returned, to be compared.
    """
    copies = check_names(shapes, {name: tensor.file for name, tensor in checkpoint.items()}, config, family)
    expected = {**shapes, **{copy: shapes[original] for copy, original in copies}}
    wrong = [
        f"{name} has shape {list(checkpoint[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if checkpoint[name].shape != shape
    ]
    if wrong:
        first = next(name for name, shape in expected.items() if checkpoint[name].shape != shape)
        raise CheckpointError(f"{checkpoint[first].file}: {_listed(wrong, 'tensor', '; ')}.")
    whole = [name for name in expected if not jnp.issubdtype(checkpoint[name].dtype, jnp.floating)]
    if whole:
        tensor = checkpoint[whole[0]]
        raise CheckpointError(
            f"{tensor.file}: {_listed(whole, 'tensor')} {_are(whole)} {tensor.dtype}: weights are floating-point "
            "numbers. If they are packed or quantised, load the checkpoint that they were made from."
        )
    return copies


def check_names(
    shapes: Collection[str], names: Mapping[str, Path], config: ModelConfig, family: Family
) -> tuple[tuple[str, str], ...]:
    """The part of `check_checkpoint` that needs only the tensors' names, and the files that they are in."""
    files = sorted({str(file) for file in names.values()})
    where = files[0] if len(files) == 1 else f"{len(files)} files, the first of them {files[0]}" if files else "no file"
    missing = [name for name in shapes if name not in names]
    if missing:
        raise CheckpointError(
            f"{where}: {_listed(missing, 'tensor')} of this {config.family} model {_are(missing)} missing. The "
            "checkpoint is incomplete, or its config.json belongs to another model."
        )
    copies = tuple((copy, of) for copy, of in family.copies if copy in names and copy not in shapes)
    known = {copy for copy, _ in copies}
    unexpected = [
        name
        for name in names
        if name not in shapes and name not in known and not any(re.fullmatch(p, name) for p in family.ignored)
    ]
    if unexpected:
        raise CheckpointError(
            f"{names[unexpected[0]]}: {_listed(unexpected, 'tensor')} {_are(unexpected)} not part of this "
            f"{config.family} model. Without them the results would be wrong: is config.json the checkpoint's own?"
        )
    return copies


def rectangles(binding: Binding, bounds: Bounds) -> list[Rectangle]:
    """Where the elements of `binding` within `bounds`, a (start, stop) for each dimension of the parameter, come from.

    A rectangle's target is in an array of just those bounds. The padding of the vocabulary is in none.
    """
    lead = len(binding.part)
    if not all(start <= i < stop for i, (start, stop) in zip(binding.part, bounds, strict=False)):
        return []
    local = tuple(i - start for i, (start, _) in zip(binding.part, bounds, strict=False))
    spans = [(start, min(stop, size)) for (start, stop), size in zip(bounds[lead:], binding.shape, strict=True)]
    if any(start >= stop for start, stop in spans):
        return []
    along = 1 if binding.transpose else 0  # the part's dimension that the source's rows are
    found = []
    before = 0  # rows in earlier runs
    for first, last in binding.rows:
        start, stop = max(spans[along][0], before), min(spans[along][1], before + last - first)
        if start < stop:
            part = [*spans[:along], (start, stop), *spans[along + 1 :]]
            source = [slice(*span) for span in (reversed(part) if binding.transpose else part)]
            source[0] = slice(first + start - before, first + stop - before)
            target = (slice(a - low, b - low) for (a, b), (low, _) in zip(part, bounds[lead:], strict=True))
            found.append(Rectangle(tuple(source), (*local, *target)))
        before += last - first
    return found


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _sources(weight: Weight, layer: int, row: int, config: ModelConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """The tensors that a row means in one layer, with their index in the stack."""
    if EXPERT not in weight.source:
        yield (row,), weight.source.format(layer=layer)
        return
    for expert in range(config.moe.experts if config.moe else 0):
        yield (row, expert), weight.source.format(layer=layer, expert=expert)


def _bind(
    weight: Weight, source: str, leaf: Leaf, index: tuple[int, ...], config: ModelConfig, family: Family
) -> Binding:
    sizes = [
        config.vocab_size if dim == "vocab" else size for dim, size in zip(leaf.dims, leaf.variable.shape, strict=True)
    ]
    shape = tuple(sizes[len(index) :])
    if weight.transpose and len(shape) != 2:
        _refuse(family, f"{source} is to be transposed, but {leaf.path} has {len(shape)} dimensions per tensor, not 2")
    if not shape:
        _refuse(family, f"{source} is bound to {leaf.path}, which has no dimension left for it")
    length = shape[1 if weight.transpose else 0]
    rows = ((0, length),) if weight.rows is None else weight.rows
    taken = sum(stop - start for start, stop in rows)
    if taken != length:
        _refuse(family, f"{source} gives {taken} rows to {leaf.path}, which has {length}")
    return Binding(source, leaf.path, index, shape, rows, weight.transpose, fused=weight.rows is not None)


def _check_covered(
    found: Sequence[Binding], parameters: Mapping[str, Leaf], rows: Sequence[Sequence[int]], family: Family
) -> None:
    """Raises unless each part of each parameter is bound once. `rows` are those of each group that stand for layers."""
    parts: dict[str, list[Binding]] = collections.defaultdict(list)
    for binding in found:
        parts[binding.path].append(binding)
    for path, leaf in parameters.items():
        if path not in parts:
            _refuse(family, f"no tensor is bound to {path}")
        indices = [binding.part for binding in parts[path]]
        index, times = collections.Counter(indices).most_common(1)[0]
        if times > 1:
            sources = [binding.source for binding in parts[path] if binding.part == index]
            _refuse(family, f"{path}{list(index)} is bound {times} times, to {', '.join(sources)}")
        if len({len(index) for index in indices}) > 1:
            _refuse(family, f"{path} is bound both by layer and by expert")
        spans: list[Iterable[int]] = [range(size) for size in leaf.variable.shape[: len(indices[0])]]
        if spans and leaf.dims[0] == "layers":
            spans[0] = rows[int(path.split(".")[1])]
        wanted = set(itertools.product(*spans))
        if wanted != set(indices):
            _refuse(family, f"no tensor is bound to {path}{list(min(wanted - set(indices)))}")


def _turned(binding: Binding) -> tuple[int, ...]:
    """The shape of the part as its source has it."""
    return binding.shape[::-1] if binding.transpose else binding.shape


def _listed(names: Sequence[str], kind: str, between: str = ", ") -> str:
    """`2 tensors (a, b)`, naming the first few."""
    more = f"{between}and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({between.join(names[:NAMED])}{more})"


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _refuse(family: Family, what: str) -> NoReturn:
    raise ValueError(f"interop/families: the weight table of {family.name!r} is wrong: {what}.")
