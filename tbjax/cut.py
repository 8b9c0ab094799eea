"""How a stack of layers lies over the stages of a pipeline.

Layers that are alike stand in one array, and the mesh axis `pp` cuts that array into equal parts, a part for each
stage. Which layer stands in which row of it is free to choose, and a `Cut` is that choice: for each stage, the runs of
layers that it holds, one for each of its chunks. Rows are local, so a stage finds what it runs where it runs it, and
nothing has to be moved in a step.

Stages may have different numbers of layers: the part of each has as many rows as the fullest stage needs, and what a
stage lacks are holes, rows of zeros that no program reads and no file knows. What lies on disk is in the layers' own
order whatever the cut, so a model is saved under one and loaded under another.

Layers are counted in repeats of the model's pattern (`ModelConfig.groups`), which are single layers for most models.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

HOLE = -1


class Placement(Protocol):
    """What a schedule is to this file: which piece of the model lies on which stage."""

    @property
    def name(self) -> str: ...

    @property
    def chunks(self) -> int: ...

    def position(self, stage: int, chunk: int, stages: int) -> int: ...


class Run(NamedTuple):
    """Layers that follow each other."""

    first: int
    length: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """The runs of every stage, chunk by chunk: `runs[stage][chunk]`."""

    runs: tuple[tuple[Run, ...], ...]

    def __post_init__(self) -> None:
        end = 0
        for first, length in sorted(self.pieces):
            if first != end or length < 1:
                raise ValueError(
                    f"Cut({[tuple(map(tuple, stage)) for stage in self.runs]}): layers go to stages once each, in runs "
                    f"of one at least, but no run begins at layer {end}."
                )
            end += length
        if len({*map(len, self.runs)}) != 1:
            raise ValueError(f"Cut: stages have {[*map(len, self.runs)]} chunks: every stage must have as many.")

    @property
    def pieces(self) -> tuple[Run, ...]:
        """All runs."""
        return tuple(itertools.chain(*self.runs))

    @property
    def stages(self) -> int:
        return len(self.runs)

    @property
    def chunks(self) -> int:
        return len(self.runs[0])

    @functools.cached_property
    def repeats(self) -> int:
        """How many layers there are."""
        return sum(run.length for run in self.pieces)

    @functools.cached_property
    def rows(self) -> int:
        """How many rows of the array every stage has."""
        return max(sum(run.length for run in stage) for stage in self.runs)

    @property
    def longest(self) -> int:
        """How many layers the longest run has."""
        return max(run.length for run in self.pieces)

    @property
    def even(self) -> bool:
        """Whether all runs are equally long."""
        return self.longest * len(self.pieces) == self.repeats

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The layer in each row of the array, or HOLE."""
        found: list[int] = []
        for stage in self.runs:
            own = [layer for first, length in stage for layer in range(first, first + length)]
            found += own + [HOLE] * (self.rows - len(own))
        return tuple(found)

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """The row of each layer."""
        return tuple(row for _, row in sorted((layer, row) for row, layer in enumerate(self.order) if layer != HOLE))

    @property
    def plain(self) -> bool:
        """Whether layers lie in order, without holes."""
        return self.order == tuple(range(self.repeats))

    def local(self, stage: int, chunk: int) -> Run:
        """A chunk among the stage's own rows."""
        return Run(sum(run.length for run in self.runs[stage][:chunk]), self.runs[stage][chunk].length)

    def serves(self, placement: Placement) -> bool:
        """Whether pieces lie on the stages that the placement gives them to."""
        return self.chunks == placement.chunks and self == cut(
            self.repeats, self.stages, placement, counts=[length for _, length in sorted(self.pieces)]
        )


def cut(repeats: int, stages: int, placement: Placement | None = None, *, counts: Sequence[int] | None = None) -> Cut:
    """`repeats` layers over `stages`, in order or where a placement (a schedule, that is) has its pieces.

    `counts` says how many layers each piece of the model has, in the model's order; by default they are as equal as can
    be, with the shorter pieces last, since the last of all has the head and the loss besides.
    """
    chunks = 1 if placement is None else placement.chunks
    pieces = stages * chunks
    asked = f"pp={stages}" + (f" with {chunks} chunks a stage" if chunks > 1 else "")
    if counts is None:
        if repeats < pieces:
            raise ValueError(
                f"{asked} makes {pieces} pieces, but there are {repeats} to share out: a piece has one at least, so "
                f"pp={max(1, repeats // chunks)} is the most{'' if chunks == 1 else ', or a schedule of fewer chunks'}."
            )
        counts = [repeats // pieces + (piece < repeats % pieces) for piece in range(pieces)]
    if len(counts) != pieces or sum(counts) != repeats:
        raise ValueError(
            f"counts={list(counts)}: {asked} takes {pieces} counts that add up to {repeats}, not {len(counts)} that "
            f"add up to {sum(counts)}."
        )
    ends = [*itertools.accumulate(counts)]

    def run(stage: int, chunk: int) -> Run:
        piece = stage if placement is None else placement.position(stage, chunk, stages)
        return Run(ends[piece] - counts[piece], counts[piece])

    return Cut(tuple(tuple(run(stage, chunk) for chunk in range(chunks)) for stage in range(stages)))
