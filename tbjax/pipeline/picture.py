"""A timeline to look at: as SVG, for pages and notebooks, and as text, for the terminal.

One row for each stage, time from left to right, a box for each task with the number of its microbatch where there is
room for it. Even chunks are drawn darker than odd ones; in text, odd chunks have small letters.

The SVG needs nothing but itself. Its own text takes the colour of the page around it (`currentColor`), and the boxes'
colours are CSS variables (`--pipeline-forward` and the like) that a page may set; their defaults are light enough for
dark numbers in bright and in dark surroundings. It says in words what it shows, for those who do not see it.
"""

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from tbjax.pipeline.schedule import Kind, Task
from tbjax.pipeline.simulate import Placed, Timeline

if TYPE_CHECKING:
    from rich.text import Text

# Blue, orange, green of similar lightness: told apart by the colour-blind, and dark text on them has a contrast above
# 7. The second of each pair is for odd chunks.
_COLOURS = {
    Kind.FORWARD: ("forward", "#8ab8e6", "#c3dcf4"),
    Kind.BACKWARD: ("backward", "#f2ad6d", "#f8d5b3"),
    Kind.BACKWARD_INPUT: ("backward-input", "#f2ad6d", "#f8d5b3"),
    Kind.BACKWARD_WEIGHT: ("backward-weight", "#93cf8c", "#c9e8c4"),
}
_MEANING = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "gradient of the input",
    Kind.BACKWARD_WEIGHT: "gradient of the weights",
}

# Pixels.
_ROW, _GAP, _LEFT, _TOP, _LEGEND = 22, 4, 62, 30, 34
_DIGIT = 6.2  # the width of a digit in the numbers' size, 10
_DETAILED = 3000  # tasks up to which every box gets a tooltip; beyond, the file would grow to megabytes


def svg(timeline: Timeline, width: int = 960) -> str:
    """The timeline as one self-contained SVG element."""
    scale = (width - _LEFT - 1) / timeline.makespan
    bottom = _TOP + timeline.stages * (_ROW + _GAP)
    boxes = "".join(_row(timeline, stage, scale) for stage in range(timeline.stages))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline-timeline" viewBox="0 0 {width} {bottom + _LEGEND}" '
        f'width="{width}" style="max-width:100%;height:auto" role="img" aria-label="{escape(describe(timeline))}">'
        f"<style>{_style()}</style>"
        f'<text class="heading" x="0" y="16">{escape(headline(timeline))}</text>'
        f"{boxes}{_legend(timeline, bottom + 20)}</svg>\n"
    )


def headline(timeline: Timeline) -> str:
    """Which schedule, and what came of it, in a line."""
    return (
        f"{timeline.schedule.name}: {timeline.stages} stages, {timeline.microbatches} microbatches, "
        f"total {timeline.total:.6g}, bubble {timeline.bubble_rate:.2%}, "
        f"at most {max(timeline.peak_activations):.4g} microbatches' activations"
    )


def describe(timeline: Timeline) -> str:
    """The timeline in words: what the picture shows to those who see it."""
    idle = []
    for stage, row in enumerate(timeline.tasks):
        busy = sum(placed.end - placed.start for placed in row)
        idle.append(f"stage {stage} from {row[0].start:.4g} to {row[-1].end:.4g}, busy for {busy:.4g} of it")
    return f"Pipeline timeline. {headline(timeline)}. {'; '.join(idle)}."


def _style() -> str:
    """Scoped to the class, since a style in an inline SVG applies to the whole page."""
    fills = "".join(
        f".pipeline-timeline .{name}{odd}{{fill:var(--pipeline-{name}{'-odd' * odd},{colour})}}"
        for name, *colours in _COLOURS.values()
        for odd, colour in enumerate(colours)
    )
    return (
        # Standing alone, in a viewer that prefers dark, there is no page to inherit a colour from.
        "svg.pipeline-timeline:root{color-scheme:light dark;color:CanvasText;background:Canvas}"
        ".pipeline-timeline text{font:12px system-ui,sans-serif;fill:currentColor}"
        ".pipeline-timeline .heading{font-weight:600}"
        ".pipeline-timeline .idle{fill:currentColor;fill-opacity:.08}"
        ".pipeline-timeline .number{font-size:10px;text-anchor:middle;pointer-events:none;"
        "fill:var(--pipeline-number,#10202e)}"
        f"{fills}"
    )


