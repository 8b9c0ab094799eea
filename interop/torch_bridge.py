"""Live PyTorch models and tensors, without a detour over the disk.

A live transformers model is a checkpoint that happens to be in memory: `from_torch` gives its state dict the names that
it would have on the hub (in memory, transformers fuses experts; its own conversion undoes that) and hands it to the
loader that reads files. `to_torch` is the reverse: an export whose tensors go into a transformers model, not a file.

    model = interop.from_torch(module, mesh=(1, 4, 2))
    module = interop.to_torch(model)

Single tensors cross by DLPack and share memory: `tensor_to_jax`, `tensor_to_torch`.
"""

import copy
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from interop.bindings import Binding, bindings, source_shapes
from interop.export import gather
from interop.families import Fields, family
from interop.load import load_parameters
from interop.readers.base import Checkpoint, Index, SourceTensor
from interop.readers.memory import MEMORY
from interop.readers.pickled import CARRIERS, as_numpy
from interop.tokenizer import Tokenizer
from tbjax.dtypes import float_dtype
from tbjax.quantize.convert import refuse
from tbjax.sharding import leaves

if TYPE_CHECKING:
    import torch
    import transformers

    from tbjax.api import CausalLM
    from tbjax.mesh import MeshSpec

# What JAX narrows to 32 bits unless told otherwise.
WIDE_DTYPES = ("float64", "int64", "uint64", "complex128")


def from_torch(
    module: "transformers.PreTrainedModel", mesh: "MeshSpec" = None, *, dtype: Any = None, tokenizer: Any = None
) -> "CausalLM":
    """A live transformers causal language model as ours, on `mesh`. `dtype` defaults to the module's.

    The weights are copied: what is done to either model afterwards does not touch the other.
    """
    from tbjax import api

    _check_module(module)
    config_json = _config_json(module)
    translation = family(config_json["model_type"])
    config = translation.config(Fields(module.config.to_dict(), f"{type(module).__name__}.config"))
    tokenizer = None if tokenizer is None else Tokenizer.of(tokenizer)
    origin = api.Origin(config_json, _generation_config_json(module), tokenizer)
    dtype = str(module.dtype).removeprefix("torch.") if dtype is None else dtype
    model = api.abstract(config, mesh, dtype=dtype, origin=origin)
    tensors = {name: _TorchTensor(name, tensor) for name, tensor in _hub_tensors(module).items()}
    with Checkpoint(tensors, "memory") as checkpoint:
        return load_parameters(model, config, translation, checkpoint, progress=False)


def to_torch(model: "CausalLM", *, dtype: Any = None) -> "transformers.PreTrainedModel":
    """A live transformers model with the weights of ours, on the CPU. `dtype` defaults to the model's.

    Its parameters are made when their values arrive, gathered tensor by tensor: the host holds the weights once. Of a
    quantised model, give `model.dequantized()`.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("a PyTorch model is made of PyTorch: pip install 'tbjax[interop]'.") from error
    import transformers

    if model.origin is None:
        raise ValueError(
            "this model was made from a bare ModelConfig, so transformers does not know it: "
            "make it from a Hugging Face config (tbjax.from_config(config_json)) or with tbjax.load."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"to_torch gathers the model in one process, and there are {jax.process_count()}: "
            "write it with save_pretrained, and read it where PyTorch is to have it."
        )
    refuse(model, "do not go to PyTorch")
    config = transformers.CONFIG_MAPPING[model.origin.config["model_type"]].from_dict(dict(model.origin.config))
    wanted = float_dtype(model.dtype if dtype is None else dtype).name
    # transformers fills a model on the meta device from the mapping, fuses what it fuses, and ties what is tied.
    architecture: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module, loading = architecture.from_pretrained(
        None,
        config=config,
        state_dict=_lazy_tensors(model),
        dtype=getattr(torch, wanted),
        output_loading_info=True,
    )
    problems = {kind: sorted(names) for kind, names in loading.items() if names}
    if problems:
        raise ValueError(f"transformers did not take the weights of this {model.config.family} model: {problems}.")
    if model.origin.generation_config:
        module.generation_config = transformers.GenerationConfig.from_dict(dict(model.origin.generation_config))
    return module


# --- Single tensors ---------------------------------------------------------------------------------------------------


def tensor_to_jax(tensor: "torch.Tensor") -> jax.Array:
    """A PyTorch tensor as a JAX array of the same memory, on the same device.

    JAX takes dense tensors whose elements lie without gaps (a transpose will do, a slice of columns will not), and
    wants memory on the CPU aligned to 64 bytes: it copies a tensor that starts elsewhere, a slice of rows, say. JAX
    arrays never change: do not write to the tensor while the array is in use. Gradients do not cross.
    """
    import torch

    where = f"tensor {list(tensor.shape)} {tensor.dtype}"
    if tensor.layout is not torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ValueError(f"{where} is {kind}, so it has no dense memory to share.")
    if str(tensor.dtype).removeprefix("torch.") in WIDE_DTYPES and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{where}: JAX would narrow it to 32 bits. Convert it (tensor.to(...)), or switch on jax_enable_x64 first."
        )
    if not _without_gaps(tensor):
        raise ValueError(
            f"{where} has gaps between its elements (strides {tensor.stride()}): call .contiguous() first."
        )
    return jax.dlpack.from_dlpack(tensor.detach())


def tensor_to_torch(array: jax.Array) -> "torch.Tensor":
    """A JAX array as a PyTorch tensor of the same memory, on the same device (CPU or NVIDIA GPU).

    The array must lie whole on one device; of one that is replicated, this process's first copy is taken. JAX arrays
    never change: do not write to the tensor.
    """
    import torch

    if not array.is_fully_replicated:
        raise ValueError(
            f"array {array.dtype}{list(array.shape)} is cut over {len(array.sharding.device_set)} devices "
            f"({array.sharding}), and PyTorch wants it on one: bring it together (jax.device_put(array, device)), "
            "or take one part (array.addressable_shards[i].data)."
        )
    part = array.addressable_shards[0].data
    (device,) = part.devices()
    if device.platform not in ("cpu", "gpu"):
        raise ValueError(
            f"array {array.dtype}{list(array.shape)} lies on {device}, where PyTorch cannot see it: "
            "copy it to the host first (torch.from_numpy(np.array(array)))."
        )
    return torch.from_dlpack(part)


def _without_gaps(tensor: "torch.Tensor") -> bool:
    """Whether the elements fill their memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return tensor.numel() == 0
            expected *= size
    return True


