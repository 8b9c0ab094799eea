"""The training loop: batches in, steps out, and everything that a run needs around them.

    result = train(model, data, TrainConfig(steps=1000), eval_data=held_out, checkpoint_dir="run")
    result.losses[-1], result.evaluations[result.step].perplexity

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import optax
from jax.sharding import Mesh

from tbjax.elsewhere import told_by_name
from tbjax.heap import give_back
from tbjax.model import Decoder
from tbjax.pages import losses as curves
from tbjax.planner.plan import Plan
from tbjax.remat import Remat
from tbjax.training.batches import Feed, own_share
from tbjax.training.config import TrainConfig
from tbjax.training.evaluation import Evaluation, evaluate
from tbjax.training.holding import adopt, on_devices, own, with_dtype
from tbjax.training.interruption import Interruption
from tbjax.training.logs import JsonLines, Log, Logs, ProgressLine, TensorBoard, figures, writes
from tbjax.training.metrics import Pace, Record, peak_flops, peak_memory, step_flops
from tbjax.training.nonfinite import find_nonfinite
from tbjax.training.optimizer import Name, make_optimizer
from tbjax.training.precision import DTYPES, Precision
from tbjax.training.profiling import Profile
from tbjax.training.saving import SaveFailed, Saver
from tbjax.training.state import Batch, Metrics, TrainState, init_state
from tbjax.training.step import make_step
from tbjax.training.watchdog import watchdog_of

log = logging.getLogger("tbjax")

# How a run ended: "finished", or the name of the signal that ended it.
End: TypeAlias = str
FINISHED: End = "finished"

# Steps between checkpoints where the config does not say: as often as transformers' Trainer saves.
SAVE_EVERY = 500

# Of a run whose checkpoints could not be written, which was to end then.
SAVE_FAILED: End = "a checkpoint that could not be written"


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

    def __repr__(self) -> str:
        return f"<TrainResult: {self.end}, {self._heading}>"

    def _repr_html_(self) -> str:
        return curves.fragment(self._curve, self._heading)

    def to_html(self, path: str | Path | None = None) -> str:
        """A page with the curve of the losses, written to `path` where one is given."""
        return curves.page(self._curve, self._heading, path)

    @property
    def _curve(self) -> curves.Curve:
        evaluations = {step: each.loss for step, each in self.evaluations.items()}
        return curves.Curve(self.losses, evaluations, self.step - len(self.losses) + 1)

    @property
    def _heading(self) -> str:
        if not self.losses:
            return f"no step after {self.step}"
        first = self.step - len(self.losses) + 1
        return f"loss {self.losses[0]:.4g} to {self.losses[-1]:.4g} in steps {first} to {self.step}"


@told_by_name
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
    end, or `config.eval_batches` must say when, and be one that can be gone through again.

    With a `checkpoint_dir` the run is saved every `config.save_every` steps and at its end, also when Ctrl-C or SIGTERM
    ends it, and goes on from the newest whole checkpoint there unless `resume` is False. One that is killed loses the
    steps of an interval at most, and of a tenth of one if the newest was just being written (none of these without
    `config.async_save`). Data that has `state()` and `restore()` goes on where it stood; of any other the batches that
    were used are passed over. A run that diverges is saved as the step before left it. A checkpoint that cannot be
    written, on a full disk say, is logged as an error and the run goes on, unless `config.on_failed_save` is "stop"; if
    it is the last one, `SaveFailed` is raised.

    `log_file` gets a JSON object a line, `tensorboard` is a folder for event files. A progress line shows on terminals
    alone.
    """
    run = _Run(model, data, config, eval_data, checkpoint_dir, resume)
    try:
        sinks = _sinks(config.steps, run.step, log_file, tensorboard, progress)
        with Logs(sinks) as logs, contextlib.closing(run.watchdog), Interruption() as interruption:
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
    optimizer: optax.GradientTransformation | Name | None = None,
    **options: Any,
) -> jax.stages.Wrapped:
    """One jitted function (state, batch) -> (state, metrics) for a loop of your own; it takes the state's memory.

    Precision, rematerialisation, microbatches, the pipeline's schedule and, where none is given, the optimizer are the
    plan's (default: the one that the model was laid out by, if any); `options` are those of
    `tbjax.training.make_step`, and come before it. The first state is `tbjax.training.init_state(model, optimizer)`,
    which has to be told the same precision, offloading and the like where they are not the usual.
    """
    config = TrainConfig(steps=1, on_nonfinite="keep").with_plan(
        plan or getattr(model, "plan", None), getattr(model, "training_defaults", None)
    )
    chosen = optimizer or config.optimizer
    rule = make_optimizer(cast(Name, chosen), model) if isinstance(chosen, str) else chosen
    return make_step(rule, **config.step_options(model) | options)


