"""Decoding of large models, compiled by the vendors' compilers for machines that need not be there.

    python -m benchmarks.generate_compiled                          all models for both machines
    python -m benchmarks.generate_compiled --model Mixtral --machine h100
    python -m benchmarks.generate_compiled --quantization int8:channel     with weights in 8 bits

Each model is laid out as the planner has it for inference, and the two programs of generation are compiled for that. A
row says what a device must have and has, and what a decode step sends: collectives by kind, with how often each runs
for a token and the bytes of one. Under pure tensor parallelism a layer has two all-reduces (of attention and of the
feed-forward layer; one where a block has both in parallel), of one token's features, and no weight is gathered. Where
tp has more devices than there are key-value heads (405B over tp=32) the cache is cut by tokens, and a layer has three
more, which join what each device found in its part, and three all-gathers, of queries, keys and values. Where weights
lie in parts over fsdp, too, tokens come to them: two all-to-alls, a reduction and a gather for each block.
"""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import tbjax
from tbjax.planner.verify import Program, Verification
from tbjax.quantize import RULES

# The smallest machines of each kind that the planner finds room on.
MODELS = {
    "meta-llama/Llama-2-70b-hf": {"h100": "h100:8", "v5p": "v5p:2x2x2"},
    "meta-llama/Llama-3.1-405B": {"h100": "h100:2x8", "v5p": "v5p:2x4x4"},
    "mistralai/Mixtral-8x7B-v0.1": {"h100": "h100:8", "v5p": "v5p:2x2x1"},
    "tiiuae/falcon-180B": {"h100": "h100:8", "v5p": "v5p:2x2x4"},
}
BATCH = 8
SEQUENCE = 2048
NEW = 128


class Row(NamedTuple):
    """What the compiler made of one model on one machine."""

    model: str
    machine: str
    mesh: dict[str, int]
    verification: Verification

    @property
    def decode(self) -> Program:
        return next(program for program in self.verification.programs if program.name == "decode")


def compiled(model: str, machine: str, quantization: Any = None, mesh: Mapping[str, int] | None = None) -> Row:
    """The planner's layout, or the best on a mesh, compiled."""
    plan = tbjax.plan(
        model, machine, task="inference", global_batch=BATCH, seq_len=SEQUENCE, new_tokens=NEW,
        precision="bfloat16", quantization=quantization, mesh=mesh,
    )  # fmt: skip
    return Row(model, machine, {axis: size for axis, size in plan.mesh.items() if size > 1}, plan.verify())


def spelled(row: Row) -> str:
    """One line."""
    gib, found = 2**30, row.verification
    sent = ", ".join(
        f"{c.count} {c.kind} over {'*'.join(c.axes) or 'no axis'} of {c.bytes / max(c.count, 1) / 1024:.1f} KiB"
        for c in row.decode.collectives
    )
    verdict = f"fits with {found.margin / gib:.1f}" if found.fits else f"DOES NOT FIT by {-found.margin / gib:.1f}"
    return (
        f"{row.model:28} {row.machine:10} {row.mesh}: {row.decode.total / gib:.1f} GiB a device to decode, "
        f"{found.compiled.total / gib:.1f} in all, {verdict} GiB; compiled in {found.compile_seconds:.0f} s; "
        f"for a token {sent or 'nothing is sent'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="part of a name")
    parser.add_argument("--machine", choices=["h100", "v5p"])
    parser.add_argument("--quantization", choices=list(RULES))
    arguments = parser.parse_args()
    for model, machines in MODELS.items():
        for kind, machine in machines.items():
            if arguments.model.lower() in model.lower() and arguments.machine in (None, kind):
                print(spelled(compiled(model, machine, arguments.quantization)), flush=True)


if __name__ == "__main__":
    main()
