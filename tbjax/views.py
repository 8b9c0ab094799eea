"""A decoder's layers one by one, as `model.layers`: a sequence that can be indexed, sliced and walked through.

Equal layers are stacked, so a layer by itself is a view that is made when it is asked for. A slice costs nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import jax

if TYPE_CHECKING:
    from tbjax.model import Block, Decoder


class Layers(Sequence["Block"]):
    """Some of a decoder's layers, in order."""

    def __init__(self, model: "Decoder", numbers: range | None = None) -> None:
        self.model = model
        self.numbers = range(model.config.layers) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> "Block": ...
    @overload
    def __getitem__(self, index: slice) -> "Layers": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Layers(self.model, self.numbers[index])
        config = self.model.config
        place = config.place(self.numbers[index])
        row = self.model.sharding.stack(config.groups[place.group].repeats).places[place.repeat]
        return jax.tree.map(lambda a: a[row], self.model.stacks[place.group][place.position])

    def __repr__(self) -> str:
        return f"Layers({self.numbers.start} to {self.numbers.stop - 1} of {self.model.config.layers})"