class _Flight(NamedTuple):
    """A step that has been dispatched."""

    step: int
    metrics: Metrics
    batch: Batch
    data_before: Any  # where the data stood before the batch was taken
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
        if isinstance(eval_data, Iterator) and config.eval_every is not None and config.eval_every < config.steps:
            raise ValueError(
                f"eval_data is a {type(eval_data).__name__}, which can be gone through once, and "
                f"eval_every={config.eval_every} is more often than that: give a list, or a dataset."
            )
        self.sharding = model.sharding
        self.data, self.eval_data = own_share(data, self.sharding), own_share(eval_data, self.sharding)
        drawn = getattr(data, "seed", None)
        if isinstance(drawn, int) and config.seed not in (None, drawn):
            raise ValueError(f"TrainConfig.seed={config.seed}, but the data's is {drawn}: give both the same.")
        self.step, self.losses, self.records, self.evaluations = 0, [], [], {}
        self.saver = None if checkpoint_dir is None else Saver(checkpoint_dir, **config.saver_options)
        going_on = self.saver is not None and self.saver.latest is not None
        if going_on and not resume:
            raise ValueError(
                f"{checkpoint_dir} holds step {self.saver and self.saver.latest} of a run, and resume=False: name "
                "another folder, or remove it."
            )
        own(model)
        with_dtype(model, DTYPES[self.precision][0])
        optimizer = config.make_optimizer(model)
        self.run_step = make_step(optimizer, **config.step_options(model))
        self.pace, self.flight = Pace(), None
        self.watchdog = watchdog_of(config.step_timeout)
        self.devices = list(cast(Mesh, self.sharding.mesh).devices.flat)
        self.peak = peak_flops(self.devices, self.precision)
        self.tokens, self.skipped, self.diagnosed = 0, 0, False
        # Since the last record: losses weighed by targets, and targets.
        self.summed, self.targets = 0.0, 0
        self.save_every = config.save_every or SAVE_EVERY
        self.state = init_state(model, optimizer, **config.state_options)
        if going_on and self.saver is not None:
            self._go_on(self.saver)
        else:
            self.feed = Feed(self.data, self.sharding, model.config.vocab_size)
        self.first, self.data_state = self.step, self._data_state()
        if self.saver is not None:
            self.saver.check_data(self.data_state)

    def _go_on(self, saver: Saver) -> None:
        """From the newest checkpoint. The model's weights are touched last, when nothing is left to be refused."""
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self.state)
        like = like._replace(loss_scale=self.state.loss_scale)  # for a run that begins to have one
        saver.check(like)
        found = saver.progress()
        self.step, self.tokens, self.skipped, data = found.step, found.tokens, found.skipped, found.data
        placed = hasattr(self.data, "restore") and data is not None
        if placed:
            self.data.restore(data)
        self.feed = Feed(self.data, self.sharding, self.model.config.vocab_size)
        try:
            self.feed.skip(0 if placed else self.step)
        except StopIteration:
            raise DataEnded(
                f"the data ended before step {self.step}, from which the run in {saver.folder} is to go on: give all "
                "that it had, and more."
            ) from None
        for array in jax.tree.leaves(self.state._replace(loss_scale=None)):
            array.delete()  # room for what comes from the disk
        try:
            self.state = saver.restore(like)
        except BaseException as error:
            error.add_note("The model's weights were given up for those on the disk: load the model again.")
            raise
        log.info("going on from step %d of %s", self.step, saver.folder)

    def steps(self, logs: Logs, interruption: Interruption, on_record: Callable[[Record], None] | None) -> End:
        """All steps that are left. `self.step` is the last one that was dispatched."""
        config, end = self.config, FINISHED
        profile = Profile(config, self.step)
        with contextlib.closing(profile):
            while self.step < config.steps:
                # The second step of a run may compile once more: its state lies where the first one left it.
                self.watchdog.beat(self.step, longer=self.step < self.first + 2)
                data_before = self.data_state
                try:
                    batch = self._batch()
                except StopIteration:
                    self._land(logs, on_record)
                    self._save_last()
                    raise DataEnded(
                        f"the data ended after {self.step} steps of {config.steps}: give more, let it repeat, or ask "
                        f"for steps={self.step}. The model has had these steps."
                    ) from None
                if self.step == self.first:  # compiled first, to run in the room that the compiler took
                    self.run_step.lower(self.state, batch).compile()
                    give_back()
                profile.before(self.step + 1, self.state)
                self.state, metrics = self.run_step(self.state, batch)
                # CPUs compute a step before the call returns.
                ended = time.perf_counter() if metrics.loss.is_ready() else None
                self.step += 1
                self._land(logs, on_record)
                self.flight = _Flight(self.step, metrics, batch, data_before, ended)
                save = self.saver is not None and _due(self.save_every, self.step)
                late = self.saver is not None and self.saver.overdue(self.step, self.save_every)
                pause = save or late or _due(config.eval_every, self.step)
                if config.on_failed_save == "stop" and self.saver is not None and self.saver.failing:
                    interruption.cause = interruption.cause or SAVE_FAILED
                if interruption.agreed():
                    end = interruption.cause or end
                    break
                if pause and self.step < config.steps:
                    self.watchdog.beat(self.step, longer=True)
                    self._land(logs, on_record)
                    if late:
                        self._see_saved()
                    # Saved first: what fails in an evaluation must not cost the steps before it.
                    if save:
                        self._save()
                    if _due(config.eval_every, self.step):
                        self._evaluate(logs)
                    self.pace.pause_ended()
            self._land(logs, on_record)
        self.watchdog.beat(self.step, longer=True)
        self._save_last()
        if self.eval_data is not None and end == FINISHED and self.step not in self.evaluations:
            self._evaluate(logs)
        return end

    def close(self) -> None:
        """Give the model its weights, and let go of what was open."""
        adopt(self.model, on_devices(self.state.model))
        if self.saver is not None:
            self.saver.close()

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
            memory=peak_memory(self.devices),
            skipped=self.skipped,
        )
        self.summed, self.targets = 0.0, 0
        return record

    def _not_finite(self, flight: _Flight) -> None:
        """Say which step it was and where it began; raise if that is to end the run."""
        what = f"step {flight.step}: loss {flight.metrics.loss:.4g}, gradient norm {flight.metrics.gradient_norm:.4g}."
        if self.config.on_nonfinite == "skip":
            # Looking for the place compiles everything anew: of many such steps the first must do.
            where = "" if self.diagnosed else f" {self._place(flight)}"
            log.warning("%s%s The step was skipped.", what, where)
            self.diagnosed = True
            return
        # What came after it has changed nothing.
        self.step, self.data_state = flight.step - 1, flight.data_before
        if self.step:
            self._save_last()
        raise Diverged(
            f"{what} {self._place(flight)} The model is as step {self.step} left it; on_nonfinite='skip' would go on."
        )

    def _place(self, flight: _Flight) -> str:
        """Where a step stopped being finite, in a sentence."""
        options = self.config.step_options(self.model)
        needed = {name: options[name] for name in ("precision", "remat", "microbatches", "schedule")}
        try:
            if "activations" in options["offload"]:
                needed["remat"] = Remat.parse(needed["remat"]).offloading()
            place = find_nonfinite(self.state, flight.batch, **needed)
        except (RuntimeError, ValueError, TypeError) as error:  # out of memory, say
            log.warning("where step %d stopped being finite could not be found out: %s", flight.step, error)
            return "Where it began could not be found out."
        return str(place) if place else "Computed again, all of it is finite: the weights have moved since."

    def _evaluate(self, logs: Logs) -> None:
        if self.eval_data is None:
            return
        found = evaluate(
            on_devices(self.state.model),
            self.eval_data,
            precision=self.precision,
            batches=self.config.eval_batches,
            on_batch=lambda count: self.watchdog.beat(self.step, longer=count < 2),  # the first ones compile
        )
        self.evaluations[self.step] = found
        logs.write(self.step, found.values())
        log.info("step %d of %d: %s", self.step, self.config.steps, figures(found.values()))

    def _save(self) -> None:
        """Begin to save this step. What goes wrong has been logged by then, and costs a checkpoint, not the run."""
        if self.saver is None:
            return
        settings = dataclasses.asdict(self.config) if isinstance(self.config.optimizer, str) else None
        plan = getattr(self.model, "plan", None)
        state = {"data": self.data_state, "config": settings, "plan": None if plan is None else plan.to_json()}
        state |= {"tokens": self.tokens + self.targets, "skipped": self.skipped}
        self._see_saved()
        with self._costing_no_more():
            self.saver.save(self.state, self.step, **state)

    def _see_saved(self) -> None:
        """Wait until what is being written is in its place."""
        if self.saver is not None:
            with self._costing_no_more():
                self.saver.wait()

    @contextlib.contextmanager
    def _costing_no_more(self) -> Iterator[None]:
        """What fails within costs a checkpoint, and the run only where it is to stop then."""
        try:
            yield
        except SaveFailed:
            if self.config.on_failed_save == "stop":
                raise

    def _save_last(self) -> None:
        """Save this step, and see it done. Raises `SaveFailed`."""
        self._save()
        if self.saver is not None:
            self.saver.wait()
            if self.saver.latest != self.step:
                raise SaveFailed(f"step {self.step} could not be saved: the log says why. The model has its weights.")

    def _data_state(self) -> Any:
        return self.data.state() if hasattr(self.data, "state") else None


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
