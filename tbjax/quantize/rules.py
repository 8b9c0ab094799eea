r"""Which weights are kept in few bits, and in how many: expressions on their paths.

    "int8"                              the table of that name
    {r"\.mlp\.": "int4:64", r"\.(query|key|value|output)\.": "int8:channel"}
    [(r"\.output\.", None), *RULES["int4"].items()]

Rules are tried in order and the first whose expression is found in a path decides; None keeps a weight as it is, and so
does no rule at all. An encoding is written `int8` or `int4`, with the size of its groups behind a colon, 32 by default,
or with `channel` there for one scale for all inputs of an output.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

Kind: TypeAlias = Literal["int8", "int4"]
Named: TypeAlias = Literal["int8", "int8:channel", "int4"]

# The projections of attention, of the feed-forward layer and of the experts. Not the router, which is small and
# decides, nor norms and biases.
PROJECTIONS = r"\.(query|key|value|output|gate|up|down)(\.weight)?$"
HEAD = r"^head\.weight$"
VALUE = r"\.value(\.weight)?$"

# The head has 8 bits in all of them: the divergence that it adds is that of all projections in 8 bits together, and in
# 4 bits a hundred times as much (`python -m benchmarks.quantize`). So has the projection to values in "int4": of inputs
# in which three features have most of the square, it makes sums in which these cancel, and what was rounded off does
# not. It is a thirtieth of SmolLM2's weights, a hundredth of a 70B's, and a third of what 4 bits cost.
RULES: Mapping[str, Mapping[str, str | None]] = {
    "int8": {PROJECTIONS: "int8", HEAD: "int8"},
    "int8:channel": {PROJECTIONS: "int8:channel", HEAD: "int8:channel"},
    "int4": {VALUE: "int8", PROJECTIONS: "int4", HEAD: "int8"},
}

# Inputs that share a scale and an offset where no size is said. With 16 bits for each of the two that is one bit more a
# weight, and without it 8 bits would not be within 1e-3 of a small model (`python -m benchmarks.quantize`).
GROUP = 32
CHANNEL = "channel"

# What cannot be kept in few bits, since it is looked up rather than multiplied.
TABLE = "embedding.weight"


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a weight is kept: integers, with a scale and an offset for every group of the inputs of an output channel."""

    kind: Kind
    group: int | None = GROUP  # how many inputs share a scale; None: all of them, and they have no offset

    @classmethod
    def parse(cls, text: str) -> "Encoding":
        found = re.fullmatch(rf"(int8|int4)(?::([1-9]\d*|{CHANNEL}))?", text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                f"quantization: {text!r} is no encoding: 'int8' and 'int4' are, with the size of their groups behind a "
                f"colon ('int4:64') or '{CHANNEL}' for none, and None for a weight that is kept as it is."
            )
        kind = cast(Kind, found[1])
        return cls(kind, None if found[2] == CHANNEL else int(found[2] or GROUP))

    def __str__(self) -> str:
        return f"{self.kind}:{CHANNEL if self.group is None else self.group}"

    @property
    def bits(self) -> int:
        """Of one integer."""
        return 8 if self.kind == "int8" else 4

    @property
    def frame_dtype(self) -> str:
        """Of scales and offsets. A channel's scale costs nothing, a group's does."""
        return "float32" if self.group is None else "bfloat16"

    @property
    def frame_bytes(self) -> int:
        """Of the scale and the offset of one group, or of the scale of a channel."""
        return 4

    def groups(self, inputs: int, path: str = "a weight") -> int:
        """How many scales a channel of so many inputs has."""
        if self.group is None:
            return 1
        if inputs % self.group:
            fitting = max(n for n in range(1, self.group + 1) if inputs % n == 0)
            raise ValueError(
                f"quantization: {path} has {inputs} inputs, which groups of {self.group} do not divide: "
                f"a rule that gives it '{self.kind}:{fitting}' would do."
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
            known = ", ".join(map(repr, RULES))
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
