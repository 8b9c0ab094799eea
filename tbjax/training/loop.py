"""The training loop: batches in, steps out, and everything that a run needs around them.

    result = train(model, data, TrainConfig(steps=1000), eval_data=held_out, checkpoint_dir="run")
    result.losses[-1], result.evaluations[-1].perplexity

The devices never wait for the host: a step is dispatched before the figures of the one before it are read, and while it
runs the host prepares the next batch. So what goes wrong in a step is noticed one step later; that step has by then
been dispatched, and changes nothing (`on_nonfinite` of `tbjax.training.step`).

The model is trained in place, as PyTorch's are. The step takes its memory for the next state, so that for as long as
the run lasts its weights are the run's; when the run ends, however it ends, they are the model's again.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from tbjax.model import Decoder
from tbjax.planner.plan import Plan
from tbjax.sharding import leaves
from tbjax.training.batches import Feed, share_of_rows
from tbjax.training.config import TrainConfig
from tbjax.training.evaluation import Evaluation, evaluate
from tbjax.training.interruption import Interruption
from tbjax.training.logs import JsonLines, Log, Logs, ProgressLine, TensorBoard, figures, writes
from tbjax.training.metrics import Pace, Record, memory_in_use, peak_flops, step_flops
from tbjax.training.optimizer import HOST, Name, make_optimizer
from tbjax.training.profiling import Profile
from tbjax.training.saving import Saver
from tbjax.training.step import DTYPES, Batch, Metrics, Precision, TrainState, find_nonfinite, init_state, make_step

log = logging.getLogger("tbjax")

# How a run ended: "finished", or the name of the signal that ended it.
End: TypeAlias = str
FINISHED: End = "finished"


class Diverged(RuntimeError):
    """A step's loss or gradient was no finite number."""


class DataEnded(RuntimeError):
    """There was less data than steps."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult:
    """What came of a run."""

    model: Decoder  # the one that was given, trained
    state: TrainState  # all that a further step needs
    step: int  # how many steps the model has had, those of earlier runs counted
    end: End
    losses: list[float]  # of each step of this run
    records: list[Record]
    evaluations: dict[int, Evaluation]  # by step


def train(
    model: Decoder,
    data: Iterable[Any],
    config: TrainConfig,
    *,
    eval_data: Iterable[Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = True,
    log_file: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
    on_record: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Train `model`, in place, on `data` for `config.steps` steps.

    `data` is a dataset of `tbjax.training.data`, or any iterable of batches: each process's rows, as `Batch`es of numpy
    arrays or dicts of their fields. `eval_data` is gone through every `config.eval_every` steps and at the end; it must
    end, or `config.eval_batches` must say when.

    With a `checkpoint_dir` the run is saved every `config.save_every` steps and at its end, also when Ctrl-C or SIGTERM
    ends it, and goes on from the newest checkpoint there unless `resume` is False. Data that has `state()` and
    `restore()` goes on where it stood; of any other the batches that were used are passed over.

    `log_file` gets a JSON object a line, `tensorboard` is a folder for event files. A progress line shows on terminals
    alone.
    """
    run = _Run(model, data, config, eval_data, checkpoint_dir, resume)
    try:
        sinks = _sinks(config.steps, run.step, log_file, tensorboard, progress)
        with Logs(sinks) as logs, Interruption() as interruption:
            end = run.steps(logs, interruption, on_record)
    finally:
        run.close()
    return TrainResult(
        model=model,
        state=run.state,
        step=run.step,
        end=end,
        losses=run.losses,
        records=run.records,
        evaluations=run.evaluations,
    )


def _sinks(
    steps: int, done: int, log_file: str | Path | None, tensorboard: str | Path | None, progress: bool
) -> list[Log]:
    """The logs that were asked for; none in any process but the first."""
    if not writes():
        return []
    made: list[Log] = [] if tensorboard is None else [TensorBoard(tensorboard)]
    if log_file is not None:
        made.append(JsonLines(log_file))
    if progress:
        made.append(ProgressLine(steps, done))
    return made


def make_train_step(
    model: Decoder,
    plan: Plan | None = None,
    optimizer: optax.GradientTransformation | Name = "adamw",
    **options: Any,
) -> jax.stages.Wrapped:
    """One jitted function (state, batch) -> (state, metrics) for a loop of your own; it takes the state's memory.

    Precision, rematerialisation, microbatches and the pipeline's schedule are the plan's (default: the one that the
    model was laid out by, if any); `options` are those of `tbjax.training.make_step`, and come before it. The first
    state is `tbjax.training.init_state(model, optimizer)`.
    """
    config = TrainConfig(steps=1, on_nonfinite="keep").with_plan(
        plan or getattr(model, "plan", None), getattr(model, "training_defaults", None)
    )
    rule = make_optimizer(optimizer, model) if isinstance(optimizer, str) else optimizer
    return make_step(rule, **config.step_options(model) | options)


