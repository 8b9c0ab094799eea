"""The conversion script: a checkpoint of one format in, of another out.

    tbjax-convert meta-llama/Llama-3.1-8B out/ --to orbax --mesh 1,4,2
    tbjax-convert out/ back/ --to hf
    tbjax-convert model.gguf out/                              # safetensors, dequantised
    tbjax-convert meta-llama/Llama-3.1-8B --dry-run --mesh 1,8,8

The source is a Hugging Face checkpoint (safetensors, PyTorch `.bin` or GGUF; a hub id, a folder or a file) or an Orbax
checkpoint of ours. Weights go straight from the source's bytes into sharded arrays and from there to the destination,
so that host memory stays bounded whatever the size; from a checkpoint of ours to safetensors they go tensor by tensor,
and no device is needed.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from tbjax.terminal import (
    Debug,
    Json,
    Mesh,
    Quiet,
    Revision,
    TrustPickle,
    join_hosts,
    parse_mesh,
    print_json,
    readable_errors,
    run,
    working,
)

if TYPE_CHECKING:
    from tbjax.config import ModelConfig
    from tbjax.quantize import Recipe

# JAX and all that needs it is imported where it is used: the help must not wait for it, and devices are chosen first.


Result = TypeVar("Result")


class Format(StrEnum):
    """What can be written."""

    HF = "hf"
    ORBAX = "orbax"


class Dtype(StrEnum):
    """What weights can be converted to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Hub id, folder, file, or an Orbax checkpoint.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The folder to write; not needed with --dry-run.")
    ] = None,
    to: Annotated[Format, typer.Option(help="hf: safetensors, config, tokenizer. orbax: sharded arrays.")] = Format.HF,
    mesh: Mesh = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights; else they are as config.json says.")] = None,
    revision: Revision = None,
    trust_pickle: TrustPickle = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would lie where; read or fetch no weights, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint: Hugging Face to Orbax, Orbax to Hugging Face, .bin or GGUF to safetensors."""
    shape = parse_mesh(mesh)
    if destination is None and not dry_run:
        raise typer.BadParameter("a destination is needed (or --dry-run).", param_hint="DST")
    with readable_errors(debug=debug):
        if dry_run:
            asking_about_pickles(
                lambda trusted: _print_plan(source, shape, dtype, revision, trusted, as_json=as_json), trust_pickle
            )
        elif destination is not None:
            join_hosts(shape, quiet=quiet)  # before the first import of JAX
            _check_destination(source, destination, to, overwrite)
            done = _convert(source, destination, to, shape, dtype, revision, trust_pickle, overwrite, quiet)
            _report(done, as_json, quiet)


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(convert)


def main() -> None:
    run(app, "tbjax-convert")


# --- The work ---------------------------------------------------------------------------------------------------------


def _convert(
    source: str,
    destination: Path,
    to: Format,
    mesh: Any,
    dtype: str | None,
    revision: str | None,
    trust_pickle: bool,
    overwrite: bool,
    quiet: bool,
) -> dict[str, Any]:
    """What was done, in figures."""
    import tbjax
    from interop.export import export_checkpoint
    from tbjax import checkpoint

    began = time.perf_counter()
    if to is Format.HF and checkpoint.is_checkpoint(source):
        with working(f"writing {destination}", quiet=quiet):
            export_checkpoint(source, destination, dtype=dtype, overwrite=overwrite)
    else:
        options = {"dtype": dtype, "revision": revision, "progress": not quiet}
        model = asking_about_pickles(
            lambda trusted: tbjax.load(source, mesh, trust_pickle=trusted, **options), trust_pickle
        )
        with working(f"writing {destination}", quiet=quiet):
            tbjax.save(model, destination, to.value, overwrite=overwrite)
    seconds = time.perf_counter() - began
    written = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    return {
        "source": source,
        "destination": str(destination),
        "format": to.value,
        "bytes": written,
        "seconds": round(seconds, 2),
    }


def _report(done: dict[str, Any], as_json: bool, quiet: bool) -> None:
    import jax

    from tbjax import placement

    if jax.process_index() != 0:
        return
    if as_json:
        print_json(done)
    elif not quiet:
        Console(highlight=False, soft_wrap=True, markup=False).print(
            f"{done['source']} -> {done['destination']} ({done['format']}): {placement.readable(done['bytes'])} in "
            f"{done['seconds']:.1f} s"
        )


def _print_plan(
    source: str, mesh: Any, dtype: str | None, revision: str | None, trust_pickle: bool, *, as_json: bool
) -> None:
    """The table of what would lie where."""
    from tbjax import checkpoint, placement
    from tbjax.mesh import spell

    if checkpoint.is_checkpoint(source):
        about = checkpoint.read_about(source)
        model = _on_paper(about.config, mesh, dtype or about.dtype, about.quantization)
    else:
        model = _look(source, mesh, dtype, revision, trust_pickle)
    if as_json:
        rows = [dataclasses.asdict(row) for row in placement.placements(model)]
        print_json({"source": source, "mesh": dict(model.mesh.shape), "parameters": rows})
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(placement.table(model, title=f"{source} on mesh {spell(dict(model.mesh.shape))}: nothing is written"))


def _look(source: str, mesh: Any, dtype: str | None, revision: str | None, trust_pickle: bool) -> Any:
    """The abstract model of a Hugging Face checkpoint, held against what is there.

    That is all tensors' headers where the files are here. Of a hub repository only the config and the index are
    fetched: shapes are then those that the config asks for, and names are checked if there is an index.
    """
    from interop.bindings import bindings, check_checkpoint, check_names, source_shapes
    from interop.families import Fields, family
    from interop.readers.open import INDEX, read_index
    from interop.source import resolve

    found = resolve(source, revision=revision, trust_pickle=trust_pickle, weights=False)
    translation = family(found.config["model_type"])
    where = f"{source}: config.json"
    if found.complete:
        with found.open() as tensors:
            config = translation.config(Fields(found.config_for(tensors), where))
            model = _on_paper(config, mesh, dtype or config.dtype)
            check_checkpoint(source_shapes(bindings(model, config, translation)), tensors, config, translation)
        return model
    config = translation.config(Fields(found.config, where))
    model = _on_paper(config, mesh, dtype or config.dtype)
    if found.weights.name.endswith(INDEX):
        names = {name: found.folder / file for name, file in read_index(found.weights).items()}
        check_names(source_shapes(bindings(model, config, translation)), names, config, translation)
    if dtype is None and found.config["dtype"] is None:
        Console(stderr=True).print(f"{where} names no dtype; without the weights it is taken to be {config.dtype}.")
    return model


def _on_paper(config: "ModelConfig", mesh: Any, dtype: str, quantization: "Recipe | None" = None) -> Any:
    """The abstract model on a mesh that need not exist; a size of -1 is filled from the devices that do."""
    import math

    import jax
    from jax.sharding import AbstractMesh, AxisType

    from tbjax.mesh import AXES, axis_sizes
    from tbjax.model import Decoder
    from tbjax.quantize.convert import quantized
    from tbjax.sharding import Sharding

    asked = list(mesh.values() if isinstance(mesh, dict) else mesh or (-1,))
    sizes = axis_sizes(mesh, jax.device_count() if -1 in asked else math.prod(asked))
    layout = Sharding(AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)))
    model = jax.eval_shape(lambda: Decoder(config, layout, dtype=dtype))
    return layout.place(quantized(model, quantization, layout))


def asking_about_pickles(read: Callable[[bool], Result], trust_pickle: bool) -> Result:
    """`read(trust_pickle)`; where that meets a pickle that is not trusted, and on a terminal, after asking."""
    from interop.readers.base import UntrustedPickle

    try:
        return read(trust_pickle)
    except UntrustedPickle as error:
        question = (
            f"{error.file}: this is a pickle, which can carry a program. tbjax reads tensors from it and runs nothing, "
            "but a safetensors file would leave no doubt. Read it?"
        )
        if not (sys.stdin.isatty() and typer.confirm(question)):
            raise
    return read(True)


# --- At the door ------------------------------------------------------------------------------------------------------


def _check_destination(source: str, destination: Path, to: Format, overwrite: bool) -> None:
    """Raise before the work rather than after it."""
    from interop import writer
    from tbjax import checkpoint
    from tbjax.folders import check_free

    path, destination = Path(source).expanduser(), destination.expanduser().resolve()
    if path.exists():
        # Where it is, and if it is a link, what it points to.
        for place in (path.parent.resolve() / path.name, path.resolve()):
            if destination == place or destination in place.parents:
                raise ValueError(f"{destination} is or holds the source, {source}: name another folder.")
            if place.is_dir() and place in destination.parents:
                raise ValueError(f"{destination} lies in the source, {source}: name another folder.")
    check_free(destination, overwrite, writer.objection if to is Format.HF else checkpoint.objection)


if __name__ == "__main__":
    main()
