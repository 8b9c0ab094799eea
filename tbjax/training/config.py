"""How to train: everything about a run that is neither the model nor the data, in one frozen value.

    config = TrainConfig(steps=1000, learning_rate=3e-4, warmup=100, eval_every=100, save_every=500)
    TrainConfig.from_json(config.to_json()) == config

A value that cannot be is refused when the config is made, not when the step that would use it comes. What is None is
taken from what the model says of its training, or from the plan that it was laid out by, and else from `USUAL`.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import jax
import optax

from tbjax.elsewhere import called_here, told_by_name
from tbjax.model import Decoder
from tbjax.pipeline.schedule import named
from tbjax.plain import plain, restore
from tbjax.planner.plan import Plan
from tbjax.remat import Remat
from tbjax.shown import changed
from tbjax.training import compression
from tbjax.training.learning_rate import Schedule, learning_rate, wsd_decay
from tbjax.training.optimizer import Layerwise, Name, OnlyLayerwise, make_optimizer
from tbjax.training.precision import DTYPES, OnNonfinite, Precision
from tbjax.training.update import Offloaded

FailedSavePolicy: TypeAlias = Literal["continue", "stop"]

# What belongs to an optimizer by name, and that an optax transformation brings itself.
OF_OPTIMIZER = ("learning_rate", "schedule", "warmup", "decay", "final", "weight_decay", "decayed", "clip_norm")

# Optimizers by name without weight decay.
UNDECAYED = ("sgd", "adafactor")

# What is None in a config and in no plan.
USUAL: Mapping[str, Any] = {
    "optimizer": "adamw",
    "precision": "mixed",
    "remat": "full",
    "microbatches": 1,
    "pipeline": "1f1b",
    "chunks": None,
    "offload": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model says of how it is to be trained (`model.training_defaults`), where a config leaves it open."""

    precision: Precision | None = None
    remat: str | None = None
    microbatches: int | None = None
    pipeline: str | None = None
    chunks: int | None = None
    offload: tuple[Offloaded, ...] | None = None

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@told_by_name
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Steps are counted from 1: `save_every=100` saves after steps 100, 200, ..."""

    steps: int  # in all, those before a resumption counted
    # Sequences in a step, all devices together, and tokens of each. The data decides; what is given here is checked.
    batch_size: int | None = None
    seq_len: int | None = None
    # Of what is drawn by lot. The data's order has its own, which must be this one; compression draws by it.
    seed: int | None = None

    optimizer: Name | Any = None  # or any optax.GradientTransformation, which brings its own settings
    learning_rate: float = 3e-4  # at its peak
    schedule: Schedule = "cosine"
    warmup: int = 0  # steps
    decay: int | None = None  # steps at the end in which wsd falls; None: a tenth of all
    final: float = 0.1  # of the peak, at the end
    weight_decay: float = 0.1
    decayed: str | None = None  # a regular expression of the paths that decay; None: all matrices
    clip_norm: float | None = 1.0  # of all gradients together; None or 0: as they are
    frozen: str | None = None  # a regular expression of the paths that stay as they are

    precision: Precision | None = None
    remat: str | None = (
        None  # as `tbjax.remat` spells it: "none", "dots", "full", "full:0.5", "save(attention,mlp)", ...
    )
    microbatches: int | None = None  # parts of a batch that follow one another: gradient accumulation
    pipeline: str | None = None  # the schedule of pipeline stages, on meshes with pp > 1
    chunks: int | None = None  # pieces of the model on a stage, for the interleaved schedule
    offload: tuple[Offloaded, ...] | None = None  # what lies in the host's memory between its uses
    reduce_dtype: Literal["float32", "bfloat16"] | None = None  # of gradients on their way between devices
    compression: str | None = None  # of gradients summed over dp: "top-k:0.01", "random-k:0.1", "int8"
    z_loss: float = 0.0  # weight of the squared logarithm of the softmax's sum

    # After a step whose loss or gradient is no finite number: end the run, go on without that step, or let it be.
    on_nonfinite: OnNonfinite = "stop"

    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = None  # None: all of the data
    save_every: int | None = None  # None: every 500 steps; and at the end
    keep: int = 2  # checkpoints, the newest ones
    keep_every: int | None = None  # and those of the steps that this divides
    # Go on while a checkpoint is written, for a tenth of `save_every` at most: a run that is killed loses `save_every`
    # steps and these. It takes memory of the host for a copy of the state. False: wait, and lose `save_every` at most.
    async_save: bool = True
    on_failed_save: FailedSavePolicy = "continue"  # after a checkpoint that could not be written; or "stop" the run
    profile: str | None = None  # a folder for a trace of `profile_steps` steps, soon after the first
    profile_steps: int = 3

    # Seconds between two steps after which a process takes itself for hanging and ends; None: 600 on several processes,
    # on a single one never.
    step_timeout: float | None = None

    __repr__ = changed

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep", "profile_steps"):
            _whole(name, getattr(self, name), 1)
        for name in (
            "batch_size",
            "seq_len",
            "microbatches",
            "chunks",
            "decay",
            "eval_every",
            "eval_batches",
            "save_every",
            "keep_every",
        ):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("warmup", self.warmup, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0)
        for name in ("learning_rate", "weight_decay", "final", "clip_norm", "z_loss"):
            _number(name, getattr(self, name), optional=name == "clip_norm")
        for name, known in (
            ("schedule", get_args(Schedule)),
            ("precision", (None, *DTYPES)),
            ("on_nonfinite", get_args(OnNonfinite)),
            ("async_save", (True, False)),
            ("on_failed_save", get_args(FailedSavePolicy)),
        ):
            _one_of(name, getattr(self, name), known)
        _number("step_timeout", self.step_timeout, optional=True)
        for name in ("decayed", "frozen"):
            _expression(name, getattr(self, name))
        if self.offload is not None:
            object.__setattr__(self, "offload", tuple(self.offload))
            for name in self.offload:
                _one_of("offload", name, get_args(Offloaded))
        if self.remat not in (None, "stage"):
            Remat.parse(self.remat)  # raises where it is not understood
        compression.parse(self.compression)
        if self.pipeline is not None:
            named(self.pipeline, self.chunks)  # raises where there is no such schedule
        self._check_optimizer()
        self._check_steps()

    def _check_optimizer(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self.optimizer is None or isinstance(self.optimizer, str):
            _one_of("optimizer", self.optimizer, (None, *get_args(Name)))
            if self.optimizer in UNDECAYED and self.weight_decay not in (0, defaults["weight_decay"]):
                raise ValueError(
                    f"TrainConfig.weight_decay={self.weight_decay}: {self.optimizer} decays nothing. Leave it out, or "
                    "choose another optimizer."
                )
            return
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise ValueError(
                f"TrainConfig.optimizer={self.optimizer!r} must be one of {', '.join(map(repr, get_args(Name)))}, or "
                "an optax.GradientTransformation."
            )
        for name in OF_OPTIMIZER:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"TrainConfig.{name}={getattr(self, name)!r} is for optimizers by name: put it into the optax "
                    "transformation that is given as the optimizer."
                )

    def _check_steps(self) -> None:
        falling = wsd_decay(self.steps, self.decay) if self.schedule == "wsd" else 0
        if self.warmup + falling > self.steps or self.warmup >= self.steps:
            what = f"warmup={self.warmup}" + (f" and decay={falling}" if falling else "")
            raise ValueError(f"TrainConfig: {what} leave nothing of steps={self.steps}.")
        if self.decay is not None and self.schedule != "wsd":
            raise ValueError(f"TrainConfig.decay={self.decay} is for schedule='wsd', not {self.schedule!r}.")

    def with_plan(self, plan: Plan | None, defaults: Defaults | None = None) -> "TrainConfig":
        """This config with what it leaves open filled in: from `defaults`, else `plan`, as far as there are any."""
        given = dict(USUAL)
        if plan is not None and plan.workload.training:
            layout = plan.layout
            given |= {
                "optimizer": plan.workload.optimizer,
                "precision": plan.workload.precision,
                "remat": layout.remat,
                "microbatches": layout.microbatches,
            }
            given |= {"pipeline": layout.schedule, "offload": layout.offload}
            given |= {"chunks": layout.chunks}
        given |= defaults.given if defaults else {}
        if self.pipeline is not None:
            given["chunks"] = None  # they are another schedule's
        left_open = {name: value for name, value in given.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **left_open)

    def rate(self, step: int) -> float | None:
        """The learning rate of step `step`, counted from 1; None where the optimizer has its own."""
        return float(jax.device_get(self._schedule()(step - 1))) if self._by_name else None

    def make_optimizer(self, model: Decoder) -> optax.GradientTransformation:
        """The optimizer for the parameters of `model`, which may be abstract."""
        if not self._by_name:
            return cast(optax.GradientTransformation, self.optimizer)
        made = make_optimizer(
            cast(Name, self.optimizer or USUAL["optimizer"]),
            model,
            learning_rate=self._schedule(),
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            decayed=self.decayed,
        )
        # XLA makes a loop of its own for each array that an update gives on a CPU, and a copy of each that two of them
        # read: two more copies of the model's size for AdamW. Layer by layer these are copies of a layer.
        on_cpu = model.sharding.platform == "cpu"
        return OnlyLayerwise(*made) if on_cpu and isinstance(made, Layerwise) else made

    @property
    def state_options(self) -> dict[str, Any]:
        """What `init_state` and `make_step` must both be told, of a config that leaves nothing open."""
        return {
            "precision": self.precision,
            "offload": self.offload,
            "frozen": self.frozen,
            "on_nonfinite": self.on_nonfinite,
            "compression": compression.parse(self.compression, self.seed or 0),
        }

    def step_options(self, model: Decoder) -> dict[str, Any]:
        """What `make_step` is told besides the optimizer, of a config that leaves nothing open."""
        staged = model.sharding.size("pp") > 1
        return self.state_options | {
            "remat": self.remat,
            "microbatches": self.microbatches,
            "schedule": named(self.pipeline or USUAL["pipeline"], self.chunks) if staged else None,
            "z_loss": self.z_loss,
            "reduce_dtype": self.reduce_dtype,
        }

    @property
    def saver_options(self) -> dict[str, Any]:
        """What `tbjax.training.saving.Saver` is told."""
        return {"keep": self.keep, "keep_every": self.keep_every, "background": self.async_save}

    @property
    def _by_name(self) -> bool:
        return self.optimizer is None or isinstance(self.optimizer, str)

    def _schedule(self) -> optax.Schedule:
        return learning_rate(
            self.schedule,
            self.learning_rate,
            self.steps,
            warmup=self.warmup,
            decay=self.decay,
            final=self.final,
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The config as JSON, written to `path` if one is given."""
        if not self._by_name:
            raise TypeError(
                "TrainConfig.optimizer is an optax transformation, which JSON cannot hold: name the optimizer instead."
            )
        text = json.dumps(plain(self), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "TrainConfig":
        """What `to_json` wrote: a text, or the path of a file."""
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = source if isinstance(source, str) and is_text else Path(source).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{'the text' if is_text else source} is not JSON: {error}.") from error
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            said = called_here(*unknown) or f"it has {', '.join(known)}."
            raise ValueError(f"TrainConfig has no field {unknown[0]!r}: {said}")
        return restore(cls, values, "" if is_text else str(source))


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"TrainConfig.{name}={value!r} must be a whole number from {least} on.")


def _number(name: str, value: object, *, optional: bool) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"TrainConfig.{name}={value!r} must be a finite number from 0 on.")


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"TrainConfig.{name}={value!r} is unknown: tbjax knows {', '.join(map(repr, known))}.")


def _expression(name: str, rule: object) -> None:
    if rule is None:
        return
    try:
        re.compile(rule)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (re.error, TypeError) as error:
        raise ValueError(f"TrainConfig.{name}={rule!r} is not a regular expression: {error}.") from None
