"""Write a model back as a Hugging Face checkpoint: the family's table read backwards, one tensor at a time.

A source tensor is put together from the parameters' parts that are bound to it, written, and forgotten, so the host
holds one tensor however large the model is. The files are plain safetensors, whose header can be written before any
tensor is there, since it says only shapes and places.

All of it is written to a folder beside the destination, flushed to the disk, and renamed at the end. An export that is
killed leaves a folder `.NAME.partial-PID` to delete, and under NAME what was there before.

With several processes every one takes part in gathering each tensor and the first writes. What goes wrong in the first
is raised in all, so that none waits for it.
"""

import collections
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from interop import companions
from interop.bindings import Binding, Bounds, bindings, rectangles, source_shapes
from interop.copying import copy
from interop.families import Family
from interop.families import family as family_of
from interop.writer import CheckpointWriter, Layout, code
from tbjax import checkpoint, stored
from tbjax.config import ModelConfig
from tbjax.dtypes import float_dtype
from tbjax.folders import agree
from tbjax.mesh import AXES
from tbjax.model import Decoder
from tbjax.quantize.convert import refuse
from tbjax.sharding import Sharding, by_path

# As transformers shards by default: files that are still easy to move.
MAX_SHARD_BYTES = 5_000_000_000


def export(
    model: Any,
    config: ModelConfig,
    family: Family,
    folder: str | Path,
    *,
    config_json: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write `model` into `folder`. Every process calls this with the same arguments; the first one writes.

    `dtype` defaults to that of each parameter. `tokenizer` is anything with `save_pretrained`. A folder that stands
    there is refused unless it is empty or, with `overwrite`, a checkpoint.
    """
    refuse(model, "are not exported")
    texts = (config_json, generation_config, tokenizer)
    _export(by_path(model), model, config, family, Path(folder), texts, dtype, max_shard_bytes, overwrite)


def export_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> int:
    """Write our own checkpoint at `source`, of a run say, as a Hugging Face one; returns the bytes of its weights.

    No device holds any of it, and the host one tensor at a time: it takes no mesh as large as the one that trained.
    """
    path = checkpoint.local(source)
    about = checkpoint.read_about(path)
    beside = companions.unpack(about.companions, str(path))
    if beside is None:
        raise ValueError(f"{path} was made from a bare ModelConfig, so there is no Hugging Face config to write.")
    if about.quantization is not None:
        raise ValueError(
            f"{path} has weights quantised by {about.quantization}; such are not exported: load it, and save what "
            "`model.dequantized()` gives, whose weights are in full."
        )
    checkpoint.verify_together(path, (f"{checkpoint.PARAMETERS}/",), "full")
    slices = stored.Slices(path / checkpoint.PARAMETERS)
    parameters = {name: _Stored(slices, name, struct) for name, struct in about.parameters.items()}
    one = Sharding(AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    model = one.place(jax.eval_shape(lambda: Decoder(about.config, one, dtype=about.dtype)))
    checkpoint.check_same(about.parameters, by_path(model), path)
    translation = family_of(about.config.family)
    _export(parameters, model, about.config, translation, Path(folder), beside, dtype, max_shard_bytes, overwrite)
    return sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in about.parameters.values())


class _Stored(NamedTuple):
    """A parameter on the disk."""

    slices: stored.Slices
    path: str
    struct: jax.ShapeDtypeStruct

    @property
    def dtype(self) -> Any:
        return self.struct.dtype


def _export(
    parameters: Mapping[str, Any],
    model: Any,
    config: ModelConfig,
    family: Family,
    folder: Path,
    beside: tuple[Mapping[str, Any], Mapping[str, Any] | None, Any],
    dtype: Any,
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    config_json, generation_config, tokenizer = beside
    wanted = None if dtype is None else float_dtype(dtype)
    bound = bindings(model, config, family)
    dtypes = {b.source: wanted or _stored_dtype(b, parameters[b.path].dtype) for b in reversed(bound)}
    layout = {name: (dtypes[name], shape) for name, shape in source_shapes(bound).items()}
    parts: dict[str, list[Binding]] = collections.defaultdict(list)
    for binding in bound:
        parts[binding.source].append(binding)

    texts = {"config.json": with_dtype(config_json, next(iter(layout.values()))[0])}
    if generation_config is not None:
        texts["generation_config.json"] = dict(generation_config)
    shards = plan_shards(layout, max_shard_bytes)
    with CheckpointWriter(folder, overwrite, active=jax.process_index() == 0) as writer:
        writer.begin()
        agree(writer.error)
        for file, names in shards.items():
            writer.open(file, {name: layout[name] for name in names})
            for name in names:
                tensor = None
                with writer.noting():
                    tensor = gather(parts[name], parameters, *layout[name])
                writer.write(tensor)
            writer.close()
            agree(writer.error)
        writer.finish(texts, tokenizer)
        agree(writer.error)


def plan_shards(layout: Layout, max_shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in order. A tensor above the limit gets a file of its own."""
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes!r}: a positive number of bytes is needed.")
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def with_dtype(config_json: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """config.json for weights of `dtype`, under the field that it already has (old configs say torch_dtype)."""
    fields = [name for name in ("dtype", "torch_dtype") if name in config_json] or ["dtype"]
    return {**config_json, **dict.fromkeys(fields, dtype.name)}


def gather(
    parts: Sequence[Binding], parameters: Mapping[str, Any], dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray | None:
    """A source tensor from all that is bound to it; None in every process but the first. Every process calls this.

    What goes wrong in the first is raised only when all parts have been gathered, since the others take part in that.
    """
    tensor, error = None, None
    for binding in parts:
        for bounds, piece in _pieces(parameters[binding.path], binding.part):
            if jax.process_index() != 0 or error is not None:
                continue
            try:
                tensor = np.empty(shape, dtype) if tensor is None else tensor
                values = np.asarray(piece)
                for rectangle in rectangles(binding, bounds):
                    part = values[rectangle.target]
                    copy(tensor[rectangle.source], part.T if binding.transpose else part)
            except (FloatingPointError, MemoryError, RuntimeError) as failure:
                error = failure
    if error is not None:
        raise ValueError(f"tensor {parts[0].source!r} cannot be written as {dtype}{list(shape)}: {error}.") from error
    return tensor


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _stored_dtype(binding: Binding, dtype: Any) -> np.dtype:
    dtype = np.dtype(dtype)
    if code(dtype) is None:
        raise ValueError(f"{binding.path}: {dtype} cannot be stored in safetensors: name another dtype.")
    return dtype


def _pieces(array: Any, index: tuple[int, ...]) -> Iterator[tuple[Bounds, Any]]:
    """Arrays that together hold `array` at `index`, on this process's first device, with their bounds in the array."""
    if isinstance(array, _Stored):
        if jax.process_index() == 0:
            shape = array.struct.shape[len(index) :]
            values = array.slices.read(array.path, index).reshape((*(1,) * len(index), *shape))
            yield (*((i, i + 1) for i in index), *((0, size) for size in shape)), values
        return
    if array.is_fully_addressable and all(device.platform == "cpu" for device in array.sharding.device_set):
        # The shards are in host memory already: numpy sees them without a copy.
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                bounds = tuple(part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True))
                yield bounds, shard.data
        return
    mesh = array.sharding.mesh
    whole = _selector(mesh)(array, tuple(np.int32(i) for i in index))
    jax.block_until_ready(whole)  # so that a process that only takes part does not run ahead, holding tensors
    yield (*((i, i + 1) for i in index), *((0, size) for size in whole.shape[len(index) :])), whole.addressable_data(0)


@functools.cache
def _selector(mesh: jax.sharding.Mesh) -> Any:
    """A function of an array and an index of its first dimensions: what lies there, on every device of the mesh."""

    def select(array: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        starts = (*index, *(np.int32(0),) * (array.ndim - len(index)))
        return jax.lax.dynamic_slice(array, starts, (*(1,) * len(index), *array.shape[len(index) :]))

    return jax.jit(select, out_shardings=NamedSharding(mesh, PartitionSpec()))
