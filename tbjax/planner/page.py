"""A plan as one HTML file that needs nothing else, and as a fragment of one for notebooks.

The page is a function of the plan's public attributes. Drawings have a text alternative, bars have letters that the
tables beside them explain, and every number in a picture also stands in a table.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tbjax.pages import sheet
from tbjax.pages.markup import Child, Markup, element
from tbjax.pages.sheet import COLOURS, note, section, table
from tbjax.pipeline.picture import svg
from tbjax.planner import compared, drawing, floor, words
from tbjax.planner.timeline import timeline

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.planner.search import Candidate
    from tbjax.planner.verify import Verification

# A letter needs so much of a bar: 16 of about 320 pixels, on a phone.
LEGIBLE_SHARE = 0.05

# Runners-up drawn beside the plan.
RUNNERS_UP = 5

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def page(plan: "Plan", verification: "Verification | None" = None) -> str:
    """The whole page. With a verification (or the plan's own), what the compiler said stands beside the prediction."""
    verification = verification or plan.verification
    sections = [
        _head(plan),
        _in_words(plan),
        _mesh(plan),
        _runners_up(plan),
        _memory(plan),
        _time(plan),
        _timeline(plan),
        _verified(plan, verification),
        _rejected(plan),
        _hardware(plan),
        _foot(plan),
    ]
    return sheet.page(words.heading(plan), sections)


def fragment(plan: "Plan") -> str:
    """What a notebook shows of a plan: figures, mesh, memory, time and any verdict; its styles touch nothing else."""
    return sheet.fragment(_head(plan), _mesh(plan), _memory(plan), _time(plan), _verified(plan, plan.verification))


# The sections, in their order.


def _head(plan: "Plan") -> Markup:
    task = "Training plan" if plan.workload.training else "Serving plan"
    return element(
        "header",
        element("div", task, class_="eyebrow"),
        element("h1", words.heading(plan)),
        element("p", words.verdict(plan), class_=f"verdict {'good' if plan.fits else 'bad'}"),
        [element("p", sentence) for sentence in plan.remedy],
        element(
            "dl",
            [
                element("div", element("dt", name), element("dd", _unbroken(figure), element("small", note)))
                for name, figure, note in words.figures(plan)
            ],
            class_="figures",
        ),
    )


def _in_words(plan: "Plan") -> Markup:
    head = (words.verdict(plan), *plan.remedy)
    said = [line for line in plan.explain().splitlines() if line not in head]
    return section("In words", [element("p", line) for line in said])


def _mesh(plan: "Plan") -> Markup:
    layout, cluster = plan.layout, plan.cluster
    axes = [
        (axis, size, words.lies(axis, layout, cluster), words.cuts(axis, layout))
        for axis, size in layout.mesh.items()
        if size > 1
    ]
    cut = table(("Axis", "#Size", "Lies", "Cuts"), axes) if axes else element("p", "One device: nothing is cut.")
    return section("The mesh", cut, _torus(plan) if cluster.topology else _nodes(plan))


def _nodes(plan: "Plan") -> Markup:
    layout, cluster = plan.layout, plan.cluster
    axis = drawing.grouped_axis(layout)
    parts: list[Child] = []
    rows = drawing.rows(layout, cluster)
    for row in rows:
        boxes = [
            element(
                "figure",
                element("figcaption", element("b", box.title), element("small", box.shared) if box.shared else None),
                box.picture,
            )
            for box in row.boxes
        ]
        if row.hidden:
            more = element("p", f"and {words.count(row.hidden)} more between", class_="note more")
            boxes.insert(-1, more)
        parts.append([element("h3", row.title) if row.title else None, element("div", boxes, class_="boxes")])
    notes = [f"One frame, in one colour: a group of {layout.mesh[axis]} along {axis}."] if layout.devices > 1 else []
    if 1 < len(rows) < layout.pp:
        notes.append(f"The {layout.pp - len(rows)} stages that are not drawn are like these.")
    return element("div", parts, note(" ".join(notes)) if notes else None, class_="drawing")


def _torus(plan: "Plan") -> Markup:
    layout, cluster = plan.layout, plan.cluster
    carried = [
        (name, size, drawing.carried(name, layout, cluster), "a ring" if wraps else "a line")
        for (name, size), wraps in zip(_torus_dimensions(plan).items(), cluster.wraps, strict=True)
    ]
    axis = drawing.grouped_axis(layout)
    grouped = any(floor.fold(layout.mesh, cluster)[axis][name] > 1 for name in _torus_dimensions(plan))
    notes = [
        f"Chips of one colour, side by side, are a group along {axis}."
        if grouped
        else f"Each chip is a group along {axis}."
    ]
    if cluster.slices > 1:
        notes.append(f"One of {cluster.slices} slices, which are alike.")
    if cluster.hardware.devices_per_chip > 1:
        notes.append(f"Each chip is {cluster.hardware.devices_per_chip} devices.")
    return element(
        "div",
        element(
            "div",
            element("div", drawing.torus(layout, cluster), class_="scroll"),
            table(("Dimension", "#Chips", "Carries", "Closes to"), carried),
            class_="torus",
        ),
        note(" ".join(notes)),
        class_="drawing",
    )


def _torus_dimensions(plan: "Plan") -> dict[str, int]:
    return {name: size for name, size in floor.dimensions(plan.cluster).items() if name in "xyz"}


def _runners_up(plan: "Plan") -> Markup | None:
    contenders = words.contenders(plan, RUNNERS_UP)
    if len(contenders) == 1:
        return None
    rows = [
        (
            element("span", name, class_="whole"),
            [_unbroken(words.mesh(each.layout)), element("small", words.options(each.layout))],
            words.gib(each.memory.total),
            words.seconds(each.time.total),
        )
        for name, each in contenders
    ]
    return section("The plan and its runners-up", table(("", "Mesh", "#Memory", "#Time"), rows, chosen=0))


def _memory(plan: "Plan") -> Markup:
    limit = plan.cluster.hardware.usable
    contenders = words.contenders(plan, RUNNERS_UP)
    longest = max(limit, *(candidate.memory.total for _, candidate in contenders))
    scale = _Scale(_present(each.memory.parts for _, each in contenders), longest, words.title, words.gib, limit)
    bars = [
        _bar(_spelled(name, each), f"{words.gib(each.memory.total)} of {words.gib(limit)}", each.memory.parts, scale)
        for name, each in contenders
    ]
    notes = ["The upright line is what a program may hold."]
    if plan.memory.moment:
        notes.append(f"Counted at the fullest moment of this plan: {plan.memory.moment}.")
    foot = [("In all", words.gib(plan.memory.total), ""), ("A program may hold", words.gib(limit), "")]
    if plan.memory.host:
        foot.append(("In the host's memory", words.gib(plan.memory.host), ""))
    return section(
        f"Memory of one {words.device(plan.cluster)}",
        _beside(
            [element("div", bars, class_="bars"), note(" ".join(notes))],
            table(("This plan", "#Size", "#Share"), _shares(plan.memory.parts, scale), foot),
        ),
    )


def _time(plan: "Plan") -> Markup:
    contenders = words.contenders(plan, RUNNERS_UP)
    longest = max(sum(each.time.parts.values()) for _, each in contenders)
    scale = _Scale(_present(each.time.parts for _, each in contenders), longest, words.time_title, words.seconds)
    bars = [
        _bar(_spelled(name, each), words.seconds(each.time.total), each.time.parts, scale) for name, each in contenders
    ]
    foot = [("In all", words.seconds(plan.time.total), "")]
    if not plan.workload.training:
        foot += [
            ("Prefill", words.seconds(plan.time.prefill), ""),
            ("A new token", words.seconds(plan.time.decode), ""),
        ]
    return section(
        "Time of a step" if plan.workload.training else "Time to serve",
        _beside(
            element("div", bars, class_="bars"),
            table(("This plan", "#Time", "#Share"), _shares(plan.time.parts, scale), foot),
        ),
    )


def _timeline(plan: "Plan") -> Markup | None:
    pipeline = timeline(plan)
    if pipeline is None:
        return None
    notes = ["In seconds, without the time of transfers."]
    if pipeline.microbatches < plan.layout.microbatches:
        fewer = f"Drawn with {pipeline.microbatches} of the {words.count(plan.layout.microbatches)} microbatches"
        notes.insert(0, f"{fewer}: of the whole step the idle part is smaller.")
    return section(
        "The pipeline",
        element("div", Markup(svg(pipeline)), class_="scroll timeline", tabindex=0),
        note(" ".join(notes)),
    )


def _verified(plan: "Plan", verification: "Verification | None") -> Markup | None:
    if verification is None:
        return None
    both = "#Predicted", "#Compiled", "#Difference"
    talk, time = compared.collectives(verification), compared.time(verification)
    return section(
        "What the compiler says",
        element("p", compared.verdict(verification), class_=f"verdict {'good' if verification.fits else 'bad'}"),
        table(
            (f"On one {words.device(plan.cluster)}", *both),
            compared.memory(plan, verification),
        ),
        [element("h3", "Time"), table(("", "#Time"), time)] if time else None,
        element("h3", "Collectives: what is sent, how often they run, and their bytes"),
        [
            table(("Sent by one device along", *both), compared.sent(verification)),
            table(("Kind", "Along", *both[:2], *both[:2]), talk),
        ]
        if talk
        else element("p", "None."),
        element("h3", "The compiler's own account"),
        table(("Memory", "#Size"), compared.kinds(verification.compiled)),
        note(" ".join(compared.notes(verification))),
    )


def _rejected(plan: "Plan") -> Markup | None:
    if not plan.rejected:
        return None
    rows = [
        (rejection.reason, words.count(rejection.count), _unbroken(words.spelled_sizes(rejection.example)))
        for rejection in plan.rejected
    ]
    total = sum(rejection.count for rejection in plan.rejected)
    return section(
        "Why not otherwise",
        element("p", f"{words.count(total)} meshes were turned down."),
        table(("Reason", "#Meshes", "For example"), rows),
    )


def _hardware(plan: "Plan") -> Markup | None:
    sources = plan.cluster.hardware.sources
    if not sources:
        return None
    rows = [(words.title(figure), element("span", source, class_="loose")) for figure, source in sources.items()]
    return element(
        "section",
        element(
            "details", element("summary", "Where the figures of the hardware stand"), table(("Figure", "Source"), rows)
        ),
    )


def _foot(plan: "Plan") -> Markup:
    version = importlib.metadata.version("tbjax")
    return element("footer", f"Predicted by tbjax {version} for {plan.cluster}.", class_="note")


# What the sections are made of.


def _beside(pictures: Child, table: Markup) -> Markup:
    """Pictures with their table to the right, or below where that is too narrow."""
    return element("div", element("div", pictures), table, class_="beside")


def _present(contenders: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """The parts that any contender has, numbered in the order in which they are met."""
    met = dict.fromkeys(part for parts in contenders for part, size in parts.items() if size > 0)
    return {part: number for number, part in enumerate(met)}


class _Scale(NamedTuple):
    """What the bars of one picture, and the table beside them, share."""

    numbers: Mapping[str, int]  # of the parts
    longest: float  # the size that is the whole width
    named: Callable[[str], str]
    written: Callable[[float], str]
    limit: float | None = None  # where the upright line stands

    def letter(self, part: str) -> str:
        return LETTERS[self.numbers[part] % len(LETTERS)]

    def colour(self, part: str) -> str:
        return f"c{self.numbers[part] % COLOURS}"

    def said(self, part: str, size: float) -> str:
        return f"{self.named(part)} {self.written(size)}"


def _bar(name: Child, total: str, parts: Mapping[str, float], scale: _Scale) -> Markup:
    """One stacked bar, under what it is the bar of."""
    present = {part: size for part, size in parts.items() if size > 0}
    segments = [
        element(
            "span",
            scale.letter(part) if size / scale.longest >= LEGIBLE_SHARE else None,
            class_=scale.colour(part),
            style=f"width: {100 * size / scale.longest:.3f}%",
            title=scale.said(part, size),
        )
        for part, size in present.items()
    ]
    line = None
    if scale.limit:
        line = element("div", class_="limit", style=f"left: calc({100 * scale.limit / scale.longest:.3f}% - 2px)")
    spoken = ", ".join(scale.said(part, size) for part, size in present.items())
    stack = element("div", segments, class_="stack")
    return element(
        "div",
        element("div", element("span", name), element("span", total), class_="bar-name"),
        element("div", stack, line, class_="track", role="img", aria_label=spoken),
    )


def _shares(parts: Mapping[str, float], scale: _Scale) -> list[tuple[Markup, str, str]]:
    """Rows of a table: each part with its letter in its colour."""
    whole = sum(parts.values())

    def key(part: str) -> Markup:
        swatch = element("span", scale.letter(part), class_=f"key {scale.colour(part)}", aria_hidden="true")
        return element("span", swatch, scale.named(part), class_="whole")

    return [(key(part), scale.written(size), words.share(size, whole)) for part, size in parts.items() if size > 0]


def _spelled(name: str, contender: "Plan | Candidate") -> Child:
    return [f"{name}: ", _unbroken(words.mesh(contender.layout))]


def _unbroken(product: str) -> Child:
    """A mesh such as `fsdp 8 x tp 8`, which breaks after a sign if it must, but not within an axis."""
    *axes, last = product.split(words.TIMES)
    return [
        [[element("span", axis + words.TIMES.rstrip(), class_="whole"), " "] for axis in axes],
        element("span", last, class_="whole"),
    ]
