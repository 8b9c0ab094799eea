"""The command line: `tbjax plan`, `tbjax verify`, `tbjax convert`, `tbjax generate`, `tbjax pipeline`,
`tbjax train`, `tbjax hardware`, `tbjax models`, `tbjax doctor`.

Commands import what they need when they run, so that `--help` answers at once. What they have in common, exit codes
among it, is in `tbjax.terminal`.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated

import typer

from interop.convert import convert
from tbjax.doctor.command import doctor
from tbjax.generate.command import generate
from tbjax.pipeline.command import pipeline
from tbjax.planner.command import plan, verify
from tbjax.planner.listing import hardware, models
from tbjax.terminal import run
from tbjax.training.command import train

# One line of each command that does something: the last thing that its help says.
EXAMPLES: Mapping[str, str] = {
    "plan": "tbjax plan llama-2-70b-hf --hardware h100:8x8 --global-batch 512 --html plan.html --out plan.json",
    "verify": "tbjax verify plan.json --html plan.html",
    "convert": "tbjax convert meta-llama/Llama-3.1-8B out --to orbax --mesh 1,4,2",
    "generate": 'tbjax generate HuggingFaceTB/SmolLM2-135M-Instruct --chat --prompt "Say hello." --mesh 1,1,8',
    "train": "tbjax train HuggingFaceTB/SmolLM2-135M-Instruct --data corpus.jsonl --steps 1000 --out tuned",
    "pipeline": "tbjax pipeline --schedule zb-h1 --stages 8 --microbatches 24 --svg zb-h1.svg",
    "hardware": "tbjax hardware h100",
    "doctor": "tbjax doctor --mesh 2,2,2",
    "models": "tbjax models qwen --json",
}

# What the exit codes of all commands mean, and of some beyond that.
CODES = "Exit codes: 0 done, 1 could not be done{}, 2 not understood, 130 Ctrl-C{}."
FURTHER: Mapping[str, tuple[str, str]] = {
    "plan": (" or does not fit", ""),
    "verify": (" or does not fit", ""),
    "doctor": (" or a collective was wrong", ""),
    "train": ("", ", 143 SIGTERM; after either the run was saved, and the same command goes on"),
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Any Hugging Face decoder, sharded over any mesh of NVIDIA GPUs or TPUs.",
    epilog=CODES.format("", ""),
)
for command in (plan, verify, convert, generate, train, pipeline, hardware, doctor, models):
    name = command.__name__
    # A blank line is what the help takes for the end of a line.
    app.command(epilog=f"Example: {EXAMPLES[name]}\n\n{CODES.format(*FURTHER.get(name, ('', '')))}")(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(version("tbjax"))
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    run(app, "tbjax")


if __name__ == "__main__":
    main()
