"""The sheet that all our pages are: one HTML file that needs nothing else, or a fragment of one for notebooks.

It has no scripts, fonts, images or addresses outside itself (its own Content-Security-Policy forbids them), so it can
be mailed, opened on a phone and printed; and the styles of a fragment touch nothing around it.
"""

import importlib.resources
from collections.abc import Iterable, Sequence

from tbjax.pages.markup import Child, Markup, element

# Colours of the style sheet; what has more parts begins again.
COLOURS = 10

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, *content: Child) -> str:
    """A file."""
    return "<!DOCTYPE html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("title", title),
            element("style", Markup("body { margin: 0; }\n" + _style())),
        ),
        element("body", element("main", element("div", content, class_="sheet"), class_="tbjax-sheet page")),
        lang="en",
    )


def fragment(*content: Child) -> str:
    """A part of somebody else's page."""
    return element(
        "div",
        element("style", Markup(_style())),
        element("div", content, class_="sheet"),
        class_="tbjax-sheet fragment",
    )


def _style() -> str:
    return importlib.resources.files("tbjax.pages").joinpath("sheet.css").read_text(encoding="utf-8")


def section(heading: str, *content: Child) -> Markup:
    return element("section", element("h2", heading), *content)


def note(text: str) -> Markup:
    return element("p", text, class_="note")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Child]],
    foot: Iterable[Sequence[Child]] = (),
    chosen: int | None = None,
) -> Markup:
    """A table that scrolls in its own box. The columns whose head begins with # are numbers."""
    numbers = [name.startswith("#") for name in head]

    def row(cells: Sequence[Child], marked: bool = False) -> Markup:
        return element(
            "tr",
            element("th", cells[0], scope="row"),
            [
                element("td", cell, class_="number" if number else None)
                for cell, number in zip(cells[1:], numbers[1:], strict=True)
            ],
            class_="chosen" if marked else None,
        )

    heads = [
        element("th", name.lstrip("#"), scope="col", class_="number" if number else None)
        for name, number in zip(head, numbers, strict=True)
    ]
    footing = [row(cells) for cells in foot]
    made = element(
        "table",
        element("thead", element("tr", heads)),
        element("tbody", [row(cells, index == chosen) for index, cells in enumerate(rows)]),
        element("tfoot", footing) if footing else None,
    )
    return element("div", made, class_="scroll", tabindex=0)
