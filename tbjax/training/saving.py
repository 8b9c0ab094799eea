"""The whole state of a run on disk, so that it goes on as if it had never stopped.

A run's folder holds one folder for each step that was saved, and each is also a checkpoint of the model, which
`tbjax.load("run/500")` opens like any other (see `tbjax.checkpoint`):

    parameters/   the model's, as there
    about/        the model's, as there
    training/     the optimizer's state and whatever else a step hands to the next, by path
    progress/     JSON: the step, where the data stands, the configuration, the plan
    manifest      size and digest of every file, as there

What is saved is the state of the step it is named after; the run goes on while it is written, but not for long: after
`leeway` steps it waits. A run goes on from the newest checkpoint that is whole: one that is not is named in a warning
with what is wrong with it, and moved aside. So whatever ends a run costs it the interval between two checkpoints and
that leeway at most; without the background, the interval.

Arrays are restored onto the mesh of the run that asks for them, whatever mesh, pipeline or number of processes wrote
them; the same bits follow only on the same mesh, as another one sums in another order.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tbjax import checkpoint, manifest, rows, stored
from tbjax.folders import in_first_process
from tbjax.manifest import Verify
from tbjax.model import Decoder
from tbjax.sharding import by_path, with_arrays
from tbjax.training.state import TrainState
from tbjax.writing import Writing

log = logging.getLogger("tbjax")

# Raised when a reader of today would misread the files of then. 2: with a manifest.
FORMAT = 2

TRAINING, PROGRESS = "training", "progress"

# What the paths of these arrays begin with in `training/`.
RESIDUAL, LOSS_SCALE = "residual.", "loss_scale."

# The part of an interval for which a run may go on while a checkpoint is written.
LEEWAY = 10

# Behind the name of a checkpoint that was found not to be whole.
ASIDE = ".damaged"


class SaveFailed(OSError):
    """A checkpoint could not be written."""


class Progress(NamedTuple):
    """Where a run stood."""

    step: int
    data: Any  # where the data stood; None where it could not say
    config: Any = None  # the fields of its TrainConfig; None where its optimizer has no name
    plan: Any = None  # the plan that the model was laid out by, if any
    tokens: int = 0  # that had been learned from
    skipped: int = 0  # steps


def leeway(every: int) -> int:
    """Steps that a run may take while a checkpoint is written, where it writes one `every` so many steps."""
    return max(1, every // LEEWAY)


class Saver:
    """The checkpoints of a run in `folder`: the newest `keep` stay, and those of every `keep_every` steps.

    `latest` is the newest whole one, by then `skipped` are those that are newer, with what is wrong with each.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        background: bool = True,
        verify: Verify = "full",
    ) -> None:
        self.folder = checkpoint.local(folder)
        self.skipped: dict[str, str] = {}
        self._keep, self._keep_every = keep, keep_every
        self._background = background
        self._verify: Verify = verify
        self._writing: Writing | None = None
        self._step = 0  # of what is being written
        self.latest: int | None = self._newest_whole()

    def save(
        self,
        state: TrainState,
        step: int,
        *,
        data: Any,
        config: Mapping[str, Any] | None,
        plan: str | None = None,
        tokens: int = 0,
        skipped: int = 0,
    ) -> None:
        """Begin to write everything that step `step` left. Every process calls this; the state may be given up after.

        What goes wrong is logged as soon as it is known, and `SaveFailed` is raised by the next call. Without the
        background all is done, and said, when this returns.
        """
        self.wait()
        if step == self.latest:
            return
        model = state.model
        progress = {
            "format": FORMAT,
            "step": step,
            "data": data,
            "config": config,
            "plan": None if plan is None else json.loads(plan),
            "tokens": tokens,
            "skipped": skipped,
        }
        arrays = {
            checkpoint.PARAMETERS: rows.in_order(by_path(model), model),
            TRAINING: _in_order(_beside_the_model(state), model),
        }
        texts = {checkpoint.ABOUT: checkpoint.about(model, getattr(model, "companions", None)), PROGRESS: progress}
        path = self.folder / str(step)
        try:
            self._writing = Writing(
                path,
                arrays,
                texts,
                background=self._background,
                afterwards=self._prune,
                on_error=lambda error: log.error("%s.", _failed(path, error)),
            )
        except OSError as error:
            log.error("%s.", _failed(path, error))
            raise _failed(path, error) from error
        self._step = step
        if not self._background:
            self.wait()

    @property
    def writing(self) -> bool:
        """Whether this process is still at work on a checkpoint."""
        return self._writing is not None and not self._writing.done

    @property
    def failing(self) -> bool:
        """Whether this process knows that what is being written will not be a checkpoint."""
        return self._writing is not None and self._writing.done and self._writing.error is not None

    def overdue(self, step: int, every: int) -> bool:
        """Whether what is being written must be in its place before another step is taken; alike in all processes."""
        return self._writing is not None and step - self._step >= leeway(every)

    def wait(self) -> None:
        """Until what was begun is in its place. Every process calls this. Raises `SaveFailed`."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.wait()
        except Exception as error:
            raise _failed(writing.folder, error) from error
        self.latest = int(writing.folder.name)

    def close(self) -> None:
        """Let what was begun come to its end, whatever that is; no other process is asked."""
        if self._writing is not None:
            self._writing.join()

    def check_data(self, state: Any) -> None:
        """Raise unless where the data stands, as it says, can be written."""
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the data's state() cannot be saved with the run in {self.folder}: {error}. Let it be of numbers, "
                "strings, lists and dicts, as JSON has them."
            ) from error

    def progress(self) -> Progress:
        """Where the run stood at the newest step."""
        return read_progress(self.folder / str(self._require()))

    def check(self, like: TrainState) -> None:
        """Raise, naming what differs, unless the newest state is of this model and this optimizer.

        Floating-point numbers may be of another precision, a loss scale may be there or not, and what compression has
        not sent may be of another dp.
        """
        path, model = self.folder / str(self._require()), like.model
        for item, wanted, remedy in (
            (checkpoint.PARAMETERS, rows.in_order(by_path(model), model), "the model"),
            (TRAINING, _in_order(_beside_the_model(like), model), "the optimizer and the compression"),
        ):
            there = stored.shapes(path / item)
            for name in sorted(there.keys() | wanted.keys()):
                saved, needed = there.get(name), wanted.get(name)
                if not _fits(name, saved, needed):
                    raise ValueError(
                        f"{path} holds another run: its {name} is {_spell(saved)}, this one's {_spell(needed)}. Give "
                        f"{remedy} of that run, or another folder."
                    )
            converted = {(there[name].dtype, wanted[name].dtype) for name in there.keys() & wanted.keys()}
            for saved, needed in sorted((a.name, b.name) for a, b in converted if a != b):
                log.info("%s: what was saved as %s goes on as %s.", path / item, saved, needed)

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, into the shapes, dtypes and places of `like`, which may be abstract.

        A loss scale that was not saved is that of `like`, which must then have one.
        """
        path, model = self.folder / str(self._require()), like.model
        parameters, beside = by_path(model), _beside_the_model(like)
        ordered, wanted = rows.in_order(parameters, model), _in_order(beside, model)
        known = {item: stored.shapes(path / item) for item in (checkpoint.PARAMETERS, TRAINING)}
        arrays = stored.read(path / checkpoint.PARAMETERS, ordered)
        checkpoint.check_range(known[checkpoint.PARAMETERS], arrays, path)
        arrays = rows.on_stages(arrays, parameters, model)

        spread = [name for name in wanted if _is_spread(name, known[TRAINING].get(name), wanted[name])]
        new = [name for name in wanted if name not in known[TRAINING]]
        plain = {name: struct for name, struct in wanted.items() if name not in (*spread, *new)}
        found = stored.read(path / TRAINING, plain)
        checkpoint.check_range(known[TRAINING], found, path)
        for name in spread:  # one after the other: on the way each is as large as it was on all devices
            found[name] = _spread(path / TRAINING, name, known[TRAINING][name], wanted[name])
        found |= {name: beside[name].value for name in new}
        rest = _on_stages({name: found[name] for name in beside}, beside, model)
        state = jax.tree.unflatten(jax.tree.structure(like._replace(model=None, stopped=None)), rest)
        stopped = None if like.stopped is None else jax.device_put(np.zeros((), bool), like.stopped.sharding)
        return state._replace(model=with_arrays(model, arrays), stopped=stopped)

    def _require(self) -> int:
        self.wait()
        if self.latest is None:
            raise ValueError(f"{self.folder} holds no checkpoint to go on from.")
        return self.latest

    def _newest_whole(self) -> int | None:
        """The newest checkpoint that is as it was written, the same in every process; newer ones are moved aside."""
        in_first_process(self._clear)
        damaged: list[Path] = []
        while (step := self._below(int(damaged[-1].name) if damaged else None)) is not None:
            path = self.folder / str(step)
            try:
                checkpoint.verify_together(path, ("",), self._verify)
            except (manifest.Damaged, OSError) as error:
                self.skipped[path.name] = str(error)
                damaged.append(path)
                log.warning("checkpoint %s is skipped: %s", path, error)
                continue
            in_first_process(lambda: _move_aside(damaged))
            return step
        if damaged:  # all of them: perhaps it is the folder that this process does not see as it is
            raise manifest.Damaged(
                f"{self.folder}: none of its checkpoints is whole ({', '.join(self.skipped.values())}): remove the "
                "folder to begin anew, or bring one back."
            )
        return None

    def _below(self, limit: int | None) -> int | None:
        """The newest step below `limit`. What processes see of a shared folder may differ: the first's word counts."""
        steps = [step for step in saved_steps(self.folder) if limit is None or step < limit]
        newest = int(multihost_utils.broadcast_one_to_all(np.int64(max(steps, default=-1))))
        return None if newest < 0 else newest

    def _clear(self) -> None:
        """Remove what killed processes left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in sorted(self.folder.glob(".*")):
            if left.name.endswith(".partial"):
                name = left.name.removeprefix(".").removesuffix(".partial")
                self.skipped[left.name] = f"{self.folder / name} was not finished"
                log.warning("checkpoint %s was not finished when its run ended, and is removed.", self.folder / name)
            if left.name.endswith((".partial", ".removed")):
                shutil.rmtree(left)

    def _prune(self) -> None:
        """Remove what is not to stay, first from its name, so that what is left of it is taken for nothing."""
        steps = sorted(saved_steps(self.folder))
        for step in steps[: -self._keep]:
            if self._keep_every is None or step % self._keep_every:
                gone = self.folder / f".{step}.removed"
                try:
                    (self.folder / str(step)).rename(gone)
                    shutil.rmtree(gone)
                except OSError as error:  # no reason to call the new one a failure
                    log.warning("checkpoint %s could not be removed: %s", self.folder / str(step), error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def saved_steps(folder: str | Path) -> list[int]:
    """The steps whose checkpoints lie in a run's folder, whole or not."""
    path = checkpoint.local(folder)
    names = (entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


def read_progress(path: str | Path) -> Progress:
    """Where the run stood whose checkpoint is at `path`."""
    found = json.loads((checkpoint.local(path) / PROGRESS / "metadata").read_text(encoding="utf-8"))
    if found["format"] != FORMAT:
        raise ValueError(f"{path}: format {found['format']!r} is not {FORMAT}: another release of tbjax wrote it.")
    counted = (found.get(name, 0) for name in ("tokens", "skipped"))  # the first releases did not say
    return Progress(found["step"], found["data"], found["config"], found["plan"], *counted)


class _Array(NamedTuple):
    """An array of the state, and the parameter that it belongs to, if it belongs to one."""

    value: Any
    parameter: str


def _beside_the_model(state: TrainState) -> dict[str, _Array]:
    """Every array of the state that is not a parameter, by path.

    Whether it has stopped is left out: a state that is saved has not, and a run may go on with another on_nonfinite.
    """
    found, parameters = {}, by_path(state.model)
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


def _fits(name: str, saved: Any, needed: Any) -> bool:
    """Whether what was saved can become what is needed."""
    if name.startswith(LOSS_SCALE) and (saved is None or needed is None):
        return True
    if saved is None or needed is None:
        return False
    same_kind = saved.dtype == needed.dtype or all(jnp.issubdtype(a.dtype, jnp.floating) for a in (saved, needed))
    return same_kind and (tuple(saved.shape) == tuple(needed.shape) or _is_spread(name, saved, needed))


def _is_spread(name: str, saved: Any, needed: Any) -> bool:
    """Whether this is what compression has not sent, of another dp."""
    return (
        name.startswith(RESIDUAL)
        and saved is not None
        and saved.shape[0] != needed.shape[0]
        and tuple(saved.shape[1:]) == tuple(needed.shape[1:])
    )


def _spread(folder: Path, name: str, saved: Any, wanted: Any) -> jax.Array:
    """What the devices of another dp have not sent, in equal parts for those of this one.

    What is still to be sent is the sum of it, which stays as it was.
    """
    where: NamedSharding = wanted.sharding
    between = NamedSharding(where.mesh, PartitionSpec(None, *where.spec[1:]))
    struct = jax.ShapeDtypeStruct(saved.shape, wanted.dtype, sharding=between)
    array = stored.read(folder, {name: struct})[name]
    share = jax.jit(lambda kept: jnp.broadcast_to(kept.sum(0) / wanted.shape[0], wanted.shape), out_shardings=where)
    return share(array)


def _move_aside(damaged: Sequence[Path]) -> None:
    """Give checkpoints names under which nobody looks for one: their steps will be saved again."""
    for path in damaged:
        aside = path.with_name(path.name + ASIDE)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)


def _failed(path: Path, error: Exception) -> SaveFailed:
    what = str(error) or type(error).__name__
    return SaveFailed(f"checkpoint {path} could not be written, and those before it are as they were: {what}")


def _spell(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
