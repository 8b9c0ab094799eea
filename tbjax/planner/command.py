"""`tbjax plan` and `tbjax verify`: the planner on the command line.

    tbjax plan meta-llama/Llama-2-70b-hf --hardware h100:8x8 --global-batch 512
    tbjax plan meta-llama/Llama-3.1-405B --hardware v5p:8x8x16 --global-batch 1024 --html plan.html --out plan.json
    tbjax verify plan.json

The plan goes to standard output, as text or with --json as JSON; everything else to standard error. The exit code is 1
where it does not fit, too.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from tbjax.terminal import FAILED, Debug, Json, Quiet, Revision, parse_mesh, readable_errors, working

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan

# The planner's own lists, said again: to ask it for them would make the help wait for JAX. A test compares them.
Task = Literal["train", "inference"]
Optimizer = Literal["adamw", "adafactor", "sgd", "lion", "muon"]
Precision = Literal["mixed", "bfloat16", "float32"]
Quantization = Literal["int8", "int8:channel", "int4"]
Remat = Literal["none", "dots", "full", "stage"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"]
Strategy = Literal["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"]
Objective = Literal["throughput", "latency", "memory"]
Search = Literal["analytic", "verified"]
Compiler = Literal["auto", "cuda", "tpu", "cpu"]
Offload = Literal["none", "optimizer", "activations", "both", "any"]

_OFFLOADED: Mapping[str, Any] = {
    "none": (),
    "optimizer": ("optimizer",),
    "activations": ("activations",),
    "both": ("optimizer", "activations"),
    "any": "any",
}

_FIXED = "Fixed rather than chosen"
_OUTPUT = "Output"

Size = Annotated[int | None, typer.Option(min=1, show_default=False, rich_help_panel=_FIXED)]


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name such as llama-2-70b-hf, a hub id, a folder or a config.json.")
    ],
    hardware: Annotated[
        str,
        typer.Option(help="h100:8 (GPUs), h100:16x8 (hosts x GPUs), v5p:4x4x8 (a slice), v5p:2*4x4x4 (two), or auto."),
    ],
    task: Annotated[Task, typer.Option(help="What the model is to do.")] = "train",
    global_batch: Annotated[
        int | None,
        typer.Option(min=1, show_default="train: one a device; inference: 1", help="Sequences in a step, or at once."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, show_default="the model's, up to 4096", help="Tokens of each sequence.")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=0, show_default="an eighth, up to 512", help="Inference: how many of them are generated."),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Training: which optimizer's state is held.")] = "adamw",
    precision: Annotated[
        Precision, typer.Option(help="mixed: float32 weights (training), bfloat16 matmuls.")
    ] = "mixed",
    quantization: Annotated[Quantization | None, typer.Option(help="Inference: of the weights.")] = None,
    objective: Annotated[Objective, typer.Option(help="What the best plan has most or least of.")] = "throughput",
    search: Annotated[Search, typer.Option(help="verified: the compiler judges the best few.")] = "analytic",
    mesh: Annotated[
        str,
        typer.Option(rich_help_panel=_FIXED, help="dp,fsdp,tp (as 1,8,8; -1 to choose) or axes (as ep=4,tp=2)."),
    ] = "auto",
    pp: Size = None,
    dp: Size = None,
    fsdp: Size = None,
    ep: Size = None,
    cp: Size = None,
    tp: Size = None,
    sharding: Annotated[Strategy | None, typer.Option(rich_help_panel=_FIXED, help="What fsdp shares out.")] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option("--sequence-parallel/--no-sequence-parallel", rich_help_panel=_FIXED, help="Norms cut over tp."),
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_FIXED, help="Parts of a device's batch.")
    ] = None,
    remat: Annotated[Remat | None, typer.Option(rich_help_panel=_FIXED, help="What is kept of activations.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(rich_help_panel=_FIXED, help="Of the pipeline.")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_FIXED, help="Pieces of the model on a stage (interleaved).")
    ] = None,
    offload: Annotated[
        Offload | None,
        typer.Option(
            rich_help_panel=_FIXED,
            show_default="what is needed to fit",
            help="What goes to the host's memory. any: whatever helps on paper.",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Let the target's compiler check the plan.")] = False,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Write the plan to this file, for verify, load, train.")
    ] = None,
    html: Annotated[Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Write a page to this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print the plan as JSON instead.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="Print no plan.")] = False,
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """The best parallelism for a model on a cluster: mesh, memory, time, and why not otherwise."""
    sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "ep": ep, "cp": cp, "tp": tp}
    asked = _mesh(parse_mesh(mesh), {axis: size for axis, size in sizes.items() if size is not None})
    with readable_errors(debug=debug), working(f"planning {model} on {hardware}", quiet=quiet):
        import tbjax

        made = tbjax.plan(
            model,
            hardware,
            task=task,
            global_batch=global_batch,
            seq_len=seq_len,
            new_tokens=new_tokens,
            mesh=asked,
            optimizer=optimizer,
            precision=precision,
            quantization=quantization,
            sharding=sharding,
            sequence_parallel=sequence_parallel,
            microbatches=microbatches,
            remat=remat,
            schedule=schedule,
            chunks=chunks,
            offload=_OFFLOADED[offload] if offload else None,
            objective=objective,
            search=search,
            revision=revision,
        )
        if verify and made.fits and made.verification is None:
            made = made.with_verification(made.verify())
    with readable_errors(debug=debug):
        _write(made, out, html)
        if as_json:
            typer.echo(made.to_json())
        elif not quiet:
            _console().print(made)
    _exit(made)


def verify(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `tbjax plan --out` wrote.")],
    compiler: Annotated[Compiler, typer.Option(help="auto: that of the plan's hardware.")] = "auto",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a compilation may take.")] = 600,
    out: Annotated[Path | None, typer.Option(help="Write the plan with the verdict to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with both accounts to this file.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a plan for its target, which need not be there: does it fit, and what does it send?"""
    with readable_errors(debug=debug):
        from tbjax.planner.plan import Plan
        from tbjax.planner.report import verified

        made = Plan.from_json(plan)
        with working(f"compiling for {made.cluster}", quiet=quiet):
            said = made.verify(compiler, timeout=timeout)
        made = made.with_verification(said)
        _write(made, out, html)
        if as_json:
            typer.echo(made.to_json())
        elif not quiet:
            _console().print(verified(made, said))
    _exit(made)


