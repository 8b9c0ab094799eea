"""Which files of a folder are the checkpoint, and all of them behind one mapping.

A folder is searched in the order of how safely and how exactly its formats can be read: safetensors, then PyTorch's
pickles, then GGUF. Sharded checkpoints come with an index, a JSON map from tensor to file; it is believed only where
the files agree with it.
"""

import json
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from interop.readers.base import Checkpoint, CheckpointError, Format, MappedFile, SourceTensor
from interop.readers.pickled import read_pickled
from interop.readers.safetensors import read_safetensors

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = ".index.json"  # appended to either name
PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


def open_checkpoint(folder_or_file: Path | str, *, trust_pickle: bool = False) -> Checkpoint:
    """The checkpoint in a folder, a file (safetensors, GGUF, or with `trust_pickle` `.bin` and `.pt`) or an index."""
    path = Path(folder_or_file)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        path = find_weights(path)
    if path.name.endswith(INDEX):
        return _open_sharded(path, trust_pickle)
    if path.suffix == ".safetensors":
        return _assemble("safetensors", [path], trust_pickle)
    if path.suffix in PICKLED_SUFFIXES:
        return _assemble("torch", [path], trust_pickle)
    if path.suffix == ".gguf":
        from interop.readers.gguf import open_gguf

        return open_gguf(path)
    raise CheckpointError(
        f"{path}: not a checkpoint by its name: .safetensors, .bin, .pt, .pth, .gguf or {INDEX} is needed."
    )


def find_weights(folder: Path) -> Path:
    """The file to open in a folder: the weights themselves, or the index of their shards."""
    for name in (SAFETENSORS, SAFETENSORS + INDEX):
        if (folder / name).exists():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(
            f"{folder}: has {', '.join(file.name for file in others)} but neither {SAFETENSORS} nor "
            f"{SAFETENSORS}{INDEX} to say what belongs together. Name one file, or add the index."
        )
    for name in (PICKLED, PICKLED + INDEX):
        if (folder / name).exists():
            return folder / name
    quantised = sorted(folder.glob("*.gguf"))
    if len(quantised) == 1:
        return quantised[0]
    if quantised:
        raise CheckpointError(
            f"{folder}: has several GGUF files, {', '.join(file.name for file in quantised)}: name the one to open."
        )
    raise CheckpointError(
        f"{folder}: no weights here: none of {SAFETENSORS}, {SAFETENSORS}{INDEX}, {PICKLED}, {PICKLED}{INDEX}, a .gguf."
    )


def read_index(path: Path) -> dict[str, str]:
    """The map from tensor to file name, with every name inside the index's own folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that maps tensors to files.")
    for tensor, file in weight_map.items():
        beside = isinstance(file, str) and PurePath(file).name == file and file not in ("", "..") and "\0" not in file
        if not beside:
            raise CheckpointError(
                f"{path}: tensor {tensor!r} is said to be in {file!r}, which is no name of a file beside it."
            )
    return weight_map


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, this is a {type(contents).__name__}.")
    return contents


def _open_sharded(index: Path, trust_pickle: bool) -> Checkpoint:
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        tensor = next(tensor for tensor, name in weight_map.items() if name == missing[0])
        raise CheckpointError(
            f"{index}: the file {missing[0]} is missing (tensor {tensor!r} should be in it); {len(missing)} of "
            f"{len(names)} files are. Fetch them again."
        )
    form: Format = "safetensors" if index.name.endswith(f".safetensors{INDEX}") else "torch"
    checkpoint = _assemble(form, [index.parent / name for name in names], trust_pickle)
    for tensor, name in weight_map.items():
        if tensor not in checkpoint:
            raise CheckpointError(f"{index}: tensor {tensor!r} should be in {name}, but that file does not have it.")
        if checkpoint[tensor].file.name != name:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} should be in {name}, but it is in {checkpoint[tensor].file.name}."
            )
    return checkpoint


def _assemble(form: Format, paths: Iterable[Path], trust_pickle: bool) -> Checkpoint:
    """The tensors of several files as one checkpoint; no tensor may be in two of them."""
    files: list[MappedFile] = []
    tensors: dict[str, SourceTensor] = {}
    for path in paths:
        if form == "safetensors":
            file, found = read_safetensors(path)
            files.append(file)
        else:
            found = read_pickled(path, trust_pickle=trust_pickle)
        for tensor in found:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name!r} is also in {tensors[tensor.name].file.name}: which one is meant?"
                )
            tensors[tensor.name] = tensor
    return Checkpoint(tensors, form, files)
