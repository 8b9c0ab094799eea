"""Asks the target's own compiler: does the program that a plan describes fit, and what does it do between devices?

    verify(config, workload, layout, cluster("h100:8x8"))       # on any machine, with `tbjax[verify]` installed

The compiler runs in a process of its own (`tbjax.planner.compile`), so that the caller's JAX is as it was, whatever
devices it has or lacks.

A program scanned over its layers compiles as fast at any depth, so whole models are compiled as they are. Where the
layers do not repeat and compiling is long, `depths=(a, b)` compiles two shallow models instead and extrapolates
linearly: layers that are alike add the same to every figure. The result says so. The same is done where the compiler
refuses a program that its devices have not the memory for, without saying how much it takes.
"""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tbjax.config import ModelConfig
from tbjax.plain import plain, restore
from tbjax.planner import compared, hlo, traffic
from tbjax.planner.compilers import Compiler, compiler_for, environment, require
from tbjax.planner.cost import step_time
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.hlo import Collective
from tbjax.planner.words import gib
from tbjax.planner.workload import Layout, Workload


class CompilationError(RuntimeError):
    """The compiler refused the program, or did not finish."""


class OutOfMemory(CompilationError):
    """The compiler refused the program because a device has not the memory for it (as the one for TPU does)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler made of one program."""

    name: str  # "step" of training; "prefill" and "decode" of inference
    # On one device: argument, output, alias (output that replaces arguments), temp, generated_code, host (bytes
    # offloaded to the host) and the compiler's own peak, 0 where it does not say.
    bytes: Mapping[str, int]
    collectives: tuple[Collective, ...]
    cycles: int  # TPU: the compiler's estimate for a device, loops included; 0 elsewhere
    unknown_loops: int  # loops whose trip count the program does not tell (decoding until the end): counted once
    seconds: float  # that compiling took
    untold: int = 0  # TPU: instructions run whose cycles the compiler cannot tell, kernels and ragged products

    @property
    def total(self) -> int:
        """The bytes that a device must have free: arguments, temporaries, and results that replace no arguments."""
        return self.bytes["argument"] + self.bytes["output"] - self.bytes["alias"] + self.bytes["temp"]

    def __repr__(self) -> str:
        return f"<{self.name}: {gib(self.total)}, {len(self.collectives)} kinds of collectives>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """The compiler's verdict."""

    compiler: Compiler
    cluster: Cluster
    programs: tuple[Program, ...]
    depths: tuple[int, int] | None = None  # the two depths that were compiled in place of the model's own
    # What the compiler said where it refused the model for want of memory; the figures are then those of `depths`.
    refusal: str = ""
    # What the planner says of the same program: its collectives (in training) and its seconds.
    predicted: tuple[Collective, ...] = ()
    predicted_seconds: float = 0.0

    @property
    def compiled(self) -> Program:
        """The program that needs most memory."""
        return max(self.programs, key=lambda program: program.total)

    @property
    def fits(self) -> bool:
        return not self.refusal and self.margin >= 0

    @property
    def margin(self) -> int:
        """Bytes that are left on each device; negative: that are missing."""
        return self.cluster.hardware.usable - self.compiled.total

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return self.compiled.collectives

    @property
    def sent(self) -> Counter[tuple[str, ...]]:
        """Bytes that leave one device, by the mesh axes along which they go."""
        return hlo.sent(self.collectives)

    @property
    def compile_seconds(self) -> float:
        return sum(program.seconds for program in self.programs)

    @property
    def cycles(self) -> int:
        return self.compiled.cycles

    @property
    def seconds(self) -> float:
        """TPU: the compiler's estimate of the time that a device computes, without transfers and what is `untold`.

        0 elsewhere.
        """
        clock = self.cluster.hardware.clock
        return self.cycles / clock if clock else 0.0

    def __repr__(self) -> str:
        return f"<Verification for {self.cluster}: {compared.verdict(self)}>"


