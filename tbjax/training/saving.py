"""The whole state of a run on disk, so that it goes on as if it had never stopped.

A run's folder holds one folder for each step that was saved, and each is also a checkpoint of the model, which
`tbjax.load("run/500")` opens like any other (see `tbjax.checkpoint`):

    parameters/   the model's, as there
    about/        the model's, as there
    training/     the optimizer's state and whatever else a step hands to the next, by path
    progress/     JSON: the step, where the data stands, the configuration

Orbax writes a folder under another name and renames it when every process has written its part. Arrays are restored
onto the mesh of the run that asks for them; the same bits follow only on the same mesh, as another one sums in another
order.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from tbjax import checkpoint, rows
from tbjax.model import Decoder
from tbjax.training.optimizer import as_dict, with_parameters
from tbjax.training.step import TrainState

# Raised when a reader of today would misread the files of then.
FORMAT = 1


class Progress(NamedTuple):
    """Where a run stood."""

    step: int
    data: Any  # where the data stood; None where it could not say


class Saver:
    """The checkpoints of a run in `folder`, of which the newest `keep` stay."""

    def __init__(self, folder: str | Path, *, keep: int) -> None:
        self.folder = Path(folder).expanduser().absolute()  # Orbax takes no relative path
        handlers = {
            "parameters": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    @property
    def latest(self) -> int | None:
        """The newest step that was saved."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, *, data: Any, config: Mapping[str, Any] | None) -> None:
        """Write everything that step `step` left. Every process calls this."""
        if step == self.latest:
            return
        model = state.model
        about = {
            "format": checkpoint.FORMAT,
            "config": dataclasses.asdict(model.config),
            "companions": dict(getattr(model, "companions", {})),
        }
        progress = {"format": FORMAT, "step": step, "data": data, "config": config}
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(_nested(rows.in_order(as_dict(model), model))),
            about=ocp.args.JsonSave(about),
            training=ocp.args.StandardSave(_in_order(_beside_the_model(state), model)),
            progress=ocp.args.JsonSave(progress),
        )
        self._manager.save(step, args=items, force=True)

    def progress(self) -> Progress:
        """Where the run stood at the newest step."""
        step = self._require()
        found: Any = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        if found.progress["format"] != FORMAT:
            written = found.progress["format"]
            raise ValueError(f"{self.folder / str(step)}: format {written!r} is not {FORMAT}: a newer tbjax wrote it.")
        return Progress(step, found.progress["data"])

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, into the shapes, dtypes and places of `like`, which may be abstract."""
        step, model = self._require(), like.model
        parameters, beside = as_dict(model), _beside_the_model(like)
        found: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(_nested(_abstract(rows.in_order(parameters, model)))),
                training=ocp.args.StandardRestore(_abstract(_in_order(beside, model))),
            ),
        )
        arrays: Any = traverse_util.flatten_dict(found.parameters, sep=".")
        arrays = rows.on_stages(arrays, parameters, model)
        rest = _on_stages({name: found.training[name] for name in beside}, beside, model)
        state = jax.tree.unflatten(jax.tree.structure(like._replace(model=None, stopped=None)), rest)
        stopped = None if like.stopped is None else jax.device_put(np.zeros((), bool), like.stopped.sharding)
        return state._replace(model=with_parameters(model, arrays), stopped=stopped)

    def check(self, like: TrainState) -> None:
        """Raise, naming what differs, unless the newest state is of this model and this optimizer."""
        step = self._require()
        stored = self._manager.item_metadata(step)
        model = like.model
        for item, wanted, remedy in (
            ("parameters", rows.in_order(as_dict(model), model), "the model"),
            ("training", _in_order(_beside_the_model(like), model), "the optimizer and the precision"),
        ):
            flat = jax.tree_util.tree_flatten_with_path(stored[item].tree)[0]
            there = {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in flat}
            for name in sorted(there.keys() | wanted.keys()):
                saved, needed = (_spell(arrays.get(name)) for arrays in (there, wanted))
                if saved != needed:
                    raise ValueError(
                        f"{self.folder / str(step)} holds another run: its {name} is {saved}, this one's {needed}. "
                        f"Give {remedy} of that run, or another folder."
                    )

    def _require(self) -> int:
        if self.latest is None:
            raise ValueError(f"{self.folder} holds no checkpoint to go on from.")
        return self.latest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()


class _Array(NamedTuple):
    """An array of the state, and the parameter that it belongs to, if it belongs to one."""

    value: Any
    parameter: str


def _beside_the_model(state: TrainState) -> dict[str, _Array]:
    """Every array of the state that is not a parameter, by path.

    Whether it has stopped is left out: a state that is saved has not, and a run may go on with another on_nonfinite.
    """
    found, parameters = {}, as_dict(state.model)
    for path, array in jax.tree_util.tree_flatten_with_path(state._replace(model=None, stopped=None))[0]:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        parameter = next((key for key in keys if key in parameters), "")
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = _Array(array, parameter)
    return found


def _in_order(arrays: Mapping[str, _Array], model: Decoder) -> dict[str, Any]:
    """The arrays with stacks in the layers' order, as checkpoints have them."""
    return {name: rows.in_order({path: value}, model)[path] for name, (value, path) in arrays.items()}


def _on_stages(arrays: Mapping[str, Any], wanted: Mapping[str, _Array], model: Decoder) -> list[Any]:
    """And back."""
    return [rows.on_stages({path: arrays[name]}, {path: value}, model)[path] for name, (value, path) in wanted.items()]


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(arrays), sep=".")


def _abstract(arrays: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)


def _spell(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
