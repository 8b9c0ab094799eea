"""Which device holds which part of a model: a drawing for each way in which its tensors are cut, and a table of all.

A drawing is the tensor itself, seen from the front: its last dimension to the right, all others downwards, cut where
the mesh cuts it. In each piece stand the numbers of the devices that hold it, counted in the mesh's order; a piece with
several numbers is held as often. The colour is that of the first of them, so that what is cut alike looks alike.
"""

import dataclasses
import importlib.metadata
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult

from tbjax.pages import sheet
from tbjax.pages.markup import Markup, element
from tbjax.pages.sheet import COLOURS, note, section, table
from tbjax.placement import Placement, placements, readable
from tbjax.placement import table as for_terminal

# A tensor in more pieces than this along one side is said rather than drawn.
MOST_PIECES = 32

# Numbers of devices that are written into a piece; of more, the first and how many.
MOST_NUMBERS = 4

# Pixels: of a piece, and of the widest and highest drawing.
PIECE_WIDTH, PIECE_HEIGHT, WIDEST, HIGHEST = 72, 30, 640, 420


@dataclasses.dataclass(frozen=True)
class ShardingMap:
    """Where a model's parameters lie: printed in a terminal, shown in a notebook, written as a page."""

    title: str
    mesh: Mapping[str, int]
    parameters: tuple[Placement, ...]
    _model: Any = dataclasses.field(repr=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield for_terminal(self._model, self.heading)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=120, file=text, color_system=None, force_terminal=False, force_jupyter=False).print(self)
        return text.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return sheet.fragment(_head(self), _drawings(self))

    def to_html(self, path: str | Path | None = None) -> str:
        """The page, written to `path` where one is given."""
        page = sheet.page(self.heading, _head(self), _drawings(self), _every_tensor(self), _foot())
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    @property
    def heading(self) -> str:
        cut = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        return f"{self.title} on {cut or 'one device'}"

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.parameters)

    @property
    def nbytes_per_device(self) -> int:
        return sum(row.nbytes_per_device for row in self.parameters)


def sharding_map(model: Any, title: str) -> ShardingMap:
    """Of a sharded or abstract model."""
    return ShardingMap(title, dict(model.mesh.shape), tuple(placements(model)), model)


def holders(axes: Sequence[Sequence[str]], mesh: Mapping[str, int]) -> dict[tuple[int, ...], list[int]]:
    """The devices that hold each piece of a tensor whose dimensions `axes` cut, by the piece's place.

    A dimension cut by two axes has their product of pieces, the first axis outermost, as a `PartitionSpec` means it.
    """
    held: dict[tuple[int, ...], list[int]] = {}
    for device, where in enumerate(np.ndindex(*mesh.values())):
        at = dict(zip(mesh, where, strict=True))
        place = tuple(
            int(np.ravel_multi_index([at[axis] for axis in by], [mesh[axis] for axis in by])) if by else 0
            for by in axes
        )
        held.setdefault(place, []).append(device)
    return held


def _head(shown: ShardingMap) -> Markup:
    devices = math.prod(shown.mesh.values())
    once, held = readable(shown.nbytes), readable(shown.nbytes_per_device)
    where = f"each of {devices} devices holds {held}" if devices > 1 else "one device holds them all"
    return element(
        "header",
        element("div", "Where the parameters lie", class_="eyebrow"),
        element("h1", shown.heading),
        element("p", f"{len(shown.parameters)} tensors of {once}; {where}."),
    )


def _drawings(shown: ShardingMap) -> Markup | None:
    if math.prod(shown.mesh.values()) == 1:
        return None  # nothing is cut
    kinds: dict[str, list[Placement]] = {}
    for row in shown.parameters:
        kinds.setdefault(row.layout, []).append(row)
    largest_first = sorted(kinds.values(), key=lambda rows: -sum(row.nbytes for row in rows))
    return section(
        "How they are cut",
        [_drawn(rows, shown.mesh) for rows in largest_first],
        note("In each piece stand the devices that hold it, numbered in the mesh's order, the last axis fastest."),
    )


def _drawn(rows: Sequence[Placement], mesh: Mapping[str, int]) -> Markup:
    first = rows[0]
    pieces = math.prod(mesh[axis] for by in first.axes for axis in by)
    devices = math.prod(mesh.values())
    size = sum(row.nbytes_per_device for row in rows)
    copies = f"each on {devices // pieces} devices" if devices > pieces else "each on one device"
    said = f"{pieces} pieces, {copies}" if pieces > 1 else "whole on every device" if devices > 1 else "whole"
    return element(
        "div",
        element("h3", first.layout),
        element("p", f"{said}; {readable(size)} on a device: ", ", ".join(row.path for row in rows)),
        _picture(first, mesh) if pieces > 1 else None,
        class_="drawing",
    )


def _picture(row: Placement, mesh: Mapping[str, int]) -> Markup | None:
    counts = [math.prod(mesh[axis] for axis in by) for by in row.axes or ((),)]
    down, right = math.prod(counts[:-1]), counts[-1]
    if max(down, right) > MOST_PIECES:
        return note(f"{down} x {right} pieces: too many to draw.")
    width, height = min(PIECE_WIDTH, WIDEST / right), min(PIECE_HEIGHT, HIGHEST / down)
    drawn = []
    for place, held in sorted(holders(row.axes or ((),), mesh).items()):
        y, x = divmod(int(np.ravel_multi_index(place, counts)), right)
        drawn.append(
            element(
                "g",
                element("title", f"devices {', '.join(map(str, held))}"),
                element(
                    "rect",
                    x=float(x * width),
                    y=float(y * height),
                    width=float(width),
                    height=float(height),
                    class_=f"chip c{held[0] % COLOURS}",
                ),
                element(
                    "text",
                    _numbers(held, width),
                    x=float((x + 0.5) * width),
                    y=float((y + 0.5) * height + 4),
                    class_="label",
                ),
            )
        )
    return element(
        "svg",
        drawn,
        viewBox=f"0 0 {math.ceil(right * width)} {math.ceil(down * height)}",
        width=math.ceil(right * width),
        height=math.ceil(down * height),
        role="img",
        aria_label=f"{row.layout}: {down} pieces down, {right} to the right",
    )


def _numbers(held: Sequence[int], width: float) -> str:
    """The devices of a piece, as far as they have room: seven pixels a character."""
    if len(held) <= MOST_NUMBERS and 7 * len(" ".join(map(str, held))) <= width:
        return " ".join(map(str, held))
    return f"{held[0]} …" if 7 * len(f"{held[0]} …") <= width else ""


def _every_tensor(shown: ShardingMap) -> Markup:
    rows = [
        (
            element("span", row.path, class_="loose"),
            f"{row.dtype}[{', '.join(map(str, row.shape))}]",
            row.layout,
            readable(row.nbytes),
            readable(row.nbytes_per_device),
        )
        for row in shown.parameters
    ]
    foot = [("In all", "", "", readable(shown.nbytes), readable(shown.nbytes_per_device))]
    head = ("Tensor", "Shape", "Dimensions and what cuts them", "#Bytes", "#On a device")
    return section("Every tensor", table(head, rows, foot))


def _foot() -> Markup:
    return element("footer", f"Shown by tbjax {importlib.metadata.version('tbjax')}.", class_="note")
