"""Which parameters a rule is about: an expression that is looked for in their paths, or a function of a path."""

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

# "embedding|norm", or lambda path: path.endswith("bias")
Rule: TypeAlias = str | Callable[[str], bool]


def chosen(rule: Rule | None, paths: Iterable[str], argument: str) -> frozenset[str]:
    """The paths that `rule` is about; `argument` is what an error calls it. Raises where it is about none."""
    paths = list(paths)
    if rule is None:
        return frozenset()
    if callable(rule):
        applies = rule
    else:
        try:
            expression = re.compile(rule)
        except re.error as error:
            raise ValueError(f"{argument}={rule!r} is no regular expression: {error}.") from error
        applies = lambda path: expression.search(path) is not None  # noqa: E731
    found = frozenset(path for path in paths if applies(path))
    if not found:
        raise ValueError(f"{argument}={rule!r} is about none of the {len(paths)} parameters, such as {paths[0]}.")
    return found
