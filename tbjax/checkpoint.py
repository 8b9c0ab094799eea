"""A model on disk in its own shape: each process writes and reads what its devices hold, in Orbax's format.

A checkpoint is a folder that appears under its name only when every process has written its part:

    parameters/   Orbax arrays, named by their paths in the tree (`stacks.0.0.attention.query.weight`)
    about/        JSON: the `ModelConfig`, and the companions: small text files that travel with the weights unread
                  (a caller's tokenizer, say)

The arrays' names and shapes do not depend on the mesh, so that a checkpoint is restored onto any other one: `restore`
takes the abstract model of the mesh it is to live on, and reads from the files what those shards need.

    save(model, "run/final")
    about = read_about("run/final")
    model = restore(abstract_model_for(about.config), "run/final")
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from tbjax.config import LayerKind, ModelConfig, MoE, Rope
from tbjax.sharding import leaves

# Raised when a reader of today would misread the files of then. 1: as described above.
FORMAT = 1

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of itself."""

    config: ModelConfig
    companions: Mapping[str, str]  # file name -> text
    parameters: Mapping[str, jax.ShapeDtypeStruct]  # path -> shape and dtype as stored

    @property
    def dtype(self) -> str:
        """The parameters' dtype: a model has one."""
        return next(iter(self.parameters.values())).dtype.name


def save(model: Any, path: str | Path, *, companions: Mapping[str, str] | None = None, overwrite: bool = False) -> None:
    """Write `model` (which has a `.config`) to the folder `path`. Every process calls this with the same arguments.

    With `overwrite`, a folder that stands there is removed first; it must be a checkpoint.
    """
    path = _local(path)
    _make_room(path, overwrite)
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "companions": dict(companions or {}),
    }
    arrays = _nested(_by_path(model))
    with _checkpointer() as checkpointer:
        checkpointer.save(
            path, args=ocp.args.Composite(parameters=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        )


def restore(abstract_model: Module, path: str | Path) -> Module:
    """The checkpoint at `path` as `abstract_model` wants it: its shardings and dtypes, on whatever mesh.

    The leaves of `abstract_model` are `jax.ShapeDtypeStruct`s with shardings.
    """
    path = _local(path)
    stored = read_about(path).parameters
    wanted = _by_path(abstract_model)
    _check(stored, wanted, path)
    with _checkpointer() as checkpointer:
        arguments = ocp.args.Composite(parameters=ocp.args.StandardRestore(_nested(wanted)))
        restored = checkpointer.restore(path, args=arguments).parameters
    arrays = iter([_at(restored, name) for name in wanted])
    return jax.tree.map(lambda _: next(arrays), abstract_model)


def read_about(path: str | Path) -> About:
    """What the checkpoint at `path` holds, without reading an array."""
    path = _local(path)
    if not is_checkpoint(path):
        what = "is not a tbjax checkpoint" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {what}: a folder written by tbjax.checkpoint.save (with parameters/ and about/) is needed."
        )
    with _checkpointer() as checkpointer:
        about = checkpointer.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        metadata: Any = checkpointer.metadata(path).item_metadata
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise ValueError(
            f"{path}/about: format {found!r} is not {FORMAT}: it needs the release of tbjax that wrote it."
        )
    # Orbax keeps the tree of names; each leaf is what it noted of one array.
    flat = jax.tree_util.tree_flatten_with_path(metadata.parameters.tree)[0]
    parameters = {
        jax.tree_util.keystr(key, simple=True, separator="."): jax.ShapeDtypeStruct(array.shape, array.dtype)
        for key, array in flat
    }
    return About(config=_config(about["config"]), companions=about["companions"], parameters=parameters)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a whole checkpoint of ours lies at `path`."""
    path = Path(path)
    return (path / "parameters").is_dir() and (path / "about").is_dir()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _checkpointer() -> contextlib.AbstractContextManager[ocp.Checkpointer]:
    items = {"parameters": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
    return contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items)))


def _local(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()  # Orbax takes no relative path


def _make_room(path: Path, overwrite: bool) -> None:
    """Raise unless `path` is free; with `overwrite`, free it. The first process looks and removes, the others wait."""
    problem = ""
    if path.exists() and not overwrite:
        problem = f"{path} exists already: name another folder, or say overwrite."
    elif path.exists() and not is_checkpoint(path):
        problem = f"{path} exists and is not a checkpoint, so it is not overwritten: remove it, or name another folder."
    if jax.process_count() > 1:  # all have looked before one removes
        multihost_utils.sync_global_devices(f"tbjax.checkpoint looked at {path}")
    if problem:
        raise FileExistsError(problem)
    if path.exists() and jax.process_index() == 0:
        shutil.rmtree(path)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"tbjax.checkpoint made room at {path}")


def _by_path(model: nnx.Module) -> dict[str, Any]:
    return dict(zip((leaf.path for leaf in leaves(model)), jax.tree.leaves(model), strict=True))


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = array
    return tree


def _at(tree: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _check(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise if the tree that is wanted is not the one that was saved: nothing is dropped, nothing is made up."""
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} holds another model: missing {missing[:3] or 'nothing'}, unexpected {unexpected[:3] or 'none'}. "
            "Restore it into a model made from its own config (read_about(path).config)."
        )
    for name, struct in wanted.items():
        if tuple(stored[name].shape) != tuple(struct.shape):
            raise ValueError(
                f"{path}: {name} has shape {list(stored[name].shape)}, the model's has {list(struct.shape)}. "
                "Restore it into a model made from its own config (read_about(path).config)."
            )


def _config(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the JSON of its fields."""

    def rope(fields: Mapping[str, Any] | None) -> Rope | None:
        if fields is None:
            return None
        # JSON has lists where Rope has tuples.
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return Rope(**plain)

    return ModelConfig(
        **dict(values)
        | {
            "layer_kinds": tuple(LayerKind(*kind) for kind in values["layer_kinds"]),
            "moe": values["moe"] and MoE(**values["moe"]),
            "rope": rope(values["rope"]),
            "window_rope": rope(values["window_rope"]),
        }
    )
