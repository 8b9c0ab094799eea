"""The mesh drawn where it lies: a grid of devices for each node, or a torus seen from its corner.

Devices that talk most stand out: those of one group of the innermost axis in use have one colour, one outline, and
their coordinates written on them. Of thousands of nodes a few are drawn and the rest are counted. Colours are classes
(`c0`, `c1`, ...) that the page's style sheet gives, one set for light and one for dark.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from tbjax.mesh import AXES
from tbjax.pages.markup import Child, Markup, element
from tbjax.planner import floor, words
from tbjax.planner.hardware import Cluster
from tbjax.planner.workload import Layout

# Neighbouring groups differ: as many colours as a group has neighbours in a drawing, and one more.
GROUP_COLOURS = 5

# Boxes drawn in full before the rest is counted: two rows of a wide page.
MOST_BOXES = 8

# Sizes in CSS pixels. A character of the labels, at 11 px, is about 6.3 wide; a box for 8 GPUs with short labels is
# then narrow enough for two to stand side by side on a phone.
CHARACTER = 6.3
LINE = 13
GAP = 4
FRAME = 8

# A torus is fitted into this much of a phone's width, and its height kept in proportion.
TORUS_WIDTH, TORUS_HEIGHT = 220, 300
LARGEST_CELL = 30
TOP = 12.0

# A 2-D slice is a grid of squares of this size: 16 x 16 of them fit a phone.
PLANE_CELL = 20


# The colour of the chip at so much of each dimension.
Colour: TypeAlias = Callable[..., str]


class Box(NamedTuple):
    """One node, or one domain of nodes, with what its devices have in common."""

    title: str
    shared: str
    picture: Markup


class Row(NamedTuple):
    """Boxes that belong together: those of one pipeline stage, or all of them."""

    title: str
    boxes: tuple[Box, ...]
    hidden: int  # boxes like these that are not drawn


def grouped_axis(layout: Layout) -> str:
    """The axis whose groups are coloured: tp, or else the innermost that has more than one device."""
    return next((axis for axis in reversed(AXES) if layout.mesh[axis] > 1), "tp")


# Nodes.


def rows(layout: Layout, cluster: Cluster) -> list[Row]:
    """The nodes, by pipeline stage where stages are made of whole nodes; the first and the last stand for many."""
    per_box = floor.box_devices(cluster)
    boxes = max(1, layout.devices // per_box)
    stages = layout.pp if boxes % layout.pp == 0 else 1
    per_stage = boxes // stages
    drawn_stages = _ends(stages, 4 if per_stage > 1 else MOST_BOXES)
    most = max(2, MOST_BOXES // len(drawn_stages))
    group_numbers: dict[int, int] = {}  # in the order of drawing, so that neighbours on paper differ too
    result = []
    for stage in drawn_stages:
        chosen = [stage * per_stage + index for index in _ends(per_stage, most)]
        title = f"Stage {words.count(stage)} of {layout.pp}" if stages > 1 else ""
        said = "pp" if title else ""
        drawn = tuple(_box(number, per_box, layout, cluster, said, group_numbers) for number in chosen)
        result.append(Row(title, drawn, per_stage - len(chosen)))
    return result


def _ends(number: int, most: int) -> list[int]:
    """Of `number` things, all if there are at most `most`; otherwise the first ones and the last."""
    return list(range(number)) if number <= most else [*range(most - 1), number - 1]


def _box(number: int, per_box: int, layout: Layout, cluster: Cluster, said: str, group_numbers: dict[int, int]) -> Box:
    """One box; `said` is the axis that its row names already."""
    sizes = layout.mesh
    places = [floor.coordinates(number * per_box + index, sizes) for index in range(min(per_box, layout.devices))]
    varying = [axis for axis in reversed(AXES) if len({place[axis] for place in places}) > 1]
    shared = ", ".join(f"{axis} {places[0][axis]}" for axis in AXES if sizes[axis] > 1 and axis not in (*varying, said))
    name = "Node" if per_box <= cluster.devices_per_host else "Domain"
    title = f"{name} {words.count(number)}"
    size = sizes[grouped_axis(layout)]
    groups = [(number * per_box + index) // size for index in range(len(places))]
    picture = _grid(
        [[f"{axis} {place[axis]}" for axis in varying] or ["0"] for place in places],
        [group_numbers.setdefault(group, len(group_numbers)) for group in groups],
        _columns(len(places), min(size, len(places))),
        f"{title}: {len(places)} {words.device(cluster, len(places))}, {_spoken(places, varying)}"
        + (f"; all have {shared}" if shared else ""),
    )
    return Box(title, shared, picture)


def _spoken(places: Sequence[Mapping[str, int]], varying: Sequence[str]) -> str:
    """The axes of a box, for one who cannot see it."""
    ranges = [
        f"{axis} from {min(place[axis] for place in places)} to {max(place[axis] for place in places)}"
        for axis in reversed(varying)
    ]
    return " and ".join(ranges) or "one position of every axis"


def _columns(devices: int, group: int) -> int:
    """How many devices stand side by side, so that every group is a rectangle."""
    preferred = (4, 3, 5, 6, 7, 8) if devices <= 16 else (8, 9, 6, 4, 7, 5, 3)
    fitting = [c for c in preferred if c <= devices and devices % c == 0 and (c % group == 0 or group % c == 0)]
    return fitting[0] if fitting else min(devices, preferred[0])


def _grid(labels: Sequence[Sequence[str]], groups: Sequence[int], columns: int, spoken: str) -> Markup:
    """Devices in rows, each group framed."""
    longest = max(len(line) for lines in labels for line in lines)
    width = max(34.0, longest * CHARACTER + 8)
    height = max(26.0, max(len(lines) for lines in labels) * LINE + 8.0)
    corners = [
        (FRAME + index % columns * (width + GAP), FRAME + index // columns * (height + GAP))
        for index in range(len(labels))
    ]
    frames, cells = [], []
    for group in dict.fromkeys(groups):
        members = [corner for corner, owner in zip(corners, groups, strict=True) if owner == group]
        left, top = min(x for x, _ in members), min(y for _, y in members)
        right, bottom = max(x for x, _ in members) + width, max(y for _, y in members) + height
        if len(members) * (width + GAP) * (height + GAP) >= (right - left) * (bottom - top):  # a rectangle
            size = {"width": right - left + GAP, "height": bottom - top + GAP}
            frames.append(element("rect", class_="frame", x=left - GAP / 2, y=top - GAP / 2, rx=6, **size))
    for (x, y), lines, group in zip(corners, labels, groups, strict=True):
        colour = f"c{group % GROUP_COLOURS}"
        cells.append(element("rect", class_=f"device {colour}", x=x, y=y, width=width, height=height, rx=4))
        first = y + height / 2 - (len(lines) - 1) * LINE / 2 + 4
        cells.extend(
            element("text", line, class_=f"label on-{colour}", x=x + width / 2, y=first + index * LINE)
            for index, line in enumerate(lines)
        )
    return _svg(
        max(x for x, _ in corners) + width + FRAME, max(y for _, y in corners) + height + FRAME, spoken, frames, cells
    )


# Tori.


def torus(layout: Layout, cluster: Cluster) -> Markup:
    """One slice of TPU chips."""
    sizes = {name: size for name, size in floor.dimensions(cluster).items() if name in "xyz"}
    axis, folded = grouped_axis(layout), floor.fold(layout.mesh, cluster)
    lengths = [f"{name} {size}" for name, size in sizes.items()]
    spoken = f"A slice of {' by '.join(lengths)} chips; " + "; ".join(
        f"{name} carries {carried(name, layout, cluster)}" for name in sizes
    )

    def colour(**chip: int) -> str:
        place = floor.chip_coordinates(chip, folded)
        # A step along any other axis is a step to the next colour.
        return f"c{sum(place[other] for other in AXES if other != axis) % GROUP_COLOURS}"

    if len(sizes) == 2:
        return _plane(sizes, colour, axis, folded, spoken)
    return _block(sizes, colour, {name: f"{name}: {carried(name, layout, cluster)}" for name in sizes}, spoken)


def carried(dimension: str, layout: Layout, cluster: Cluster) -> str:
    """Which mesh axes lie along a dimension of the torus, outermost first."""
    folded = floor.fold(layout.mesh, cluster)
    axes = [f"{axis} {folded[axis][dimension]}" for axis in AXES if folded[axis][dimension] > 1]
    return words.TIMES.join(axes) or "nothing"


def _plane(
    sizes: Mapping[str, int], colour: Colour, axis: str, folded: Mapping[str, Mapping[str, int]], spoken: str
) -> Markup:
    """A 2-D slice from above: x to the right, y down, on every chip its position on the coloured axis."""
    left, top, side = 3.0 * FRAME, 3.0 * FRAME, PLANE_CELL - 2.0
    cells = []
    for y in range(sizes["y"]):
        for x in range(sizes["x"]):
            kind, corner = colour(x=x, y=y), {"x": left + x * PLANE_CELL, "y": top + y * PLANE_CELL}
            cells.append(element("rect", class_=f"device {kind}", width=side, height=side, rx=3, **corner))
            place = floor.chip_coordinates({"x": x, "y": y}, folded)[axis]
            if place < 100:  # three digits do not fit
                middle = {"x": corner["x"] + side / 2, "y": corner["y"] + side / 2 + 3.5}
                cells.append(element("text", place, class_=f"label small on-{kind}", **middle))
    names = [
        element("text", "x →", class_="axis", x=left + 12, y=top - 7),
        element("text", "y", class_="axis", x=left - 12, y=top + 13),
        element("text", "↓", class_="axis", x=left - 12, y=top + 28),
    ]
    return _svg(left + sizes["x"] * PLANE_CELL + FRAME, top + sizes["y"] * PLANE_CELL + FRAME, spoken, cells, names)


def _block(sizes: Mapping[str, int], colour: Colour, labels: Mapping[str, str], spoken: str) -> Markup:
    """A 3-D slice in isometric view: the three faces that are seen, one diamond a chip."""
    X, Y, Z = sizes.values()
    wide, high = math.cos(math.pi / 6), 0.5
    cell = min(LARGEST_CELL, TORUS_WIDTH / ((X + Y) * wide), TORUS_HEIGHT / ((X + Y) * high + Z))
    # Room for the longest label on either side.
    margin = max(24.0, 14 + CHARACTER * 1.15 * max(map(len, labels.values())))

    def at(x: int, y: int, z: int) -> str:
        across, down = (x - y + Y) * wide * cell, ((x + y) * high + Z - z) * cell
        return f"{across + margin:.1f},{down + TOP:.1f}"

    def face(kind: str, shade: str, *corners: tuple[int, int, int]) -> Markup:
        return element("polygon", class_=f"chip {kind} {shade}", points=" ".join(at(*corner) for corner in corners))

    faces = []
    for x in range(X):
        for y in range(Y):
            square = (x, y, Z), (x + 1, y, Z), (x + 1, y + 1, Z), (x, y + 1, Z)
            faces.append(face(colour(x=x, y=y, z=Z - 1), "top", *square))
    for z in range(Z):
        for x in range(X):
            square = (x, Y, z), (x + 1, Y, z), (x + 1, Y, z + 1), (x, Y, z + 1)
            faces.append(face(colour(x=x, y=Y - 1, z=z), "left", *square))
        for y in range(Y):
            square = (X, y, z), (X, y + 1, z), (X, y + 1, z + 1), (X, y, z + 1)
            faces.append(face(colour(x=X - 1, y=y, z=z), "right", *square))

    def label(name: str, anchor: str, across: float, down: float) -> Markup:
        return element("text", labels[name], class_=f"axis {anchor}", x=across + margin, y=down + TOP)

    width, height = (X + Y) * wide * cell, ((X + Y) * high + Z) * cell
    names = [
        label("x", "end", X / 2 * wide * cell - 4, ((X / 2 + Y) * high + Z) * cell + 16),
        label("y", "start", (X + Y / 2) * wide * cell + 4, ((X + Y / 2) * high + Z) * cell + 16),
        label("z", "start", width + 8, (X * high + Z / 2) * cell + 4),
    ]
    return _svg(width + 2 * margin, height + 3 * TOP, spoken, faces, names)


def _svg(width: float, height: float, spoken: str, *content: Child) -> Markup:
    return element(
        "svg",
        *content,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=spoken,
    )
