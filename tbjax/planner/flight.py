"""What a pipeline's stages hold at once, by closed form: microbatches whose activations wait, and arrivals.

`tbjax.pipeline.grid` counts the same from the schedule itself, and the tests hold one against the other; a search has
not the time for that.
"""

from tbjax.planner.workload import Schedule

# Slots for what arrives at a stage in the interleaved schedule, for up to eight stages.
MOST_ARRIVALS = 5


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


def arrivals_in_flight(schedule: Schedule, stages: int, microbatches: int) -> int:
    """Slots that a stage has for activations and gradients that its neighbours send."""
    if stages == 1:
        return 0
    return microbatches if schedule == "gpipe" else MOST_ARRIVALS if schedule == "interleaved" else 3
