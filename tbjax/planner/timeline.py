"""The pipeline of a plan on the clock, for its picture.

A microbatch takes every stage the same time: what a step takes without its bubble and what comes once a step, shared
among the microbatches. How that divides into the passes that schedules tell apart is the cost model's own division of a
layer's arithmetic, so that the picture idles where the plan's bubble comes from.
"""

from typing import TYPE_CHECKING

from tbjax.pipeline.schedule import named
from tbjax.pipeline.simulate import Timeline, Times, simulate
from tbjax.planner.prices import prices
from tbjax.planner.stack import XLA
from tbjax.planner.workload import Layout

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan

# Tasks that can be told apart in a picture.
LEGIBLE_TASKS = 1500

# Parts of a step's time that no microbatch is in.
ONCE = ("bubble", "data", "optimizer")


def timeline(plan: "Plan") -> Timeline | None:
    """The plan's schedule with as many of its microbatches as can be drawn; None where there is no pipeline."""
    layout = plan.layout
    if layout.pp == 1 or not plan.workload.training:
        return None
    return simulate(named(layout.schedule, layout.chunks), layout.pp, drawn_microbatches(layout), _times(plan))


def drawn_microbatches(layout: Layout) -> int:
    """How many can be told apart: enough to fill the pipeline, in the whole groups that interleaving asks for."""
    groups = LEGIBLE_TASKS // (3 * layout.pp * layout.chunks) // layout.pp
    return min(layout.microbatches, max(2, groups) * layout.pp)


def _times(plan: "Plan") -> Times:
    layout = plan.layout
    microbatch = plan.time.total - sum(plan.time.parts.get(part, 0.0) for part in ONCE)
    passes = prices(plan.config, plan.workload, plan.cluster, XLA).layer(
        layout.rows(plan.workload), layout.tp, layout.cp, layout.ep, layout.sequence_parallel, layout.remat
    )
    unit = microbatch / layout.microbatches / (passes.forwards + passes.inputs + passes.weights)
    return Times(
        forward=unit * passes.forwards, backward_input=unit * passes.inputs, backward_weight=unit * passes.weights
    )