# --- Models -----------------------------------------------------------------------------------------------------------


class _TorchTensor(SourceTensor):
    """A tensor of a live module, behind the face of a checkpoint's; one on a GPU comes to the host slice by slice."""

    def __init__(self, name: str, tensor: "torch.Tensor") -> None:
        dtype = as_numpy(tensor.new_empty(0, device="cpu")).dtype
        super().__init__(name, tensor.shape, dtype, MEMORY, tensor.nbytes)
        self._tensor = tensor

    def read(self, index: Index = ()) -> np.ndarray:
        slices = tuple(slice(start, stop) for start, stop in self._bounds(index))
        return as_numpy(self._tensor[slices].cpu())


class _Lazy:
    """A tensor of our model, gathered when it is asked for: transformers treats it as it does a slice of a file."""

    def __init__(self, gather: Callable[[], np.ndarray | None]) -> None:
        self._gather = gather

    def __getitem__(self, _: Any) -> "torch.Tensor":
        return _as_torch(cast(np.ndarray, self._gather()))  # one process gathers all


def _lazy_tensors(model: "CausalLM") -> dict[str, _Lazy]:
    """The model under its names on the hub."""
    bound = bindings(model, model.config, family(model.config.family))
    parameters = dict(zip((leaf.path for leaf in leaves(model)), jax.tree.leaves(model), strict=True))
    parts: dict[str, list[Binding]] = {}
    for binding in bound:
        parts.setdefault(binding.source, []).append(binding)
    return {
        name: _Lazy(functools.partial(gather, parts[name], parameters, np.dtype(model.dtype), shape))
        for name, shape in source_shapes(bound).items()
    }


def _as_torch(array: np.ndarray) -> "torch.Tensor":
    """A numpy array as a tensor of the same memory, bfloat16 and float8 included."""
    import torch

    name = array.dtype.name
    if name not in CARRIERS:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(CARRIERS[name][0])).view(getattr(torch, name))


def _check_module(module: Any) -> None:
    import transformers

    kind = type(module).__name__
    if not isinstance(module, transformers.PreTrainedModel):
        raise TypeError(
            f"{kind} is not a transformers model: give a transformers.PreTrainedModel "
            "(of a PEFT model, what merge_and_unload() returns)."
        )
    if not module.can_generate() or module.get_output_embeddings() is None:
        raise TypeError(f"{kind} has no language-model head: give the ...ForCausalLM of the same checkpoint.")
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{kind}: {name} is on the meta device, so it has no values: load the module whole first.")


def _hub_tensors(module: "transformers.PreTrainedModel") -> dict[str, "torch.Tensor"]:
    """The module's weights under their names on the hub, each memory once (a tied head is its embedding)."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in module.state_dict().items():
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or memory not in seen:
            tensors[name] = tensor
            seen.add(memory)
    return dict(revert_weight_conversion(module, tensors))


def _config_json(module: "transformers.PreTrainedModel") -> dict[str, Any]:
    """The config as `save_pretrained` would write it."""
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = module.dtype
    return json.loads(config.to_json_string(use_diff=True))


def _generation_config_json(module: "transformers.PreTrainedModel") -> dict[str, Any] | None:
    settings = module.generation_config
    return None if settings is None else json.loads(settings.to_json_string(use_diff=True))
