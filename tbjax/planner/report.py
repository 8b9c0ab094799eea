"""A plan in the terminal: what `print(plan)` shows, and a verification beside its prediction.

Tables of rich, narrow enough for 80 columns; where there is room, memory and time stand side by side. Colour only
repeats what the words say, so that a log without colour loses nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tbjax.planner import compared, words

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.planner.verify import Verification

# Two tables side by side need so many columns.
WIDE = 118

# Characters of the longest bar.
BAR = 12


def report(plan: "Plan") -> RenderableType:
    """The whole plan, with what the compiler said of it where the search asked."""
    style = "green" if plan.fits else "red"
    parts: list[RenderableType] = [
        Text(words.heading(plan), style="bold"),
        Text(words.verdict(plan), style=style),
        *(Text(sentence) for sentence in plan.remedy),
        Text(f"{words.mesh(plan.layout)}, {words.options(plan.layout)}", style="bold"),
        _figures(plan),
        _axes(plan),
        _Beside(_memory(plan), _time(plan)),
    ]
    if plan.verification:
        parts += [Text(), verified(plan, plan.verification)]
    if plan.candidates:
        parts.append(_runners_up(plan))
    if plan.rejected:
        parts.append(_rejected(plan))
    return Group(*parts)


def verified(plan: "Plan", verification: "Verification") -> RenderableType:
    """What was predicted beside what the compiler says."""
    one = f"On one {words.device(plan.cluster)}"
    both = "#Predicted", "#Compiled", "#Difference"
    talk, time = compared.collectives(verification), compared.time(verification)
    parts: list[RenderableType] = [
        Text(compared.verdict(verification), style="green" if verification.fits else "red"),
        _table("Memory", (one, *both), compared.memory(plan, verification)),
    ]
    if time:
        parts.append(_table("Time", ("", "#"), time))
    if talk:
        parts += [
            _table("Sent by one device", ("Along", *both), compared.sent(verification)),
            _table(
                "Collectives: how often they run, and their bytes",
                ("Kind", "Along", *both[:2], *both[:2]),
                talk,
            ),
        ]
    else:
        parts.append(Text("No collectives."))
    return Group(
        *parts,
        _table("The compiler's own account", ("", "#"), compared.kinds(verification.compiled)),
        Text(),
        Text(" ".join(compared.notes(verification)), style="dim"),
    )


class _Beside:
    """Two things side by side where the terminal is wide enough, otherwise one below the other."""

    def __init__(self, left: RenderableType, right: RenderableType) -> None:
        self.both = left, right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < WIDE:
            yield from self.both
            return
        grid = Table.grid(padding=(0, 4))
        grid.add_row(*self.both)
        yield grid


def _figures(plan: "Plan") -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for name, figure, note in words.figures(plan)[1:]:
        grid.add_row(Text(name), Text(figure, style="bold"), Text(note))
    return Padding(grid, (0, 0, 0, 2))


def _axes(plan: "Plan") -> RenderableType:
    rows = [
        (axis, str(size), words.lies(axis, plan.layout, plan.cluster), words.cuts(axis, plan.layout))
        for axis, size in plan.layout.mesh.items()
        if size > 1
    ]
    return _table("Mesh", ("Axis", "#Size", "Lies", "Cuts"), rows) if rows else Text("One device: nothing is cut.")


def _memory(plan: "Plan") -> RenderableType:
    limit = plan.cluster.hardware.usable
    foot = [("In all", words.gib(plan.memory.total)), ("A program may hold", words.gib(limit))]
    if plan.memory.host:
        foot.append(("In the host's memory", words.gib(plan.memory.host)))
    return _parts(f"Memory of one {words.device(plan.cluster)}", plan.memory.parts, words.title, words.gib, foot)


def _time(plan: "Plan") -> RenderableType:
    foot = [("In all", words.seconds(plan.time.total))]
    if not plan.workload.training:
        foot += [("Prefill", words.seconds(plan.time.prefill)), ("A new token", words.seconds(plan.time.decode))]
    heading = "Time of a step" if plan.workload.training else "Time to serve"
    return _parts(heading, plan.time.parts, words.time_title, words.seconds, foot)


def _runners_up(plan: "Plan") -> RenderableType:
    rows = [
        (
            name,
            words.mesh(candidate.layout),
            words.options(candidate.layout),
            words.gib(candidate.memory.total),
            words.seconds(candidate.time.total),
        )
        for name, candidate in words.contenders(plan)
    ]
    return _table("Runners-up", ("", "Mesh", "With", "#Memory", "#Time"), rows)


def _rejected(plan: "Plan") -> RenderableType:
    rows = [
        (words.count(rejection.count), rejection.reason, words.spelled_sizes(rejection.example))
        for rejection in plan.rejected
    ]
    return _table("Turned down", ("#Meshes", "Reason", "For example"), rows)


# What the parts are made of.


def _parts(
    heading: str,
    parts: Mapping[str, float],
    named: Callable[[str], str],
    written: Callable[[float], str],
    foot: Iterable[Sequence[str]],
) -> RenderableType:
    """Parts of a whole, each with its share as a bar."""
    whole = sum(parts.values())
    largest = max(parts.values(), default=0) or 1
    rows = [
        (named(part), written(size), words.share(size, whole), "━" * round(BAR * size / largest))
        for part, size in parts.items()
        if size > 0
    ]
    return _table(heading, ("", "#", "#", ""), rows, [(*line, "", "") for line in foot])


def _table(
    heading: str, head: Sequence[str], rows: Iterable[Sequence[str]], foot: Iterable[Sequence[str]] = ()
) -> RenderableType:
    """A table under its name. The columns whose head begins with # are numbers, which never wrap."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(name.strip("#") for name in head)
    )
    for name in head:
        number = name.startswith("#")
        table.add_column(
            Text(name.lstrip("#")),
            justify="right" if number else "left",
            no_wrap=number or not name,  # a number, a name or a bar in two lines is none
            header_style="dim",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    footing = list(foot)
    if footing:
        table.add_section()
    for row in footing:
        table.add_row(*map(Text, row), style="bold")
    return Group(Text(), Text(heading, style="bold underline"), Padding(table, (0, 0, 0, 2)))