def _mesh(mesh: tuple[int, ...] | dict[str, int] | None, sizes: dict[str, int]) -> Any:
    """`--mesh` and single sizes together."""
    if mesh is None or not sizes:
        return sizes or mesh
    if isinstance(mesh, tuple):
        raise typer.BadParameter(
            f"--mesh {','.join(map(str, mesh))} speaks of all axes: give the sizes as axes (as --mesh dp=1,tp=8), or "
            f"leave out --{next(iter(sizes))}."
        )
    twice = [axis for axis in sizes if mesh.get(axis, sizes[axis]) != sizes[axis]]
    if twice:
        raise typer.BadParameter(f"--mesh says {twice[0]}={mesh[twice[0]]}, --{twice[0]} says {sizes[twice[0]]}.")
    return {**mesh, **sizes}


def _write(plan: "Plan", out: Path | None, html: Path | None) -> None:
    if html is not None:
        plan.to_html(html)
    if out is not None:
        plan.to_json(out)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _exit(plan: "Plan") -> None:
    """Fail, and say why, where it does not fit. The compiler's word counts above the prediction."""
    if not (plan.verification.fits if plan.verification else plan.fits):
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(" ".join(plan.remedy) or "It does not fit: the compiler needs more than the planner foresaw.")
        raise typer.Exit(FAILED)
