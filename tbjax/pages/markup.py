"""HTML and SVG as nested calls, escaped by construction.

`element("td", name, class_="number")` is a `Markup`; a child that is plain text is escaped, a child that is Markup is
taken as it is. Nothing else makes Markup, so a model called `<script>` stays a name.
"""

import html
from collections.abc import Iterable
from typing import TypeAlias

# Elements that have no content, and so no end tag.
VOID = frozenset({"meta", "br", "hr"})


class Markup(str):
    """Text that is already HTML or SVG."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"


def element(tag: str, /, *children: Child, **attributes: str | int | float | None) -> Markup:
    """An element. An attribute that is None is left out; `class_` and `aria_label` become `class` and `aria-label`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(child: Child) -> Markup:
    """Children one after another, the plain ones escaped."""
    if isinstance(child, Markup):
        return child
    if child is None:
        return Markup("")
    if isinstance(child, str | int):
        return Markup(html.escape(str(child), quote=False))
    return Markup("".join(joined(each) for each in child))


def _number(value: str | int | float) -> str:
    """A coordinate to a hundredth of a pixel, without a trailing zero."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