def _row(timeline: Timeline, stage: int, scale: float) -> str:
    row, top = timeline.tasks[stage], _TOP + stage * (_ROW + _GAP)
    middle = top + _ROW / 2 + 4
    start, end = _LEFT + row[0].start * scale, _LEFT + row[-1].end * scale
    parts = [
        f'<text x="0" y="{middle:g}">stage {stage}</text>'
        f'<rect class="idle" x="{_short(start)}" y="{top}" width="{_short(end - start)}" height="{_ROW}"/>'
    ]
    detailed = sum(map(len, timeline.tasks)) <= _DETAILED
    for task, begins, ends in row:
        x, wide = _LEFT + begins * scale, (ends - begins) * scale
        size = f'width="{_short(max(wide - 0.5, 0.2))}" height="{_ROW}"'
        box = f'<rect class="{_css(task)}" x="{_short(x)}" y="{top}" {size}'
        if detailed:
            title = escape(f"stage {stage}: {task}, {begins:.6g} to {ends:.6g}")
            parts.append(f"{box}><title>{title}</title></rect>")
        else:
            parts.append(f"{box}/>")
        if wide >= _DIGIT * len(str(task.microbatch)) + 2:
            parts.append(f'<text class="number" x="{_short(x + wide / 2)}" y="{middle:g}">{task.microbatch}</text>')
    return "".join(parts)


def _legend(timeline: Timeline, y: int) -> str:
    parts, x = [], _LEFT
    for kind in _kinds(timeline):
        words = _MEANING[kind]
        parts.append(f'<rect class="{_COLOURS[kind][0]}0" x="{x}" y="{y - 11}" width="14" height="14"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{words}</text>')
        x += 40 + 7 * len(words)
    if timeline.schedule.chunks > 1:
        parts.append(f'<text x="{x}" y="{y}">lighter: odd chunks</text>')
    return "".join(parts)


def _kinds(timeline: Timeline) -> list[Kind]:
    """Those that occur, in the order of `Kind`."""
    return sorted({placed.task.kind for row in timeline.tasks for placed in row})


def _css(task: Task) -> str:
    return f"{_COLOURS[task.kind][0]}{task.chunk % 2}"


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")


def text(timeline: Timeline, width: int = 100) -> str:
    """The timeline in plain characters, one line for each stage.

    A task is its letter (F, B, W; small for odd chunks) with the number of its microbatch, as far as there is room;
    a dot is time that a stage waits for.
    """
    return "\n".join(label + "".join(written for written, _ in cells) for label, cells in _lines(timeline, width))


def coloured(timeline: Timeline, width: int = 100) -> "Text":
    """`text` for a terminal with colours."""
    from rich.text import Text

    picture = Text(no_wrap=True)
    for number, (label, cells) in enumerate(_lines(timeline, width)):
        picture.append("\n" * bool(number) + label)
        for written, task in cells:
            if task is None:
                picture.append(written, style="dim")
            else:
                picture.append(written, style=f"#10202e on {_COLOURS[task.kind][1 + task.chunk % 2]}")
    return picture


def _lines(timeline: Timeline, width: int) -> Iterator[tuple[str, list[tuple[str, Task | None]]]]:
    """By stage: its label, and pieces of text with the task that each stands for."""
    margin = len(f"{timeline.stages - 1} ")
    columns = max(width - margin, 10)
    scale = columns / timeline.makespan
    for stage, row in enumerate(timeline.tasks):
        yield f"{stage:>{margin - 1}} ", list(_pieces(row, columns, scale))


def _pieces(row: tuple[Placed, ...], columns: int, scale: float) -> Iterator[tuple[str, Task | None]]:
    """Each column shows what runs at its middle."""
    at, index = 0, 0
    while at < columns:
        middle = (at + 0.5) / scale
        while index < len(row) and row[index].end <= middle:
            index += 1
        task, until = None, columns
        if index < len(row):
            shown, start, end = row[index]
            if start <= middle:
                task = shown
            until = start if task is None else end
            until = min(columns, max(at + 1, _columns_before(until * scale)))
        yield _written(task, until - at, waits=0 < index < len(row)), task
        at = until


def _columns_before(edge: float) -> int:
    """How many columns have their middle before `edge`."""
    return -int(-(edge - 0.5) // 1)


def _written(task: Task | None, room: int, *, waits: bool) -> str:
    if task is None:
        return ("·" if waits else " ") * room
    letter = task.kind.letter.lower() if task.chunk % 2 else task.kind.letter
    return f"{letter}{task.microbatch}".ljust(room) if len(str(task.microbatch)) < room else letter.ljust(room)
