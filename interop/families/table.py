"""What a family file is made of: a weight table, and a config reader that never guesses.

A family is a translation. Its table says, for each tensor of a Hugging Face checkpoint, which of our parameters it is.
Our linear weights are kept as the checkpoint has them, `[out, in]`, so most rows are a change of name. A row may also
take a part of the source's rows (fused projections) and swap its two dimensions (experts). Nothing else is allowed:
that keeps each row readable backwards, and lets the loader fill any shard by copying rectangles.

    Weight("model.layers.{layer}.self_attn.q_proj.weight", "block.attention.query.weight")
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tbjax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row: the tensor `source` holds (part of) our parameter `target`.

    `{layer}` and `{expert}` in the source run over the layers and experts. A target that starts with `block.` is a path
    inside one decoder block; the row applies to the layers whose block has that parameter.
    """

    source: str
    target: str
    # Runs of the source's first dimension, as (start, stop), which put together are the target's; None: all of it.
    rows: tuple[tuple[int, int], ...] | None = None
    # The source is the target with its two dimensions swapped.
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are read and written."""

    name: str
    config: Callable[["Fields"], ModelConfig]
    weights: Callable[[ModelConfig], Sequence[Weight]]
    # Regular expressions of tensors that carry nothing (buffers that old checkpoints saved).
    ignored: tuple[str, ...] = (r".*\.inv_freq",)
    # (copy, original): a tensor that checkpoints of tied models may hold besides the one in the table. The two must be
    # equal; one that differs is an untied model under a wrong `tie_word_embeddings`.
    copies: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)


# Array dimensions are 32-bit and nowhere near this; a larger one is a damaged file.
LARGEST_SIZE = 2**31 - 1

# What float32 can hold: a larger number would be infinite on the device.
LARGEST_NUMBER = 3.4e38


class Fields:
    """The fields of a Hugging Face config, read at the door: each read is recorded, each refusal names the field.

    `transformers` fills in the defaults before a config arrives here, so a missing field is an error.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> set[str]:
        """Of all fields, read or not."""
        return set(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        self.read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A number of things: at least one."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            self.refuse(name, f"a whole number from 1 to {LARGEST_SIZE} is needed")
        return value

    def number(
        self, name: str, default: float | None = None, *, above: float | None = None, least: float | None = None
    ) -> float:
        """A finite number, greater than `above` and no less than `least`."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_NUMBER:
            self.refuse(name, "a finite number is needed")
        if above is not None and value <= above:
            self.refuse(name, f"a number above {above} is needed")
        if least is not None and value < least:
            self.refuse(name, f"a number no less than {least} is needed")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false is needed")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers."""
        value = self.sequence(name)
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= LARGEST_NUMBER for x in value):
            self.refuse(name, "a list of positive numbers is needed")
        if len(value) != length:
            self.refuse(name, f"its length must be {length}, not {len(value)}")
        return tuple(map(float, value))

    def sequence(self, name: str) -> Sequence[Any]:
        value = self.get(name)
        if not isinstance(value, list | tuple):
            self.refuse(name, "a list is needed")
        return value

    def section(self, name: str) -> "Fields":
        """The fields of a field that is itself an object."""
        value = self.get(name)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            self.refuse(name, "an object with named fields is needed")
        return Fields(value, f"{self._where}: {name}")

    def choice(self, name: str, choices: Mapping[Any, Any], default: Any = None) -> Any:
        """What `choices` has for the field's value."""
        value = self.get(name, default)
        if isinstance(value, list | dict | set) or value not in choices:
            self.refuse(name, f"tbjax does {', '.join(map(repr, choices))}")
        return choices[value]

    def require(self, name: str, *allowed: Any) -> None:
        """Refuse unless the field is missing, null or one of `allowed`."""
        value = self.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, f"tbjax does {' or '.join(map(repr, allowed)) or 'only null'}")

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{self._where}: {name}={self._values.get(name)!r} is not supported: {why}.")
