"""A training run as a curve: the loss of each step, and what evaluations found between them.

A run of many steps is drawn by means of neighbours, so many that there are no more than `MOST_POINTS`. A loss that
is no finite number is a gap.
"""

import importlib.metadata
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tbjax.pages import sheet
from tbjax.pages.markup import Markup, element
from tbjax.pages.sheet import note

# More would lie less than a pixel apart.
MOST_POINTS = 500

# Pixels: of the drawing, and of the room for numbers to the left and below.
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 640, 260, 52, 36, 10

# Numbers beside an axis, about as many as this.
TICKS = 5


class Curve:
    """Losses by step, and evaluations by step."""

    def __init__(self, losses: Sequence[float], evaluations: Mapping[int, float], first: int = 1) -> None:
        self.first, self.last = first, first + len(losses) - 1
        size = max(1, math.ceil(len(losses) / MOST_POINTS))
        parts = [losses[start : start + size] for start in range(0, len(losses), size)]
        self.points = [
            (first + number * size + (len(part) - 1) / 2, math.fsum(part) / len(part))
            for number, part in enumerate(parts)
        ]
        self.averaged = size
        self.evaluations = {
            step: loss for step, loss in evaluations.items() if math.isfinite(loss) and first <= step <= self.last
        }
        found = [loss for _, loss in self.points if math.isfinite(loss)] + list(self.evaluations.values())
        self.rungs = rungs(min(found), max(found)) if found else [0.0, 1.0]
        self.digits = max(0, -math.floor(math.log10(self.rungs[1] - self.rungs[0]) + 1e-9))

    def x(self, step: float) -> float:
        share = (step - self.first) / max(1, self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - ABOVE)

    def y(self, loss: float) -> float:
        low, high = self.rungs[0], self.rungs[-1]
        return ABOVE + (high - loss) / (high - low) * (HEIGHT - ABOVE - BELOW)

    def svg(self) -> Markup:
        """The drawing."""
        return element(
            "svg",
            [self._rung(loss) for loss in self.rungs],
            [self._step(step) for step in dict.fromkeys([self.first, (self.first + self.last) // 2, self.last])],
            element("text", "step", x=float((LEFT + WIDTH) / 2), y=float(HEIGHT - 4), class_="axis"),
            [element("polyline", points=line, class_="curve") for line in self._lines()],
            [
                element("circle", element("title", f"step {step}: {loss:.4g}"), cx=self.x(step), cy=self.y(loss), r=4,
                        class_="c5")
                for step, loss in self.evaluations.items()
            ],
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            role="img",
            aria_label=f"the loss of steps {self.first} to {self.last}",
        )  # fmt: skip

    def _rung(self, loss: float) -> Markup:
        y = self.y(loss)
        line = element("line", x1=LEFT, y1=y, x2=WIDTH, y2=y, class_="rung")
        return Markup(line + element("text", f"{loss:.{self.digits}f}", x=LEFT - 8, y=y + 4, class_="axis end"))

    def _step(self, step: int) -> Markup:
        return element("text", f"{step:,}", x=self.x(step), y=float(HEIGHT - BELOW + 16), class_="axis")

    def _lines(self) -> Iterator[str]:
        """The finite stretches, as SVG writes points; the round ends of a line show one that is a point alone."""
        for finite, points in itertools.groupby(self.points, lambda point: math.isfinite(point[1])):
            if finite:
                places = [f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in points]
                yield " ".join(places if len(places) > 1 else places * 2)


def rungs(low: float, high: float) -> list[float]:
    """Round numbers, evenly apart, from below `low` to above `high`."""
    # Losses that differ by their rounding are one.
    span = max(high - low, 1e-6 * abs(high)) or 1.0
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    apart = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= TICKS)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [number * apart for number in range(first, max(last, first + 1) + 1)]


def fragment(curve: Curve, heading: str) -> str:
    """For a notebook."""
    return sheet.fragment(*_content(curve, heading))


def page(curve: Curve, heading: str, path: str | Path | None = None) -> str:
    """The page, written to `path` where one is given."""
    foot = element("footer", f"Shown by tbjax {importlib.metadata.version('tbjax')}.", class_="note")
    made = sheet.page(heading, *_content(curve, heading), foot)
    if path is not None:
        Path(path).write_text(made, encoding="utf-8")
    return made


def _content(curve: Curve, heading: str) -> list[Markup]:
    said = ["The line is the loss of training, in nats a token."]
    if curve.averaged > 1:
        said.append(f"Each of its points is the mean of {curve.averaged} steps.")
    if curve.evaluations:
        said.append("Dots are the held-out data.")
    title = heading[:1].upper() + heading[1:]
    head = element("header", element("div", "A training run", class_="eyebrow"), element("h1", title))
    return [head, element("div", curve.svg(), class_="drawing"), note(" ".join(said))]
