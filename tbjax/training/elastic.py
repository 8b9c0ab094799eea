"""What stays the same of a run whose machine does not.

A run that goes on with other devices than it began with learns the same only if a step is over the same sequences. So
the batch of a step is fixed, and not a figure of each device; what fewer devices cannot hold at once they take in
turn, by accumulation. The order of the data and the schedule of the learning rate follow the step alone, and the
checkpoint does not care on which mesh it was written.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.training.config import TrainConfig


def as_begun(settings: "TrainConfig", folder: Path | None) -> "TrainConfig":
    """With the batch of the run in `folder`, where there is one and the settings leave it open.

    What is usual where nobody says depends on the devices, and may be another number today.
    """
    if folder is None:
        return settings
    from tbjax.training.saving import read_progress, saved_steps

    for step in reversed(saved_steps(folder)):
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: those before it say the same
            config = read_progress(folder / str(step)).config or {}
            begun = {name: config.get(name) for name in ("batch_size", "seq_len")}
            return replace(settings, **{name: getattr(settings, name) or value for name, value in begun.items()})
    return settings


def accumulation(batch: int, ways: int, at_once: int) -> int:
    """In how many parts a step takes `batch` sequences over `ways` shares, so that each has `at_once` or fewer.

    The fewest that divide the batch evenly.
    """
    if batch % ways:
        fitting = next(count for count in range(ways, 0, -1) if batch % count == 0)
        raise ValueError(
            f"a batch of {batch} sequences cannot be shared out over {ways} data-parallel devices: a batch that is a "
            f"multiple of {ways}, or a mesh with dp * fsdp * ep = {fitting}, would do. For a run whose devices come "
            "and go choose a batch that all their numbers divide."
        )
    share = batch // ways
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= at_once)


def agreed(plan: "Plan") -> "Plan":
    """The plan of the first process, in all: hosts need not be alike, and each plans for one like itself."""
    import numpy as np
    from jax.experimental import multihost_utils

    from tbjax.planner.plan import Plan

    text = plan.to_json().encode()
    room = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(text)))), np.uint8)
    own = np.frombuffer(text, np.uint8)[: room.size]
    room[: own.size] = own
    return Plan.from_json(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8).tobytes().decode())
