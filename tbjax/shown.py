"""What a value says of itself in a line, for a prompt, a notebook's cell, a test that fails.

A dataclass of settings has many fields, of which few are set. `changed` says those, as one would write them:

    TrainConfig(steps=10, learning_rate=0.001)

What is not settings but a result, such as a plan, has a sentence of its own between angle brackets.
"""

import dataclasses
import enum
from typing import Any


def changed(self: Any, **spelled: str) -> str:
    """The call that makes such a dataclass, without the fields that it would have anyway.

    A class may take it for its `__repr__`. `spelled` has fields, by name, that are to be written otherwise than
    `repr` does.
    """
    said = [
        f"{field.name}={spelled.get(field.name) or _written(getattr(self, field.name))}"
        for field in dataclasses.fields(self)
        if field.repr and getattr(self, field.name) != _default(field)
    ]
    return f"{type(self).__name__}({', '.join(said)})"


def _written(value: Any) -> str:
    return repr(value.value if isinstance(value, enum.StrEnum) else value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