class _Flight(NamedTuple):
    """A step that has been dispatched."""

    step: int
    metrics: Metrics
    batch: Batch
    ended: float | None  # when; None where it had not when it was dispatched


class _Run:
    """A run under way."""

    def __init__(
        self,
        model: Decoder,
        data: Iterable[Any],
        config: TrainConfig,
        eval_data: Iterable[Any] | None,
        checkpoint_dir: str | Path | None,
        resume: bool,
    ) -> None:
        config = config.with_plan(getattr(model, "plan", None), getattr(model, "training_defaults", None))
        if config.eval_every is not None and eval_data is None:
            raise ValueError(f"eval_every={config.eval_every}, but there is no eval_data.")
        if config.save_every is not None and checkpoint_dir is None:
            raise ValueError(f"save_every={config.save_every}, but there is no checkpoint_dir.")
        self.model, self.config = model, config
        self.precision: Precision = config.precision or "mixed"
        self.data, self.eval_data = _share(data, model), _share(eval_data, model)
        if hasattr(self.eval_data, "evaluation"):
            # A dataset repeats itself; its evaluation ends, and is the same every time.
            self.eval_data = self.eval_data.evaluation(config.eval_batches)
        self.sharding = model.sharding
        self.step, self.losses, self.records, self.evaluations = 0, [], [], {}
        self.saver = None if checkpoint_dir is None else Saver(checkpoint_dir, keep=config.keep)
        going_on = self.saver is not None and self.saver.latest is not None
        if going_on and not resume:
            raise ValueError(
                f"{checkpoint_dir} holds step {self.saver and self.saver.latest} of a run, and resume=False: name "
                "another folder, or remove it."
            )
        with_dtype(model, DTYPES[self.precision][0])
        optimizer = config.make_optimizer(model)
        self.state = init_state(model, optimizer, **config.state_options)
        passed = 0
        if going_on and self.saver is not None:
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)
            self.saver.check(like)
            for array in jax.tree.leaves(self.state):
                array.delete()  # room for what comes from the disk
            found = self.saver.restore(like)
            self.state, self.step = found.state, found.step
            if hasattr(self.data, "restore") and found.data is not None:
                self.data.restore(found.data)
            else:
                passed = found.step
            log.info("going on from step %d of %s", self.step, self.saver.folder)
        self.feed = Feed(self.data, self.sharding, model.config.vocab_size)
        self.feed.skip(passed)
        self.data_state = self._data_state()
        self.run_step = make_step(optimizer, **config.step_options(model))
        self.pace, self.flight = Pace(), None
        self.first, self.tokens, self.skipped = self.step, 0, 0
        self.devices = list(cast(Mesh, self.sharding.mesh).devices.flat)
        self.peak = peak_flops(self.devices, self.precision)
        # Since the last record: losses weighed by targets, and targets.
        self.summed, self.targets = 0.0, 0

    def steps(self, logs: Logs, interruption: Interruption, on_record: Callable[[Record], None] | None) -> End:
        """All steps that are left. `self.step` is the last one that was dispatched."""
        config, end = self.config, FINISHED
        profile = Profile(config, self.step)
        with contextlib.closing(profile):
            while self.step < config.steps:
                try:
                    batch = self._batch()
                except StopIteration:
                    self._land(logs, on_record)
                    self._save()
                    raise DataEnded(
                        f"the data ended after {self.step} steps of {config.steps}: give more, let it repeat, or ask "
                        f"for steps={self.step}. The model has had these steps."
                    ) from None
                profile.before(self.step + 1, self.state)
                self.state, metrics = self.run_step(self.state, batch)
                # CPUs compute a step before the call returns.
                ended = time.perf_counter() if metrics.loss.is_ready() else None
                self.step += 1
                self._land(logs, on_record)
                self.flight = _Flight(self.step, metrics, batch, ended)
                pause = _due(config.save_every, self.step) or _due(config.eval_every, self.step)
                # Processes agree only now and then: it makes them wait for one another.
                if (jax.process_count() == 1 or self.step % config.log_every == 0) and interruption.agreed():
                    end = interruption.cause or end
                    break
                if pause and self.step < config.steps:
                    self._land(logs, on_record)
                    if _due(config.eval_every, self.step):
                        self._evaluate(logs)
                    if _due(config.save_every, self.step):
                        self._save()
                    self.pace.pause_ended()
            self._land(logs, on_record)
        if self.eval_data is not None and end == FINISHED and self.step not in self.evaluations:
            self._evaluate(logs)
        self._save()
        return end

    def close(self) -> None:
        """Give the model its weights, and let go of what was open."""
        adopt(self.model, on_devices(self.state.model))
        if self.saver is not None:
            self.saver.__exit__(None, None, None)

    def _batch(self) -> Batch:
        batch = next(self.feed)
        if self.step == self.first and self.feed.shape is not None:
            for name, asked, found in (
                ("batch_size", self.config.batch_size, self.feed.shape.rows),
                ("seq_len", self.config.seq_len, self.feed.shape.sequence),
            ):
                if asked not in (None, found):
                    raise ValueError(f"TrainConfig.{name}={asked}, but the data's batches have {found}.")
        self.data_state = self._data_state()
        return batch

    def _land(self, logs: Logs, on_record: Callable[[Record], None] | None) -> None:
        """Wait for the step in flight, and take down what it reports."""
        if self.flight is None:
            return
        flight, self.flight = self.flight, None
        loss, targets = float(flight.metrics.loss), int(flight.metrics.targets)
        self.pace.step_ended(flight.ended or time.perf_counter())
        self.losses.append(loss)
        if not bool(flight.metrics.finite) and self.config.on_nonfinite != "keep":
            self._not_finite(flight)
        if bool(flight.metrics.skipped):
            self.skipped += 1  # as float16 does now and then, to find its scale
        else:
            self.summed += loss * targets
            self.targets += targets
        logs.advance(flight.step)
        if flight.step % self.config.log_every == 0 or flight.step == self.config.steps:
            record = self._record(flight)
            self.records.append(record)
            logs.write(record.step, {name: value for name, value in record.values().items() if name != "step"})
            log.info("step %d of %d: %s", record.step, self.config.steps, figures(record.values()))
            if on_record is not None:
                on_record(record)

    def _record(self, flight: _Flight) -> Record:
        seconds, timed = self.pace.read()
        shape = self.feed.shape
        speed = mfu = None
        if shape is not None and timed and seconds > 0:
            speed = timed * shape.rows * shape.sequence / seconds
            if self.peak is not None:
                mfu = timed * step_flops(self.model.config, shape) / seconds / self.peak
        self.tokens += self.targets
        record = Record(
            step=flight.step,
            loss=self.summed / self.targets if self.targets else math.nan,
            gradient_norm=float(flight.metrics.gradient_norm),
            learning_rate=self.config.rate(flight.step),
            tokens=self.tokens,
            tokens_per_second=speed,
            mfu=mfu,
            memory=memory_in_use(self.devices),
            skipped=self.skipped,
        )
        self.summed, self.targets = 0.0, 0
        return record

    def _not_finite(self, flight: _Flight) -> None:
        """Say which step it was and where it began; raise if that is to end the run."""
        options = self.config.step_options(self.model)
        needed = {name: options[name] for name in ("precision", "remat", "microbatches", "schedule")}
        place = find_nonfinite(self.state, flight.batch, **needed)
        what = f"step {flight.step}: loss {flight.metrics.loss:.4g}, gradient norm {flight.metrics.gradient_norm:.4g}"
        where = str(place) if place else "Computed again, all of it is finite: the weights have moved since."
        if self.config.on_nonfinite == "skip":
            log.warning("%s. %s The step was skipped.", what, where)
            return
        self.step = flight.step - 1  # what came after it has changed nothing
        raise Diverged(f"{what}. {where} The model is as step {self.step} left it; on_nonfinite='skip' would go on.")

    def _evaluate(self, logs: Logs) -> None:
        if self.eval_data is None:
            return
        found = evaluate(
            on_devices(self.state.model),
            self.eval_data,
            precision=self.precision,
            batches=self.config.eval_batches,
        )
        self.evaluations[self.step] = found
        logs.write(self.step, found.values())
        log.info("step %d of %d: %s", self.step, self.config.steps, figures(found.values()))

    def _save(self) -> None:
        if self.saver is not None:
            settings = dataclasses.asdict(self.config) if isinstance(self.config.optimizer, str) else None
            self.saver.save(self.state, self.step, data=self.data_state, config=settings)

    def _data_state(self) -> Any:
        return self.data.state() if hasattr(self.data, "state") else None


