"""The command line: `tbjax plan`, `tbjax verify`, `tbjax convert`, `tbjax generate`, `tbjax pipeline`,
`tbjax train`, `tbjax hardware`, `tbjax models`, `tbjax doctor`.

Commands import what they need when they run, so that `--help` answers at once.
"""

import typer

from interop.convert import convert
from tbjax.doctor.command import doctor
from tbjax.generate.command import generate
from tbjax.pipeline.command import pipeline
from tbjax.planner.command import plan, verify
from tbjax.planner.listing import hardware, models
from tbjax.terminal import run
from tbjax.training.command import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Any Hugging Face decoder, sharded over any mesh of NVIDIA GPUs or TPUs.",
)
app.command()(plan)
app.command()(verify)
app.command()(convert)
app.command()(generate)
app.command()(train)
app.command()(pipeline)
app.command()(hardware)
app.command()(doctor)
app.command()(models)


def main() -> None:
    run(app, "tbjax")


if __name__ == "__main__":
    main()
