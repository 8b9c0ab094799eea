"""Learning rates by name, over optax's schedules.

    constant   the peak, to the end
    cosine     falls along half a cosine
    linear     falls along a line
    wsd        the peak, then falls along a line in the last `decay` steps (warm-up, stable, decay)

Each may begin with a warm-up along a line, whose first step is not wasted on a rate of zero. All but `constant` end at
`final` times the peak.
"""

from typing import Literal, TypeAlias

import optax

Schedule: TypeAlias = Literal["constant", "cosine", "linear", "wsd"]

# The part of a run in which wsd's rate falls, unless told otherwise: MiniCPM, which named the schedule, found a tenth
# of the tokens to be enough (arXiv:2404.06395).
DECAYING_PART = 0.1


def learning_rate(
    schedule: Schedule, peak: float, steps: int, *, warmup: int = 0, decay: int | None = None, final: float = 0.1
) -> optax.Schedule:
    """The rate of each step of `steps`, from step 0 on."""
    after = steps - warmup
    match schedule:
        case "constant":
            body = optax.constant_schedule(peak)
        case "cosine":
            body = optax.cosine_decay_schedule(peak, after, alpha=final)
        case "linear":
            body = optax.linear_schedule(peak, final * peak, after)
        case "wsd":
            falling = wsd_decay(steps, decay)
            body = optax.linear_schedule(peak, final * peak, falling, transition_begin=after - falling)
        case _:
            known = ", ".join(map(repr, Schedule.__args__))
            raise ValueError(f"schedule={schedule!r} is unknown: tbjax knows {known}.")
    if warmup == 0:
        return body
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, body], [warmup])


def wsd_decay(steps: int, decay: int | None) -> int:
    """In how many steps, at the end, wsd's rate falls."""
    return max(1, round(DECAYING_PART * steps)) if decay is None else decay
