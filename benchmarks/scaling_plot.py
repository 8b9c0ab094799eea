"""The curves of `benchmarks.scaling` as one SVG that needs nothing but itself, readable in light and in dark.

Three panels over the number of devices, which doubles from tick to tick: efficiency with the target, the compiled bytes
of a device with what it can hold, and what it sends in a step. Each curve has a colour and a mark of its own, and every
point says its figure when pointed at.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.scaling import GiB, Point, efficiencies
from tbjax.pages.markup import Child, Markup, element
from tbjax.planner import words

# What the project asks of weak scaling.
TARGET = 0.8

# CSS pixels.
WIDTH, HEIGHT = 300, 190  # of a panel's field
LEFT, TOP, GAP, BOTTOM = 52, 62, 64, 52
MARK = 3.5

# Colours of the planner's page, in light and in dark: text and lines in them have a contrast of 4.5 at least.
STYLE = """
svg { --surface: #fff; --ink: #1b1f24; --quiet: #565e68; --line: #dde1e6; --c0: #33689f; --c1: #b04a2b; }
@media (prefers-color-scheme: dark) {
  svg { --surface: #14171b; --ink: #e6e9ed; --quiet: #a3abb5; --line: #31373f; --c0: #7fb0e3; --c1: #ec9a7d; }
}
text { font: 12px system-ui, sans-serif; fill: var(--quiet); }
.title { font-weight: 600; fill: var(--ink); } .heading { font-size: 15px; font-weight: 600; fill: var(--ink); }
.surface { fill: var(--surface); } .grid { stroke: var(--line); } .end { text-anchor: end; }
.middle { text-anchor: middle; } polyline { fill: none; stroke-width: 2; } .limit { stroke-dasharray: 5 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .limit.target { stroke: var(--ink); }
.mark { stroke: var(--surface); } .mark.c0 { fill: var(--c0); } .mark.c1 { fill: var(--c1); }
text.c0 { fill: var(--c0); stroke: none; } text.c1 { fill: var(--c1); stroke: none; }
"""


class Limit(NamedTuple):
    """A dashed line across a panel."""

    text: str
    value: float
    kind: str


class Panel(NamedTuple):
    """One quantity over the number of devices."""

    title: str
    curves: Mapping[str, Sequence[tuple[int, float]]]  # devices, value
    unit: str
    limits: Sequence[Limit] = ()

    @property
    def top(self) -> float:
        """Where the scale ends: a little above all that is drawn."""
        limits = [limit.value for limit in self.limits]
        return 1.1 * max(itertools.chain(limits, (value for curve in self.curves.values() for _, value in curve)))


def plot(curves: Mapping[str, Sequence[Point]]) -> Markup:
    """The whole drawing of some curves by their names, each from the smallest cluster upwards.

    What the compiler says is drawn of the points that were compiled, what the planner says of all.
    """
    compiled = {name: [(p.devices, p.compiled) for p in curve if p.compiled] for name, curve in curves.items()}
    compiled = {name: points for name, points in compiled.items() if points}
    if not compiled:
        raise ValueError("there is nothing to draw: compile something first (python -m benchmarks.scaling).")
    held = [
        Limit(f"{name} can hold", curves[name][0].case.where.hardware.usable / GiB, f"c{index}")
        for index, name in enumerate(compiled)
    ]
    shares = {
        name: [(p.devices, 100 * share) for p, share in zip(curves[name], efficiencies(curves[name]), strict=True)]
        for name in compiled
    }
    memory = {name: [(number, one.total / GiB) for number, one in points] for name, points in compiled.items()}
    sent = {name: [(number, one.sent.total() / GiB) for number, one in points] for name, points in compiled.items()}
    panels = (
        Panel("Efficiency (planner)", shares, "%", [Limit(f"target {TARGET:.0%}", 100 * TARGET, "target")]),
        Panel("Memory of a device (compiler)", memory, "GiB", held),
        Panel("Sent by a device in a step (compiler)", sent, "GiB"),
    )
    numbers = [number for curve in shares.values() for number, _ in curve]
    width = len(panels) * (LEFT + WIDTH) + (len(panels) - 1) * (GAP - LEFT) + 24
    height = TOP + HEIGHT + BOTTOM
    case = curves[next(iter(compiled))][0].case
    heading = f"{case.model}, {case.rows} x {case.seq_len:,} tokens on each device"
    return element(
        "svg",
        element("style", Markup(STYLE)),
        element("rect", class_="surface", width=width, height=height),
        element("text", heading, class_="heading", x=LEFT, y=22),
        [_panel(panel, numbers, LEFT + index * (WIDTH + GAP)) for index, panel in enumerate(panels)],
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        role="img",
        aria_label=f"{heading}. {_spoken(panels)}",
    )


def _panel(panel: Panel, numbers: Sequence[int], left: float) -> Markup:
    """One panel, `left` pixels from the left, for clusters of `numbers` devices."""
    first = math.log2(min(numbers))
    last = max(math.log2(max(numbers)), first + 1)

    def x(number: float) -> float:
        return left + (math.log2(number) - first) / (last - first) * WIDTH

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - value / panel.top)

    drawn: list[Child] = [element("text", f"{panel.title}, {panel.unit}", class_="title", x=left - 30, y=TOP - 14)]
    step = _step(panel.top)
    for tick in range(int(panel.top / step) + 1):
        value = tick * step
        drawn.append(element("line", class_="grid", x1=left, x2=left + WIDTH, y1=y(value), y2=y(value)))
        drawn.append(element("text", f"{value:g}", class_="end", x=left - 7, y=y(value) + 4))
    # Every second doubling has its number, so that thousands do not touch.
    drawn += [
        element("text", words.count(2**power), class_="middle", x=x(2**power), y=TOP + HEIGHT + 18)
        for power in range(math.ceil(first), math.floor(last) + 1, 2)
    ]
    drawn.append(element("text", "devices", class_="end", x=left + WIDTH, y=TOP + HEIGHT + 36))
    for limit in panel.limits:
        line = {"x1": left, "x2": left + WIDTH, "y1": y(limit.value), "y2": y(limit.value)}
        drawn.append(element("line", class_=f"limit {limit.kind}", **line))
        drawn.append(
            element("text", limit.text, class_=f"middle {limit.kind}", x=left + 0.4 * WIDTH, y=y(limit.value) - 5)
        )
    for index, (name, values) in enumerate(panel.curves.items()):
        places = [(x(number), y(value)) for number, value in values]
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        drawn.append(element("polyline", class_=f"c{index}", points=points))
        for (across, down), (number, value) in zip(places, values, strict=True):
            said = element("title", f"{name}, {number:,} devices: {value:.1f} {panel.unit}")
            drawn.append(_mark(index, across, down, said))
        # The curves' names stand at their beginnings, one below the other, with their marks.
        line = TOP + HEIGHT - 14 - 17 * (len(panel.curves) - 1 - index)
        drawn.append(_mark(index, left + 12, line - 4, None))
        drawn.append(element("text", name, class_=f"c{index}", x=left + 22, y=line))
    return element("g", drawn)


def _mark(index: int, x: float, y: float, said: Child) -> Markup:
    """A disc for the first curve, a square for the second."""
    if index % 2:
        size = {"width": 2 * MARK, "height": 2 * MARK}
        return element("rect", said, class_=f"mark c{index}", x=x - MARK, y=y - MARK, **size)
    return element("circle", said, class_=f"mark c{index}", cx=x, cy=y, r=MARK + 0.5)


def _step(top: float) -> float:
    """Between ticks: 1, 2 or 5 times a power of ten, for five ticks or so."""
    power = 10 ** math.floor(math.log10(top / 5))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= top / 5.5)


def _spoken(panels: Sequence[Panel]) -> str:
    """The ends of each curve, for one who cannot see them."""
    return " ".join(
        f"{panel.title} of {name}: {values[0][1]:.1f} {panel.unit} on {values[0][0]:,} devices, "
        f"{values[-1][1]:.1f} on {values[-1][0]:,}."
        for panel in panels
        for name, values in panel.curves.items()
    )