def with_dtype(model: Decoder, dtype: Any) -> None:
    """Convert the weights of `model`, in place."""
    if model.dtype == dtype:
        return
    convert = jax.jit(
        lambda model: jax.tree.map(lambda a: a.astype(dtype), model),
        out_shardings=jax.tree.map(lambda a: a.sharding, model),
        donate_argnums=0,
    )
    adopt(model, convert(model))


def adopt(model: Decoder, other: Decoder) -> None:
    """Give `model` the arrays of `other`."""
    for leaf, array in zip(leaves(model), jax.tree.leaves(other), strict=True):
        leaf.variable.set_value(array)


def on_devices(model: Decoder) -> Decoder:
    """`model`, with such weights as lie in the host's memory brought to the devices."""

    def bring(array: jax.Array) -> jax.Array:
        where = array.sharding
        if where.memory_kind != HOST or not isinstance(where, NamedSharding):
            return array
        return jax.device_put(array, NamedSharding(where.mesh, where.spec))

    return jax.tree.map(bring, model)


def _share(data: Any, model: Decoder) -> Any:
    """The data of this process: where tp or pp crosses processes, several have the same."""
    share = share_of_rows(model.sharding)
    if hasattr(data, "share") and share != (jax.process_index(), jax.process_count()):
        return data.share(*share)
    return data


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
