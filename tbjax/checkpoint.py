"""A model on disk in its own shape: each process writes and reads what its devices hold, in Orbax's format.

A checkpoint is a folder that appears under its name only when every process has written its part, in place of what may
have stood there:

    parameters/   Orbax arrays, named by their paths in the tree (`stacks.0.0.attention.query.weight`)
    about/        JSON: the `ModelConfig`, and the companions: small text files that travel with the weights unread
                  (a caller's tokenizer, say)

The arrays' names and shapes do not depend on the mesh (stacks have the layers in their own order, see `tbjax.rows`), so
that a checkpoint is restored onto any other one: `restore` takes the abstract model of the mesh it is to live on, and
reads from the files what those shards need.

    save(model, "run/final")
    about = read_about("run/final")
    model = restore(abstract_model_for(about.config), "run/final")
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from tbjax import rows
from tbjax.config import LayerKind, ModelConfig, MoE, Rope
from tbjax.dtypes import narrows
from tbjax.folders import check_free, in_first_process, put
from tbjax.sharding import leaves

# Raised when a reader of today would misread the files of then. 1: as described above.
FORMAT = 1

# What the checkpoint is called in the folder beside its place, where it is written.
WHOLE = "whole"

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

    With `overwrite`, a checkpoint that stands there is replaced once the new one is whole.
    """
    path = _local(path).resolve()  # of a link, what it points to is replaced
    partial = path.with_name(f".{path.name}.partial")  # a name on which all processes agree
    in_first_process(lambda: _make_room(path, partial, overwrite))
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(model.config),
        "companions": dict(companions or {}),
    }
    arrays = _nested(rows.in_order(_by_path(model), model))
    items = ocp.args.Composite(parameters=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / WHOLE, args=items)
        in_first_process(lambda: put(partial / WHOLE, path))
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)


def restore(abstract_model: Module, path: str | Path) -> Module:
    """The checkpoint at `path` as `abstract_model` wants it: its shardings and dtypes, on whatever mesh.

    The leaves of `abstract_model` are `jax.ShapeDtypeStruct`s with shardings.
    """
    path = _local(path)
    stored = read_about(path).parameters
    of: Any = abstract_model
    laid = _by_path(abstract_model)
    wanted = rows.in_order(laid, of)
    _check(stored, wanted, path)
    with _checkpointer() as checkpointer:
        arguments = ocp.args.Composite(parameters=ocp.args.StandardRestore(_nested(wanted)))
        restored = checkpointer.restore(path, args=arguments).parameters
    arrays = {name: _at(restored, name) for name in wanted}
    _check_range({name: array for name, array in arrays.items() if narrows(stored[name].dtype, array.dtype)}, path)
    arrays = rows.on_stages(arrays, laid, of)
    return jax.tree.unflatten(jax.tree.structure(abstract_model), list(arrays.values()))


def read_about(path: str | Path) -> About:
    """What the checkpoint at `path` holds, without reading an array."""
    path = _local(path)
    if not is_checkpoint(path):
        what = "is not a tbjax checkpoint" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {what}: a folder written by tbjax.checkpoint.save (with parameters/ and about/) is needed."
        )
    about_file = path / "about" / "metadata"
    with _checkpointer() as checkpointer:
        with _damage(about_file):
            about = checkpointer.restore(path, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r} is not {FORMAT}: the release that wrote it can read it")
            config, companions = _config(about["config"]), dict(about["companions"])
        with _damage(path / "parameters" / "_METADATA"):
            metadata: Any = checkpointer.metadata(path).item_metadata
            # Orbax keeps the tree of names; each leaf is what it noted of one array.
            flat = jax.tree_util.tree_flatten_with_path(metadata.parameters.tree)[0]
            parameters = {
                jax.tree_util.keystr(key, simple=True, separator="."): jax.ShapeDtypeStruct(array.shape, array.dtype)
                for key, array in flat
            }
    return About(config=config, companions=companions, parameters=parameters)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a whole checkpoint of ours lies at `path`, by its folders; `read_about` looks into them."""
    path = _local(path)
    return (path / "parameters").is_dir() and (path / "about").is_dir()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _checkpointer() -> contextlib.AbstractContextManager[ocp.Checkpointer]:
    items = {"parameters": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
    return contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items)))


def _local(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()  # Orbax takes no relative path


def objection(folder: Path) -> str:
    """Why a folder does not look like a checkpoint of ours; nothing if it does."""
    lacking = [name for name in ("about/metadata", "parameters/_METADATA") if not (folder / name).is_file()]
    if lacking:
        return f"it lacks {lacking[0]}"
    # Orbax's own files have names that begin with an underscore, and one that says that all have been written.
    ours = ("about", "parameters", "commit_success.txt")
    strange = [entry.name for entry in sorted(folder.iterdir()) if entry.name not in ours and entry.name[0] != "_"]
    return f"it holds {strange[0]}" if strange else ""


def _make_room(path: Path, partial: Path, overwrite: bool) -> None:
    """Raise unless `path` may be written; remove what a killed process left beside it."""
    check_free(path, overwrite, objection)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Say which file it is that cannot be understood."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AttributeError) else str(error)
        raise ValueError(
            f"{file} cannot be read: {what.removesuffix('.')}. The checkpoint is damaged, or a newer tbjax wrote it, "
            "or it is not one."
        ) from error


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


def _check_range(narrowed: Mapping[str, jax.Array], path: Path) -> None:
    """Raise if a conversion to a dtype of less range has left something that is no finite number."""
    if not narrowed:
        return
    finite = jax.jit(lambda arrays: {name: jnp.isfinite(array).all() for name, array in arrays.items()})(dict(narrowed))
    for name, array in narrowed.items():
        if not finite[name]:
            raise ValueError(
                f"{path}: {name} has values beyond the range of {array.dtype}: restore it with a dtype that can hold "
                "them, such as float32."
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
