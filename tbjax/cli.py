"""The command line: `tbjax plan`, `tbjax verify`, `tbjax convert`, `tbjax generate`, `tbjax pipeline`,
`tbjax train`, `tbjax hardware`, `tbjax models`, `tbjax doctor`.

Commands import what they need when they run, so that `--help` answers at once.
"""

from typing import Annotated

import typer
from rich.console import Console

from interop.convert import Dtype, asking_about_pickles, convert
from tbjax.doctor.command import doctor
from tbjax.pipeline.command import pipeline
from tbjax.planner.command import plan, verify
from tbjax.planner.listing import hardware, models
from tbjax.terminal import join_hosts, parse_mesh, readable_errors, run
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
app.command()(train)
app.command()(pipeline)
app.command()(hardware)
app.command()(doctor)
app.command()(models)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, or .gguf file.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; with --chat, the message to answer.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    mesh: Annotated[
        str, typer.Option(help="dp,fsdp,tp (as 1,4,2) or axes by name (as ep=4,tp=2); auto: all devices on fsdp.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights; else they are as config.json says.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read PyTorch's .bin without asking. No code in it is run.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Continue a text, greedily."""
    shape = parse_mesh(mesh)
    with readable_errors(debug=debug):
        join_hosts(shape)
        import jax

        import tbjax

        options = {"dtype": dtype, "revision": revision}
        loaded = asking_about_pickles(
            lambda trusted: tbjax.load(model, shape, trust_pickle=trusted, **options), trust_pickle
        )
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        answer = loaded.generate(asked, max_new_tokens=max_new_tokens)
        if jax.process_index() == 0:
            Console(highlight=False, markup=False, soft_wrap=True).print(answer)


def main() -> None:
    run(app, "tbjax")


if __name__ == "__main__":
    main()
