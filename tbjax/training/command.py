"""`tbjax train`: a training run from the command line.

    tbjax train HuggingFaceTB/SmolLM2-135M-Instruct --data corpus.jsonl --steps 1000 --mesh 1,8,1 --out tuned
    tbjax train MODEL --data corpus/ --config run.json --checkpoint-dir run

`--config` is a `TrainConfig` as JSON, and options come before what it says.

The exit code is 130 (Ctrl-C) or 143 (SIGTERM) where that ended the run after it was saved: the same command goes on
with it. With --json the result is a line on standard output; everything else goes to standard error.
"""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from tbjax.terminal import Debug, Revision, join_hosts, parse_mesh, print_json, readable_errors, working
from tbjax.training.elastic import accumulation, agreed, as_begun

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.training.config import TrainConfig
    from tbjax.training.loop import TrainResult

# The trainer's own lists, said again: to ask it for them would make the help wait for JAX. A test compares them.
Optimizer = Literal["adamw", "adafactor", "sgd", "lion", "muon"]
Schedule = Literal["constant", "cosine", "linear", "wsd"]
Precision = Literal["mixed", "bfloat16", "float32", "float16"]
Strategy = Literal["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"]
NotFinite = Literal["stop", "skip", "keep"]
FailedSave = Literal["continue", "stop"]

# What a run of the command line takes where neither it nor the config says.
BATCH_SIZE = 8
SEQ_LEN = 1024

