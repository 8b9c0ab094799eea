r"""Which weights are kept in few bits, and in how many: expressions on their paths.

    "int8"                              the table of that name
    {r"\.mlp\.": "int4:64", r"\.(query|key|value|output)\.": "int8"}
    [(r"\.output\.", None), *RULES["int4"].items()]

Rules are tried in order and the first whose expression is found in a path decides; None keeps a weight as it is, and so
does no rule at all. An encoding is written `int8` or `int4`, with the size of its groups behind a colon.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

Kind: TypeAlias = Literal["int8", "int4"]

# The projections of attention, of the feed-forward layer and of the experts. Not the router, which is small and
# decides, nor norms and biases.
PROJECTIONS = r"\.(query|key|value|output|gate|up|down)(\.weight)?$"
HEAD = r"^head\.weight$"

RULES: Mapping[str, Mapping[str, str | None]] = {
    "int8": {PROJECTIONS: "int8", HEAD: "int8"},
    "int4": {PROJECTIONS: "int4", HEAD: "int8"},
}

# Weights that share a scale where 4 bits are asked for without a size: 16 bits of scale make it 4.5 bits a weight.
GROUP = 32

# What cannot be kept in few bits, since it is looked up rather than multiplied.
TABLE = "embedding.weight"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a weight is kept: integers, with a scale for every group of the inputs of an output channel."""

    kind: Kind
    group: int | None = None  # how many inputs share a scale; None: all of them

    @classmethod
    def parse(cls, text: str) -> "Encoding":
        found = re.fullmatch(r"(int8|int4)(?::([1-9]\d*))?", text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                f"quantization: {text!r} is no encoding: 'int8' and 'int4' are, with the size of their groups behind a "
                "colon ('int4:64'), and None for a weight that is kept as it is."
            )
        kind = cast(Kind, found[1])
        return cls(kind, int(found[2]) if found[2] else GROUP if kind == "int4" else None)

    def __str__(self) -> str:
        return self.kind if self.group is None else f"{self.kind}:{self.group}"

    @property
    def bits(self) -> int:
        """Of one weight, its share of the scale not counted."""
        return 8 if self.kind == "int8" else 4

    @property
    def scale_dtype(self) -> str:
        """A channel's scale costs nothing, a group's does; numbers are rounded after their scale was."""
        return "float32" if self.group is None else "bfloat16"

    def groups(self, inputs: int, path: str = "a weight") -> int:
        """How many scales a channel of so many inputs has."""
        if self.group is None:
            return 1
        if inputs % self.group:
            fitting = max(n for n in range(1, self.group + 1) if inputs % n == 0)
            raise ValueError(
                f"quantization: {path} has {inputs} inputs, which groups of {self.group} do not divide: "
                f"'{self.kind}:{fitting}' would do."
            )
        return inputs // self.group


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order, checked; `name` is the table that they are, if they are one."""

    rules: tuple[tuple[str, Encoding | None], ...]
    name: str | None = None

    def encoding(self, path: str) -> Encoding | None:
        """How the weight at `path` is kept; None: as it is."""
        for pattern, encoding in self.rules:
            if re.search(pattern, path):
                return encoding
        return None

    def check(self, paths: Iterable[str]) -> None:
        """Raises where rules are about nothing, or about what cannot be done, in a model of these parameters."""
        paths = list(paths)
        standard = {pattern for table in RULES.values() for pattern in table}
        for pattern, _ in self.rules:
            if pattern not in standard and not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"quantization: {pattern!r} is about none of the {len(paths)} parameters, such as {paths[-1]}."
                )
        if TABLE in paths and self.encoding(TABLE) is not None:
            raise ValueError(
                f"quantization: {TABLE} is looked up row by row, not multiplied, and is kept as it is: put "
                f"(r'^embedding', None) before the rule that is about it."
            )

    def plain(self) -> list[list[str | None]]:
        """In lists and strings, as JSON has it; `recipe` reads it."""
        return [[pattern, None if encoding is None else str(encoding)] for pattern, encoding in self.rules]

    def __str__(self) -> str:
        return self.name or str(self.plain())


# What a user may say: the name of a table, rules in order, or rules that have been read already.
Quantization: TypeAlias = str | Mapping[str, str | None] | Sequence[tuple[str, str | None]] | Recipe


def recipe(quantization: Any) -> Recipe | None:
    """The rules that a user means; None where nothing is to be quantised."""
    if quantization is None or isinstance(quantization, Recipe):
        return quantization
    if isinstance(quantization, str):
        if quantization not in RULES:
            known = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(
                f"quantization={quantization!r} is unknown: tbjax knows {known}, and rules (an expression that is "
                "looked for in the paths of parameters, to an encoding)."
            )
        return Recipe(_checked(RULES[quantization].items()), quantization)
    pairs = list(quantization.items() if isinstance(quantization, Mapping) else quantization)
    if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"quantization={quantization!r}: rules are a mapping of expressions to encodings, or pairs of the two."
        )
    rules = _checked(pairs)
    names = [name for name, table in RULES.items() if _checked(table.items()) == rules]
    return Recipe(rules, names[0] if names else None)


def _checked(pairs: Iterable[tuple[str, str | None]]) -> tuple[tuple[str, Encoding | None], ...]:
    found = []
    for pattern, encoding in pairs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"quantization: {pattern!r} is no regular expression: {error}.") from error
        found.append((pattern, None if encoding is None else Encoding.parse(encoding)))
    return tuple(found)
