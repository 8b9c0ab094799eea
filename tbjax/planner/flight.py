"""What a pipeline's stages hold at once, by closed form: microbatches whose activations wait, and arrivals.

`tbjax.pipeline.grid` counts the same from the schedule itself, and the tests hold one against the other; a search has
not the time for that.
"""

import math

from tbjax.planner.workload import Schedule

# Slots for what arrives at a stage in the interleaved schedule: a group of microbatches is as many as there are stages,
# and half of one waits for its turn; what else there is takes this many where stages are few.
FEWEST_ARRIVALS = 5


def activations_in_flight(schedule: Schedule, stages: int, microbatches: int, chunks: int = 1) -> float:
    """Microbatches whose activations a stage holds at once, the most of any stage.

    The closed forms of Narayanan et al. 2021 (GPipe, 1F1B, interleaved) and Qi et al. 2024 (the zero-bubble ones).
    """
    if stages == 1:
        return 1
    match schedule:
        case "gpipe":
            held: float = microbatches
        case "interleaved":
            held = stages * (1 + (stages - 1) / (stages * chunks))
        case "zb-h2":
            held = 2 * stages - 1
        case _:
            held = stages
    return min(held, microbatches)


def arrivals_in_flight(
    schedule: Schedule, stages: int, microbatches: int, chunks: int = 1, *, waiting: bool = False
) -> int:
    """Slots that a stage has for activations and gradients that its neighbours send.

    `waiting` says that an activation stays where it arrived until its backward pass, as under remat="stage".
    """
    if stages == 1:
        return 0
    if waiting:
        # One gradient on its way; in ZB-V, whose stages run a piece from each end of the model, three.
        pieces, gradients = (2, 3) if schedule == "zb-v" else (chunks, 1)
        return math.ceil(pieces * activations_in_flight(schedule, stages, microbatches, chunks)) + gradients
    match schedule:
        case "gpipe":
            return microbatches
        case "interleaved":
            return max(FEWEST_ARRIVALS, stages // 2 + 1)
        case _:
            return 3