_LEARNING, _MEMORY, _OUTPUT, _HOSTS = "Learning", "Memory and layout", "Output", "Several processes"


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or a run's checkpoint.")],
    data: Annotated[str, typer.Option(help="A file, folder or pattern of text, JSONL, Parquet, Arrow; or a hub name.")],
    eval_data: Annotated[str | None, typer.Option(help="The same, to evaluate on.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a data set with several, as those on the hub: the one to learn from.")
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="And of the evaluation data.")] = None,
    field: Annotated[
        str | None, typer.Option(show_default="the usual ones", help="The field of each record that holds its text.")
    ] = None,
    messages: Annotated[
        str | None, typer.Option(help="Instead: the field that holds a conversation, a list of roles and contents.")
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option(min=0, max=1, help="Evaluate on this part of the data's documents instead.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A TrainConfig as JSON; options come before it.")
    ] = None,
    mesh: Annotated[
        str,
        typer.Option(
            help="dp,fsdp,tp (as 1,4,2) or axes by name (as ep=4,tp=2); auto: all devices on fsdp; plan: the planner's "
            "choice for the devices that are there."
        ),
    ] = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="In all, those before a resumption counted.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, show_default=str(BATCH_SIZE), help="Sequences in a step, on all devices.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, show_default=f"the model's, up to {SEQ_LEN}", help="Tokens of each.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0", help="Of the data's order.")] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(rich_help_panel=_LEARNING, show_default="adamw", help="By name.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=_LEARNING, show_default="0.0003", help="At its peak.")
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(rich_help_panel=_LEARNING, show_default="cosine", help="How the rate falls.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=_LEARNING, show_default="0", help="Steps of rising rate.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=_LEARNING, show_default="0.1", help="Of matrices.")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=_LEARNING, show_default="1.0", help="Of the gradients.")
    ] = None,
    frozen: Annotated[
        str | None, typer.Option(rich_help_panel=_LEARNING, help="Regular expression of parameters that stay.")
    ] = None,
    on_nonfinite: Annotated[
        NotFinite | None, typer.Option(rich_help_panel=_LEARNING, show_default="stop", help="After NaN or overflow.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(rich_help_panel=_MEMORY, show_default="mixed", help="mixed: float32 weights, bfloat16 matmuls."),
    ] = None,
    remat: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MEMORY,
            show_default="full",
            help="What is computed again in the backward pass: none, dots, full, full:0.5, save(attention,mlp), ...",
        ),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_MEMORY, show_default="1", help="Parts of a batch, one after another."),
    ] = None,
    device_batch: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_MEMORY, help="Instead: the sequences that a device takes at once, at most."
        ),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(rich_help_panel=_MEMORY, show_default="1f1b", help="Schedule, with pp in the mesh.")
    ] = None,
    offload: Annotated[
        str | None, typer.Option(rich_help_panel=_MEMORY, help="To the host's memory: optimizer; optimizer,parameters.")
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(rich_help_panel=_MEMORY, help="Of gradients summed over dp: top-k:0.01, random-k:0.1, int8."),
    ] = None,
    sharding: Annotated[
        Strategy | None, typer.Option(rich_help_panel=_MEMORY, show_default="FULL_SHARD", help="What fsdp shares out.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(rich_help_panel=_OUTPUT, help="The run's state; a run that stands there goes on.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, show_default="500", help="Steps between checkpoints.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, show_default="2", help="The newest checkpoints stay.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, help="And those of every so many steps.")
    ] = None,
    async_save: Annotated[
        bool | None,
        typer.Option(
            "--async-save/--no-async-save",
            rich_help_panel=_OUTPUT,
            show_default="async-save",
            help="Go on while a checkpoint is written, for a tenth of --save-every, with a copy of the state in the "
            "host's memory.",
        ),
    ] = None,
    on_failed_save: Annotated[
        FailedSave | None,
        typer.Option(rich_help_panel=_OUTPUT, show_default="continue", help="Where the disk is full, say."),
    ] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, help="Steps.")] = None,
    eval_batches: Annotated[int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, help="At most so many.")] = None,
    log_every: Annotated[int | None, typer.Option(min=1, rich_help_panel=_OUTPUT, show_default="10")] = None,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Write the model: safetensors and tokenizer.")
    ] = None,
    # torchrun takes --log for an abbreviation of its own options, wherever it stands.
    log: Annotated[
        Path | None,
        typer.Option("--log-file", "--log", rich_help_panel=_OUTPUT, help="Append figures: a JSON line each."),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Folder for event files.")] = None,
    html: Annotated[
        Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Draw the losses into this file, as a page.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(rich_help_panel=_OUTPUT, help="Folder for a trace of steps.")] = None,
    step_timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            rich_help_panel=_HOSTS,
            show_default="600, on several processes",
            help="Seconds; a process whose step takes longer ends.",
        ),
    ] = None,
    heartbeat_timeout: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=_HOSTS, help="Seconds; the run ends if a process is silent for longer."),
    ] = 100,
    meeting_timeout: Annotated[
        float, typer.Option(min=1, rich_help_panel=_HOSTS, help="Seconds in which all processes must come.")
    ] = 300,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="End with the result as a line of JSON.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="No progress line.")] = False,
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """Train a model on text, from its checkpoint on."""
    given = {
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "seed": seed,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "frozen": frozen,
        "on_nonfinite": on_nonfinite,
        "precision": precision,
        "remat": remat,
        "microbatches": microbatches,
        "pipeline": pipeline,
        "offload": None if offload is None else offload.split(","),
        "compression": compression,
        "save_every": save_every,
        "keep": keep,
        "keep_every": keep_every,
        "async_save": async_save,
        "on_failed_save": on_failed_save,
        "eval_every": eval_every,
        "eval_batches": eval_batches,
        "log_every": log_every,
        "profile": None if profile is None else str(profile),
        "step_timeout": step_timeout,
    }
    if eval_data is not None and hold_out is not None:
        raise typer.BadParameter("--eval-data and --hold-out: one of them says what to evaluate on.")
    if eval_split is not None and eval_data is None:
        raise typer.BadParameter("--eval-split is of --eval-data.")
    if field is not None and messages is not None:
        raise typer.BadParameter("--field and --messages: one of them says what is learned.")
    if eval_every is not None and eval_data is None and hold_out is None:
        raise typer.BadParameter("--eval-every needs --eval-data or --hold-out.")
    if device_batch is not None and microbatches is not None:
        raise typer.BadParameter("--microbatches and --device-batch: one of them says how a batch is taken apart.")
    shape: Any = None if mesh == "plan" else parse_mesh(mesh)
    with readable_errors(debug=debug):
        settings = _settings(config, {name: value for name, value in given.items() if value is not None})
        waits = {"timeout": meeting_timeout, "heartbeat_timeout": heartbeat_timeout}
        join_hosts(shape, quiet=quiet, **waits)
        import tbjax
        from tbjax.mesh import spell
        from tbjax.training import data as datasets
        from tbjax.training.logs import writes
        from tbjax.training.loop import train as run
        from tbjax.training.precision import DTYPES

        options: Any = {"sharding": sharding, "revision": revision, "progress": not quiet}
        settings = as_begun(settings, checkpoint_dir)
        if mesh == "plan":
            shape = _planned(model, settings, sharding, revision)
            if writes() and not quiet:
                console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
                console.print(f"tbjax: mesh {spell(shape.mesh)}, as the planner has it for what is here")
        settings = settings.with_plan(shape if mesh == "plan" else None)
        loaded = tbjax.load(model, shape, dtype=DTYPES[settings.precision or "mixed"][0], **options)
        made = {
            "batch_size": settings.batch_size or max(BATCH_SIZE, loaded.sharding.size("dp", "fsdp", "ep")),
            "seq_len": settings.seq_len or min(SEQ_LEN, loaded.config.max_positions),
            "seed": settings.seed or 0,
        }
        # As the run's checkpoints have it, for one that goes on with it on other devices.
        settings = replace(settings, batch_size=made["batch_size"], seq_len=made["seq_len"])
        if device_batch is not None:
            ways = loaded.sharding.size("dp", "fsdp", "ep")
            settings = replace(settings, microbatches=accumulation(made["batch_size"], ways, device_batch))
        parts = {"field": field, "messages": messages}
        learned, held = datasets.load(data, loaded.tokenizer, **made, **_asked(data, split=split, **parts)), None
        if hold_out is not None:
            learned, held = learned.hold_out(hold_out)
        elif eval_data is not None:
            asked = _asked(eval_data, split=eval_split, **parts)
            held = datasets.load(eval_data, loaded.tokenizer, **made, **asked)
        result = run(
            loaded,
            learned,
            settings,
            eval_data=held,
            checkpoint_dir=checkpoint_dir,
            log_file=log,
            tensorboard=tensorboard,
            progress=not quiet,
        )
        if out is not None:
            with working(f"writing {out}", quiet=quiet):
                loaded.save_pretrained(out)
        if writes():
            _report(result, out, as_json, quiet)
            if html is not None:
                html.parent.mkdir(parents=True, exist_ok=True)
                result.to_html(html)
    if result.end != "finished":
        number = signal.Signals[result.end] if result.end in signal.Signals.__members__ else signal.SIGTERM
        raise typer.Exit(128 + number)


