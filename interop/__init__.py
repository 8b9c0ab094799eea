"""Everything Hugging Face and PyTorch: checkpoints of every format in and out, live PyTorch models, single tensors.

    model = interop.from_torch(transformers_model, mesh=(1, 4, 2))
    transformers_model = interop.to_torch(model)

Names are imported when first asked for: reading a checkpoint needs no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interop.torch_bridge import from_torch, tensor_to_jax, tensor_to_torch, to_torch

__all__ = ["from_torch", "tensor_to_jax", "tensor_to_torch", "to_torch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'interop' has no attribute {name!r}")
    return getattr(importlib.import_module("interop.torch_bridge"), name)


def __dir__() -> list[str]:
    return list(__all__)
