"""A model on disk in its own shape: each process writes and reads what its devices hold, in Orbax's format.

A checkpoint is a folder that appears under its name only when every process has written its part, in place of what may
have stood there (`tbjax.writing`):

    parameters/       arrays, named by their paths in the tree (`stacks.0.0.attention.query.weight`; `tbjax.stored`)
    about/metadata    JSON: the `ModelConfig`, and the companions: small text files that travel with the weights unread
                      (a caller's tokenizer, say)
    manifest          size and digest of every file, against which all that is read is checked (`tbjax.manifest`)

The arrays' names and shapes do not depend on the mesh (stacks have the layers in their own order, see `tbjax.rows`), so
that a checkpoint is restored onto any other one: `restore` takes the abstract model of the mesh it is to live on, and
reads from the files what those shards need.

    save(model, "run/final")
    about = read_about("run/final")
    model = restore(tbjax.api.abstract(about.config, mesh), "run/final")
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tbjax import manifest, rows, stored
from tbjax.config import LayerKind, ModelConfig, MoE, Rope
from tbjax.dtypes import narrows
from tbjax.folders import agree_all, check_free, set_aside
from tbjax.manifest import Verify
from tbjax.quantize import Recipe, recipe
from tbjax.sharding import by_path, with_arrays
from tbjax.writing import Writing

# Raised when a reader of today would misread the files of then. 1: as described above.
FORMAT = 1

PARAMETERS, ABOUT = "parameters", "about"

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint says of itself."""

    config: ModelConfig
    companions: Mapping[str, str]  # file name -> text
    parameters: Mapping[str, jax.ShapeDtypeStruct]  # path -> shape and dtype as stored
    quantization: Recipe | None = None

    @property
    def dtype(self) -> str:
        """The parameters' dtype: a model has one."""
        return self.parameters["embedding.weight"].dtype.name


def save(model: Any, path: str | Path, *, companions: Mapping[str, str] | None = None, overwrite: bool = False) -> None:
    """Write `model` (which has a `.config`) to the folder `path`. Every process calls this with the same arguments.

    With `overwrite`, a checkpoint that stands there is replaced once the new one is whole.
    """
    path = local(path).resolve()  # of a link, what it points to is replaced
    Writing(
        path,
        {PARAMETERS: rows.in_order(by_path(model), model)},
        {ABOUT: about(model, companions)},
        background=False,
        check=lambda: check_free(path, overwrite, objection),
    ).wait()


def about(model: Any, companions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a checkpoint says of a model, as JSON."""
    found = {"format": FORMAT, "config": dataclasses.asdict(model.config), "companions": dict(companions or {})}
    rules = getattr(model, "quantization", None)
    return found if rules is None else {**found, "quantization": rules.plain()}


def restore(abstract_model: Module, path: str | Path, *, verify: Verify = "full") -> Module:
    """The checkpoint at `path` as `abstract_model` wants it: its shardings and dtypes, on whatever mesh.

    The leaves of `abstract_model` are `jax.ShapeDtypeStruct`s with shardings. The files that are read are checked
    against the manifest first, each process a share of them: `verify` says how closely.
    """
    path = local(path)
    _require(path)
    verify_together(path, (f"{ABOUT}/", f"{PARAMETERS}/"), verify)
    known = read_about(path, verify="none").parameters
    of: Any = abstract_model
    laid = by_path(abstract_model)
    wanted = rows.in_order(laid, of)
    check_same(known, wanted, path)
    arrays = stored.read(path / PARAMETERS, wanted)
    check_range(known, arrays, path)
    return with_arrays(abstract_model, rows.on_stages(arrays, laid, of))


def read_about(path: str | Path, *, verify: Verify = "full") -> About:
    """What the checkpoint at `path` holds, without reading an array."""
    path = local(path)
    _require(path)
    manifest.check(path, (f"{ABOUT}/", f"{PARAMETERS}/_", f"{PARAMETERS}/manifest"), verify)
    about_file = path / ABOUT / "metadata"
    with _damage(about_file):
        values = json.loads(about_file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r} is not {FORMAT}: the release that wrote it can read it")
        config, companions = _config(values["config"]), dict(values["companions"])
        rules = recipe(values.get("quantization"))
    with _damage(path / PARAMETERS / "_METADATA"):
        parameters = stored.shapes(path / PARAMETERS)
    return About(config=config, companions=companions, parameters=parameters, quantization=rules)


def verify_together(path: Path, within: tuple[str, ...], verify: Verify) -> None:
    """Check files of a checkpoint against its manifest, each process a share; what one finds is raised in all."""
    error = None
    try:
        manifest.check(path, within, verify, share=(jax.process_index(), jax.process_count()))
    except (ValueError, OSError) as failure:
        error = failure
    agree_all(error)


def is_checkpoint(path: str | Path) -> bool:
    """Whether a whole checkpoint of ours lies at `path`, by its folders; `read_about` looks into them."""
    path = local(path)
    return (path / "parameters").is_dir() and (path / "about").is_dir()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def local(path: str | Path) -> Path:
    """The path that is meant: Orbax takes no relative one."""
    return Path(path).expanduser().absolute()


def _require(path: Path) -> None:
    if not is_checkpoint(path):
        what = "is not a tbjax checkpoint" if path.exists() else "does not exist"
        if not path.exists() and (left := set_aside(path)):
            raise ValueError(f"{path} does not exist: a process was killed as it replaced it. Rename {left[0]} to it.")
        raise ValueError(
            f"{path} {what}: a folder written by tbjax.checkpoint.save (with parameters/ and about/) is needed."
        )


def objection(folder: Path) -> str:
    """Why a folder does not look like a checkpoint of ours; nothing if it does."""
    lacking = [name for name in ("about/metadata", "parameters/_METADATA") if not (folder / name).is_file()]
    if lacking:
        return f"it lacks {lacking[0]}"
    ours = (ABOUT, PARAMETERS, manifest.NAME)
    strange = [entry.name for entry in sorted(folder.iterdir()) if entry.name not in ours]
    return f"it holds {strange[0]}" if strange else ""


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Say which file it is that cannot be understood."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AttributeError) else str(error)
        raise manifest.Damaged(
            f"{file} cannot be read: {what.removesuffix('.')}. The checkpoint is damaged, or a newer tbjax wrote it, "
            "or it is not one."
        ) from error


def check_same(known: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise if the tree that is wanted is not the one that was saved: nothing is dropped, nothing is made up."""
    missing, unexpected = sorted(wanted.keys() - known.keys()), sorted(known.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} holds another model: missing {missing[:3] or 'nothing'}, unexpected {unexpected[:3] or 'none'}. "
            "Restore it into a model made from its own config (read_about(path).config)."
        )
    for name, struct in wanted.items():
        if tuple(known[name].shape) != tuple(struct.shape):
            raise ValueError(
                f"{path}: {name} has shape {list(known[name].shape)}, the model's has {list(struct.shape)}. "
                "Restore it into a model made from its own config (read_about(path).config)."
            )


def check_range(known: Mapping[str, Any], arrays: Mapping[str, jax.Array], path: Path) -> None:
    """Raise if a conversion to a dtype of less range has left something that is no finite number."""
    narrowed = {name: array for name, array in arrays.items() if narrows(known[name].dtype, array.dtype)}
    if not narrowed:
        return
    finite = jax.jit(lambda arrays: {name: jnp.isfinite(array).all() for name, array in arrays.items()})(narrowed)
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
