"""Bytes that one device holds at the worst moment of a step, by part, as the compilers of the vendors lay them out.

A step of training has few moments at which memory can peak, and each has its own set of living arrays:

    loss        one chunk of logits, the head's weight and its gradient
    backward    what computing one layer again and differentiating it needs, in its attention or its feed-forward part
    embedding   the gradient of the table, before it is cut
    update      new parameters gathered, where the optimizer works on parts of them

Throughout there are parameters and optimizer state and, until the last layer's backward pass has ended, what the
forward pass saved and the gradients of all layers: one stack for each weight, which exists from the beginning though
it is filled layer by layer. Inference has two: reading the prompt and writing tokens. The largest moment is what a
device must have room for. Its parts are what `memory` returns, so parts always sum to the total.

What is alive at each moment stands in `moments`, and the counts that differ from compiler to compiler in `liveness`.
Everything is arithmetic on sizes: no arrays, no model. What depends on the model and a few degrees alone is cached, so
that a search can ask for tens of thousands of layouts.
"""

import dataclasses
from collections.abc import Mapping

from tbjax.config import ModelConfig
from tbjax.planner import moments
from tbjax.planner.device import Hardware
from tbjax.planner.workload import Layout, Workload

# Of what a program computes, the part that is lost between buffers of different sizes.
FRAGMENTATION = 0.01

# What is there before a program starts: nothing is lost between those.
GIVEN = ("parameters", "optimizer", "batch", "KV cache", "KV cache of prompts")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device at the moment when they are most, on the pipeline stage that has most."""

    parts: Mapping[str, int]
    host: int = 0  # bytes in the host's memory, of each device
    moment: str = ""  # which moment that is

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(config: ModelConfig, workload: Workload, layout: Layout, hardware: Hardware) -> Memory:
    """What one device of `hardware` holds when `workload` runs under `layout`."""
    of_task = moments.of_training if workload.training else moments.of_inference
    found = of_task(config, workload, layout, hardware)
    name, parts = max(found.moments, key=lambda moment: sum({**found.throughout, **moment[1]}.values()))
    parts = {part: int(size) for part, size in {**found.throughout, **parts}.items() if size}
    lost = int(FRAGMENTATION * sum(size for part, size in parts.items() if part not in GIVEN))
    return Memory(parts | {"fragmentation": lost} if lost else parts, int(found.host), name)
