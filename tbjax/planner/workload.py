"""What is to be done, and one way of laying it out: the two values that everything in the planner is a function of.

A `Workload` is the user's: the task, its batch, its precision. A `Layout` is the planner's: the mesh and what goes with
it. Memory, time and the compiler's verdict all follow from (model, workload, layout, hardware), and a plan is the best
layout for the other three.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from tbjax.mesh import AXES
from tbjax.quantize import recipe
from tbjax.quantize.rules import Named
from tbjax.sharding import ShardingStrategy
from tbjax.shown import changed

Task: TypeAlias = Literal["train", "inference"]
Optimizer: TypeAlias = Literal["adamw", "adafactor", "sgd", "lion", "muon"]
Precision: TypeAlias = Literal["mixed", "bfloat16", "float32"]
Quantization: TypeAlias = Named
Remat: TypeAlias = Literal["none", "dots", "full", "stage"]  # "stage": of a pipeline stage its input alone
Schedule: TypeAlias = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"]
Offloaded: TypeAlias = Literal["optimizer", "activations"]

# A weight like most.
PROJECTION = "stacks.0.0.mlp.up.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be done, whatever it runs on."""

    task: Task = "train"
    global_batch: int  # sequences in a step of training; sequences served at once in inference
    seq_len: int  # tokens of each; in inference, of prompt and answer together
    new_tokens: int = 0  # inference: how many of `seq_len` are generated
    # "mixed": float32 parameters and optimizer state, bfloat16 matmuls and activations. The others: that dtype for all.
    precision: Precision = "mixed"
    optimizer: Optimizer = "adamw"
    quantization: Quantization | None = None  # inference: of the weights

    __repr__ = changed

    def __post_init__(self) -> None:
        for name in ("global_batch", "seq_len"):
            _positive("Workload", name, getattr(self, name))
        for name, kind in (("task", Task), ("precision", Precision), ("optimizer", Optimizer)):
            _one_of("Workload", name, getattr(self, name), get_args(kind))
        if self.quantization is not None:
            _one_of("Workload", "quantization", self.quantization, get_args(Quantization))
            if self.task == "train":
                raise ValueError(f"quantization={self.quantization!r} is of weights that only serve: task='inference'.")
        if not isinstance(self.new_tokens, int) or not 0 <= self.new_tokens <= self.seq_len:
            raise ValueError(f"new_tokens={self.new_tokens!r} must be between 0 and seq_len={self.seq_len}.")

    @property
    def training(self) -> bool:
        return self.task == "train"

    @property
    def prompt_len(self) -> int:
        return self.seq_len - self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens in a step of training."""
        return self.global_batch * self.seq_len

    @property
    def parameter_bytes(self) -> float:
        """Bytes in which one parameter is stored that is not quantised."""
        if self.precision == "float32" or (self.precision == "mixed" and self.training):
            return 4.0
        return 2.0

    def bytes_of(self, path: str) -> float:
        """Bytes of one number of the weight at `path`, with its share of scales and offsets if it is quantised."""
        rules = recipe(self.quantization)
        encoding = None if rules is None else rules.encoding(path)
        if encoding is None:
            return self.parameter_bytes
        return encoding.bits / 8 + (encoding.frame_bytes / encoding.group if encoding.group else 0)

    def moved_by(self, path: str) -> float:
        """Bytes that multiplying with the weight at `path` moves for each number of it: groups are floats first, which
        the compilers write and read."""
        rules = recipe(self.quantization)
        encoding = None if rules is None else rules.encoding(path)
        grouped = encoding is not None and encoding.group is not None
        return self.bytes_of(path) + (2 * self.compute_bytes if grouped else 0)

    @property
    def layer_bytes(self) -> float:
        """As `bytes_of`, of the projections of attention and the feed-forward layer: almost all of a layer."""
        return self.bytes_of(PROJECTION)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "float32" else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay a workload out: the sizes of the mesh axes and what goes with them."""

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    sequence_parallel: bool = False
    # Parts of a device's batch that are run one after another: of the pipeline if there is one, otherwise gradient
    # accumulation.
    microbatches: int = 1
    remat: Remat = "full"
    schedule: Schedule = "1f1b"  # where pp > 1
    chunks: int = 1  # pieces of the model on each stage, in the interleaved schedule
    offload: tuple[Offloaded, ...] = ()  # what lies in the host's memory

    __repr__ = changed

    def __post_init__(self) -> None:
        for name in (*AXES, "microbatches", "chunks"):
            _positive("Layout", name, getattr(self, name))
        _one_of("Layout", "strategy", self.strategy, tuple(ShardingStrategy))
        object.__setattr__(self, "strategy", ShardingStrategy(self.strategy))
        object.__setattr__(self, "offload", tuple(self.offload))
        _one_of("Layout", "remat", self.remat, get_args(Remat))
        _one_of("Layout", "schedule", self.schedule, get_args(Schedule))
        for name in self.offload:
            _one_of("Layout", "offload", name, get_args(Offloaded))
        if self.remat == "stage" and self.pp == 1:
            raise ValueError("remat='stage' keeps the input of a pipeline stage, and pp=1 has none: 'full' would do.")

    @property
    def mesh(self) -> Mapping[str, int]:
        """The mesh axes, outermost first, as `make_mesh` takes them."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def batch_ways(self) -> int:
        """Over how many devices the batch is cut."""
        return self.dp * self.fsdp * self.ep

    @property
    def pieces(self) -> int:
        """Of the model, on each stage of a pipeline: a V-shaped schedule has two."""
        return 2 if self.schedule == "zb-v" else self.chunks

    def rows(self, workload: Workload) -> int:
        """Sequences in one microbatch on one device."""
        ways = self.batch_ways * self.microbatches
        if workload.global_batch % ways:
            raise ValueError(
                f"global_batch={workload.global_batch} does not divide over dp*fsdp*ep={self.batch_ways} devices in "
                f"{self.microbatches} microbatches: a multiple of {ways} would."
            )
        return workload.global_batch // ways


def _positive(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}.{name} must be a positive integer, not {value!r}.")


def _one_of(owner: str, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        words = ", ".join(repr(str(one)) for one in known)
        raise ValueError(f"{owner}.{name}={value!r} is unknown: tbjax knows {words}.")
