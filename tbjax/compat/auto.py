"""Hugging Face's `AutoModelForCausalLM`, with the two arguments that NeMo AutoModel adds to it.

    AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", distributed={"tp_size": 2, "dp_size": 4})
    AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", device_mesh=mesh)

Data parallel devices there share the weights out between them (FSDP2): here that is the axis fsdp, and `dp_replicate`
is dp.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from tbjax import api
from tbjax.api import CausalLM
from tbjax.compat.devices import check_backend, check_kind
from tbjax.compat.training import with_defaults
from tbjax.mesh import AXES, make_mesh
from tbjax.training.config import Defaults

# Their names of mesh axes, and ours.
MESH_AXES = {"dp_replicate": "dp", "dp_shard": "fsdp", **{axis: axis for axis in AXES}}

SIZES = {"tp_size": "tp", "cp_size": "cp", "pp_size": "pp", "dp_size": "fsdp"}


class AutoModelForCausalLM:
    """Loads models; it is never made itself."""

    def __init__(self) -> NoReturn:
        raise TypeError("AutoModelForCausalLM is not made itself: call AutoModelForCausalLM.from_pretrained(name).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        distributed: Mapping[str, Any] | None = None,
        device_mesh: Any = None,
        torch_dtype: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> CausalLM:
        """As `tbjax.load`, whose options are taken too. With neither argument the model lies on one device.

        `device_mesh` is JAX's, or PyTorch's: of that, the sizes and the names of its axes.
        """
        if distributed and device_mesh is not None:
            raise ValueError("distributed= and device_mesh= both say how the model is spread: give one.")
        mesh: Any = make_mesh((1, 1, 1), jax.devices()[:1])
        remat = None
        if device_mesh is not None:
            mesh = _mesh(device_mesh)
        elif distributed:
            mesh, more, remat = _read(distributed)
            options = {**more, **options}
        dtype = torch_dtype if dtype is None else dtype
        dtype = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
        model = api.load(pretrained_model_name_or_path, mesh, dtype=None if dtype == "auto" else dtype, **options)
        if remat:
            with_defaults(model, Defaults(remat=remat))
        return model


NeMoAutoModelForCausalLM = AutoModelForCausalLM


def init_device_mesh(
    device_type: str, mesh_shape: Sequence[int], *, mesh_dim_names: Sequence[str] | None = None
) -> Mesh:
    """A mesh over the first devices of this machine, as many as the shape has, with axes by PyTorch's or our names.

    `device_type` is "cuda" on GPUs, "xla" on TPUs; CPU devices stand in for either.
    """
    if not isinstance(device_type, str):
        raise TypeError(f"device_type={device_type!r}: a text such as 'cuda' is needed.")
    check_kind(device_type, "device_type")
    if mesh_dim_names is None or len(mesh_dim_names) != len(mesh_shape):
        raise ValueError(f"mesh_dim_names={mesh_dim_names!r} must name the {len(mesh_shape)} axes of {mesh_shape}.")
    count = math.prod(mesh_shape)
    if count > len(jax.devices()):
        raise ValueError(f"mesh_shape={tuple(mesh_shape)} needs {count} devices, but there are {len(jax.devices())}.")
    return make_mesh(_axes(mesh_dim_names, mesh_shape), jax.devices()[:count])


def _read(distributed: Mapping[str, Any]) -> tuple[Mesh, dict[str, Any], str | None]:
    """The mesh, the options of `load`, and what is run again in the backward pass."""
    given = dict(distributed)
    sizes = {axis: given.pop(name, None) for name, axis in SIZES.items()}
    check_backend(given.pop("backend", None), "distributed['backend']")
    if given.pop("use_hf_tp_plan", False):
        raise ValueError("distributed['use_hf_tp_plan']: tbjax cuts layers by its own plan, the same for every family.")
    sequence_parallel = bool(given.pop("sequence_parallel", False))
    remat = "full" if given.pop("activation_checkpointing", False) else None
    if given:
        known = (*SIZES, "backend", "use_hf_tp_plan", "sequence_parallel", "activation_checkpointing")
        raise ValueError(f"distributed[{next(iter(given))!r}] is unknown: it may have {', '.join(known)}.")
    # 0 and None are "as many as there are".
    asked = {axis: size or -1 for axis, size in sizes.items() if axis == "fsdp" or size}
    count = math.prod(size for size in asked.values() if size != -1)
    devices = jax.devices() if -1 in asked.values() else jax.devices()[:count]
    return make_mesh(asked, devices), {"sequence_parallel": sequence_parallel}, remat


def _mesh(device_mesh: Any) -> Mesh:
    """JAX's mesh, or one like PyTorch's."""
    if isinstance(device_mesh, Mesh):
        return make_mesh(device_mesh)
    names, shape = getattr(device_mesh, "mesh_dim_names", None), getattr(device_mesh, "shape", None)
    if not names or shape is None:
        raise ValueError(
            f"device_mesh={device_mesh!r}: a jax.sharding.Mesh, or a DeviceMesh with named axes, is needed."
        )
    kind = getattr(device_mesh, "device_type", "cpu")
    return init_device_mesh(kind, tuple(shape), mesh_dim_names=names)


def _axes(names: Sequence[str], shape: Sequence[int]) -> dict[str, int]:
    unknown = [name for name in names if name not in MESH_AXES]
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown: tbjax knows {', '.join(MESH_AXES)}.")
    sizes = {MESH_AXES[name]: size for name, size in zip(names, shape, strict=True)}
    if len(sizes) != len(names):
        raise ValueError(f"mesh axes {', '.join(names)}: two of them are the same axis of tbjax's.")
    return sizes
