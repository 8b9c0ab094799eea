"""`tbjax pipeline`: what a schedule costs, and what it looks like.

tbjax pipeline --schedule zb-h1 --stages 8 --microbatches 24
tbjax pipeline --schedule auto --memory 12 --backward-weight 0.8 --svg auto.svg
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tbjax.terminal import Debug, Json, print_json, readable_errors, working

if TYPE_CHECKING:
    from tbjax.pipeline.simulate import PerStage, Timeline


class ScheduleName(StrEnum):
    """The schedules that can be asked for."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZB_H1 = "zb-h1"
    ZB_H2 = "zb-h2"
    ZB_V = "zb-v"
    FORWARD = "forward"
    AUTO = "auto"


class WrapsName(StrEnum):
    """Which microbatches wait on the link from the last stage to the first."""

    FIRST = "first"
    ALL = "all"


_PER_STAGE = "one number, or one for each stage as 1.5,2,2,1.5"


def pipeline(
    schedule: Annotated[ScheduleName, typer.Option(help="Which schedule.")] = ScheduleName.ONE_F_ONE_B,
    stages: Annotated[int, typer.Option(min=1, help="Stages that the model is cut into.")] = 4,
    microbatches: Annotated[int, typer.Option(min=1, help="Microbatches in a step.")] = 8,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Pieces of the model on each stage (interleaved; 2 unless given).")
    ] = None,
    forward: Annotated[str, typer.Option(help=f"Time of a microbatch's forward on a stage: {_PER_STAGE}.")] = "1",
    backward_input: Annotated[str, typer.Option(help="Time of the gradient of a stage's input.")] = "1",
    backward_weight: Annotated[str, typer.Option(help="Time of the gradient of a stage's weights.")] = "1",
    comm: Annotated[str, typer.Option(help="Time of a transfer from stage to stage.")] = "0",
    weight_activations: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Part of the activations that is held until the weight gradient (zero-bubble)."
        ),
    ] = 1.0,
    memory: Annotated[
        float | None,
        typer.Option(min=1, help="Auto: for how many microbatches' activations a stage has room; all unless given."),
    ] = None,
    wraps: Annotated[
        WrapsName,
        typer.Option(
            help="Interleaved: whether the first microbatch of each group alone waits for its transfer from the last "
            "stage to the first, as in the published figures, or all do."
        ),
    ] = WrapsName.FIRST,
    svg: Annotated[Path | None, typer.Option(help="Write the timeline to this file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate a pipeline schedule: total time, bubble, activations held, the timeline."""
    with readable_errors(debug=debug):
        from tbjax.pipeline import picture
        from tbjax.pipeline.automatic import Automatic
        from tbjax.pipeline.schedule import named
        from tbjax.pipeline.simulate import Times, simulate

        times = Times(
            forward=_numbers("--forward", forward),
            backward_input=_numbers("--backward-input", backward_input),
            backward_weight=_numbers("--backward-weight", backward_weight),
            communication=_numbers("--comm", comm),
        )
        if schedule is not ScheduleName.AUTO:
            if memory is not None:
                raise ValueError(f"--memory {memory:g} is for the auto schedule: {schedule} holds what it holds.")
            chosen = named(schedule.value, chunks)
        elif chunks not in (None, 1):
            raise ValueError(f"--chunks {chunks}: the auto schedule has one chunk a stage.")
        else:
            chosen = Automatic(times, memory, weight_activations)
        with working(f"simulating {schedule}"):
            timeline = simulate(
                chosen,
                stages,
                microbatches,
                times,
                weight_activations=weight_activations,
                wraps=wraps.value,
            )
        if svg is not None:
            svg.write_text(picture.svg(timeline), encoding="utf-8")
        if as_json:
            print_json(_figures(timeline) | {"wraps": wraps.value})
            return
        console = Console(highlight=False)
        console.print(picture.headline(timeline), soft_wrap=True)
        console.print(picture.coloured(timeline, width=console.width))
        peaks = ", ".join(f"{peak:.4g}" for peak in timeline.peak_activations)
        console.print(f"activations held, by stage: {peaks}", soft_wrap=True)
        if schedule is ScheduleName.INTERLEAVED and wraps is WrapsName.FIRST:
            strict = simulate(chosen, stages, microbatches, times, wraps="all")
            console.print(
                f"with every microbatch waiting on the way from the last stage to the first (--wraps all): "
                f"total {strict.total:.6g}, bubble {strict.bubble_rate:.2%}",
                soft_wrap=True,
            )
        if svg is not None:
            console.print(f"wrote {svg}", markup=False, soft_wrap=True)


def _figures(timeline: "Timeline") -> dict[str, Any]:
    return {
        "schedule": timeline.schedule.name,
        "stages": timeline.stages,
        "microbatches": timeline.microbatches,
        "chunks": timeline.schedule.chunks,
        "total": timeline.total,
        "makespan": timeline.makespan,
        "bubble_rate": timeline.bubble_rate,
        "peak_activations": list(timeline.peak_activations),
    }


def _numbers(option: str, given: str) -> "PerStage":
    try:
        numbers = tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ValueError(f"{option} {given}: give {_PER_STAGE}.") from None
    return numbers[0] if len(numbers) == 1 else numbers