def _planned(model: str, settings: "TrainConfig", sharding: str | None, revision: str | None) -> "Plan":
    """The planner's choice for the devices of this job, as many as there are today, of what the settings leave open."""
    import jax

    import tbjax

    asked: dict[str, Any] = {
        "global_batch": settings.batch_size or max(BATCH_SIZE, jax.device_count()),
        "seq_len": settings.seq_len or SEQ_LEN,
        "sharding": sharding,
        "microbatches": settings.microbatches,
        "remat": settings.remat,
        "offload": settings.offload,
        "revision": revision,
    }
    asked |= {name: getattr(settings, name) for name in ("optimizer", "precision") if getattr(settings, name)}
    return agreed(tbjax.plan(model, "auto", **asked))


def _asked(data: str, **parts: str | None) -> dict[str, Any]:
    """The options that say which part of `data` is meant; what has no such parts is refused."""
    from tbjax.training.data.constructors import kind_of

    asked = {name: part for name, part in parts.items() if part is not None}
    if not asked:
        return {}
    kind = kind_of(data)
    has = {"tokens": (), "text": (), "hugging_face": ("split", "field", "messages")}.get(kind, ("field", "messages"))
    for name, part in asked.items():
        if name not in has:
            raise ValueError(f"{name} {part!r} was asked for, but {data} is {kind}, which has none: leave it out.")
    return asked


def _settings(file: Path | None, given: dict[str, Any]) -> "TrainConfig":
    """The file's settings, with those of the command line in their place."""
    values = {}
    if file is not None:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: a config is a JSON object of TrainConfig's fields, not {values!r:.40}.")
    if "steps" not in values | given:
        raise ValueError("how many steps? Give --steps, or a --config that says.")
    from tbjax.training.config import TrainConfig

    return TrainConfig.from_json(json.dumps(values | given))


def _report(result: "TrainResult", out: Path | None, as_json: bool, quiet: bool) -> None:
    last = result.records[-1] if result.records else None
    evaluation = result.evaluations[max(result.evaluations)] if result.evaluations else None
    values = {
        "step": result.step,
        "end": result.end,
        "loss": last and last.loss,
        "tokens_per_second": last and last.tokens_per_second,
        "mfu": last and last.mfu,
        "evaluation_loss": evaluation and evaluation.loss,
        "perplexity": evaluation and evaluation.perplexity,
        "out": None if out is None else str(out),
    }
    if not quiet:
        from tbjax.training.logs import figures

        said = (last.values() if last else {}) | (evaluation.values() if evaluation else {})
        ended = "" if result.end == "finished" else f", ended by {result.end}"
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        console.print(f"{result.step} steps{ended}: {figures(said)}" + (f"; wrote {out}" if out else ""))
    if as_json:
        print_json(values)