def verify(
    config: ModelConfig,
    workload: Workload,
    layout: Layout,
    cluster_spec: Cluster | str,
    compiler: str = "auto",
    *,
    timeout: float = 600,
    depths: tuple[int, int] | None = None,
    progress: bool | None = None,
) -> Verification:
    """Compile the programs of a workload for a cluster. `timeout` is in seconds, for each compilation.

    `progress` shows a line while the compiler works: by default where standard error is a terminal.
    """
    where = cluster(cluster_spec)
    if layout.devices != where.devices:
        raise ValueError(f"the layout {dict(layout.mesh)} is of {layout.devices} devices, {where} has {where.devices}.")
    chosen = compiler_for(where, compiler)
    require(chosen)
    case = {"workload": workload, "layout": layout, "cluster": where, "compiler": chosen}
    refusal = ""
    if depths is None:
        try:
            programs = _compile(config, case, timeout, progress)
            return _beside(config, workload, layout, Verification(compiler=chosen, cluster=where, programs=programs))
        except OutOfMemory as error:
            # A pipeline's stages have equally many repeats of the pattern.
            unit = len(config.groups[0].pattern) * (layout.pp * layout.pieces if layout.pp > 1 else 1)
            if config.layers <= 2 * unit:
                raise
            refusal, depths = str(error), (unit, 2 * unit)
    shallow, deep = (_compile(_cut(config, depth), case, timeout, progress) for depth in sorted(depths))
    programs = [_extrapolate(a, b, depths, config.layers) for a, b in zip(shallow, deep, strict=True)]
    found = Verification(compiler=chosen, cluster=where, programs=tuple(programs), depths=depths, refusal=refusal)
    return _beside(config, workload, layout, found)


def _beside(config: ModelConfig, workload: Workload, layout: Layout, found: Verification) -> Verification:
    """What was compiled, with what the planner says of it."""
    time = step_time(config, workload, layout, found.cluster)
    seconds = {"step": time.total, "prefill": time.prefill, "decode": time.decode}[found.compiled.name]
    said = traffic.collectives(config, workload, layout, found.compiler) if workload.training else ()
    return dataclasses.replace(found, predicted=said, predicted_seconds=seconds)


def _compile(
    config: ModelConfig, case: Mapping[str, Any], timeout: float, progress: bool | None
) -> tuple[Program, ...]:
    where, chosen = case["cluster"], case["compiler"]
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    console.quiet = not shown
    try:
        with console.status(f"compiling {config.layers} layers for {where} ({chosen})"):
            process = subprocess.run(
                [sys.executable, "-m", "tbjax.planner.compile"],
                input=json.dumps(plain({"config": config, **case})),
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment(chosen, where.devices),
            )
    except subprocess.TimeoutExpired:
        raise CompilationError(
            f"compiling {config.layers} layers for {where} did not end within timeout={timeout:g} s: give it more, or "
            "compile two depths and extrapolate, such as depths=(2, 4)."
        ) from None
    if process.returncode or not process.stdout:
        raise CompilationError(f"the {chosen!r} compiler died ({process.returncode}):\n{process.stderr[-2000:]}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        kinds = {"ValueError": ValueError, "NotImplementedError": NotImplementedError, "OutOfMemory": OutOfMemory}
        raise kinds.get(answer["error"], CompilationError)(answer["message"])
    return tuple(restore(Program, program) for program in answer["programs"])


def _cut(config: ModelConfig, layers: int) -> ModelConfig:
    """The model with its first `layers` layers."""
    if not 0 < layers <= config.layers:
        raise ValueError(f"depths has {layers}, but the model has {config.layers} layers.")
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[:layers])


def _extrapolate(shallow: Program, deep: Program, depths: tuple[int, int], layers: int) -> Program:
    first, second = sorted(depths)
    if first == second:
        raise ValueError(f"depths={depths} must differ.")

    def at_depth(a: int, b: int) -> int:
        return round(a + (b - a) * (layers - first) / (second - first))

    counts, volumes, sent = (
        [Counter({(c.kind, c.axes): getattr(c, name) for c in p.collectives}) for p in (shallow, deep)]
        for name in ("count", "bytes", "sent")
    )
    return Program(
        name=deep.name,
        bytes={kind: at_depth(shallow.bytes[kind], deep.bytes[kind]) for kind in deep.bytes},
        collectives=tuple(
            Collective(
                kind=kind,
                axes=axes,
                count=at_depth(counts[0][kind, axes], counts[1][kind, axes]),
                bytes=at_depth(volumes[0][kind, axes], volumes[1][kind, axes]),
                sent=at_depth(sent[0][kind, axes], sent[1][kind, axes]),
            )
            for kind, axes in sorted(counts[0] | counts[1])
        ),
        cycles=at_depth(shallow.cycles, deep.cycles),
        unknown_loops=deep.unknown_loops,
        seconds=shallow.seconds + deep.seconds,
        untold=at_depth(shallow.untold, deep.untold),
    )
