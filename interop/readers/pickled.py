"""PyTorch's own files, `.bin` and `.pt`: a zip of raw tensors and a pickle that names them.

A pickle is a program. It is opened only when the caller says that it trusts the file, and even then through PyTorch's
restricted unpickler, which builds tensors and containers and nothing else. The tensors stay mapped: reading them
touches the file, not memory of our own.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from interop.readers.base import CheckpointError, UntrustedPickle
from interop.readers.memory import ArrayTensor

# Types that numpy lacks travel as integers of the same width.
CARRIERS: dict[str, tuple[str, np.dtype]] = {
    "bfloat16": ("uint16", np.dtype(ml_dtypes.bfloat16)),
    "float8_e4m3fn": ("uint8", np.dtype(ml_dtypes.float8_e4m3fn)),
    "float8_e5m2": ("uint8", np.dtype(ml_dtypes.float8_e5m2)),
}


def read_pickled(path: Path, *, trust_pickle: bool) -> list[ArrayTensor]:
    """The tensors of one `.bin` or `.pt` file."""
    if not trust_pickle:
        raise UntrustedPickle(str(path))
    contents = _load(path)
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path}: holds a {type(contents).__name__}, not a dictionary of tensors.")
    return [ArrayTensor(str(name), _array(path, str(name), tensor), path) for name, tensor in contents.items()]


def as_numpy(tensor: Any) -> np.ndarray:
    """A CPU `torch.Tensor` as a numpy array of the same memory, bfloat16 and float8 included."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach()
    if name not in CARRIERS:
        return tensor.numpy()
    carrier, dtype = CARRIERS[name]
    return tensor.view(getattr(torch, carrier)).numpy().view(dtype)


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: reading PyTorch's files needs PyTorch: pip install 'tbjax[interop]'.") from error
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, nothing was run: it holds more than tensors, or is corrupt. "
            f"PyTorch says: {_first_line(error)}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
        if "mmap can only be used" in str(error):
            raise CheckpointError(
                f"{path}: not PyTorch's zip format (older than PyTorch 1.6, or not its file at all), so it cannot be "
                "mapped. Write it again with a current torch.save, better as safetensors."
            ) from error
        raise CheckpointError(f"{path}: truncated or corrupt. PyTorch says: {_first_line(error)}") from error


def _array(path: Path, name: str, tensor: Any) -> np.ndarray:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor. Save the state dict alone: "
            "torch.save(model.state_dict(), file)."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {tensor.layout} {tensor.dtype}; only plain dense tensors are read."
        )
    try:
        return as_numpy(tensor)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the unknown dtype {tensor.dtype}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
