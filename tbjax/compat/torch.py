"""What training scripts take from the name `torch` itself: dtypes, devices, AdamW, `save`.

    from tbjax.compat import torch

    torch.cuda.set_device(local_rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

It is no PyTorch: tensors and modules are PyTorch's own, and go in and out by `interop`.
"""

from pathlib import Path

from tbjax import api
from tbjax.compat import cuda as cuda
from tbjax.compat import distributed as distributed
from tbjax.compat import optim as optim
from tbjax.compat.wrapped import StateDict

float32, bfloat16, float16 = "float32", "bfloat16", "float16"


def save(obj: StateDict, f: str | Path) -> None:
    """Write what `state_dict()` gave, as a checkpoint of tbjax's: a folder, each process its own part of it."""
    if not isinstance(obj, StateDict):
        raise TypeError(f"what is saved is a wrapped model's state_dict(), not a {type(obj).__name__}.")
    api.save(obj.model, f, format="orbax")
