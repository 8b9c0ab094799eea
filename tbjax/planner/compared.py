"""What was predicted beside what the compiler says, as rows of words for the terminal and the page."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tbjax.planner import hlo, words

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.planner.verify import Program, Verification

COMPILERS = {"tpu": "the TPU compiler", "cuda": "XLA's compiler for NVIDIA", "cpu": "XLA's compiler for CPUs"}

# What a program is given and keeps from step to step; everything else comes and goes within one.
LASTING = ("parameters", "optimizer", "KV cache")

# The compiler's kinds of memory, in words.
_KINDS = {
    "argument": "arguments",
    "output": "results",
    "alias": "results in the place of arguments",
    "temp": "temporaries",
    "generated_code": "code",
    "host": "on the host",
    "peak": "its own peak",
}


def verdict(verification: "Verification") -> str:
    """Whether it fits, as the compiler has it."""
    who = COMPILERS.get(verification.compiler, verification.compiler)
    needs, limit = words.gib(verification.compiled.total), words.gib(verification.cluster.hardware.usable)
    if verification.fits:
        return f"✓ Fits, says {who}: {needs} of {limit}, {words.gib(verification.margin)} to spare."
    return (
        f"✗ Does not fit, says {who}: {needs} where {limit} can be held, {words.gib(-verification.margin)} too little."
    )


def memory(plan: "Plan", verification: "Verification") -> list[tuple[str, str, str, str]]:
    """Rows of what, predicted, compiled, difference."""
    program, parts = verification.compiled, plan.memory.parts
    lasting = sum(size for part, size in parts.items() if part in LASTING)
    pairs = [
        ("What lasts from step to step", lasting, program.bytes["argument"]),
        ("What comes and goes", plan.memory.total - lasting, program.total - program.bytes["argument"]),
    ]
    if plan.memory.host or program.bytes.get("host"):
        pairs.append(("In the host's memory", plan.memory.host, program.bytes.get("host", 0)))
    pairs.append(("In all", plan.memory.total, program.total))
    return [
        (what, words.gib(predicted), words.gib(compiled), difference(predicted, compiled))
        for what, predicted, compiled in pairs
    ]


def difference(predicted: float, compiled: float) -> str:
    """By how much the prediction is too high (+) or too low (-)."""
    # Rounded first, and without a sign of its own, so that nothing reads as -0.0.
    return f"{round(100 * (predicted - compiled) / compiled, 1) + 0.0:+.1f} %" if compiled else "-"


def kinds(program: "Program") -> list[tuple[str, str]]:
    """The compiler's own account of its memory."""
    return [(_KINDS.get(kind, words.title(kind)), words.gib(size)) for kind, size in program.bytes.items() if size]


def collectives(verification: "Verification") -> list[tuple[str, ...]]:
    """Rows of kind, axes, how often and how much: predicted, compiled."""
    predicted, compiled = (
        {(each.kind, each.axes): each for each in found} for found in (verification.predicted, verification.collectives)
    )

    def largest(key: tuple[str, tuple[str, ...]]) -> int:
        return -max(found[key].bytes for found in (predicted, compiled) if key in found)

    def said(key: tuple[str, tuple[str, ...]], figure: str, written: Callable[[float], str]) -> list[str]:
        return [written(getattr(found[key], figure)) if key in found else "-" for found in (predicted, compiled)]

    return [
        (key[0], _along(key[1]), *said(key, "count", words.count), *said(key, "bytes", words.gib))
        for key in sorted({*predicted, *compiled}, key=largest)
    ]


def sent(verification: "Verification") -> list[tuple[str, str, str, str]]:
    """Rows of axes, what a device sends along them as predicted and as compiled, difference.

    What is less than a thousandth of all is left out: the sums of a few numbers.
    """
    predictions, compilations = hlo.sent(verification.predicted), verification.sent
    whole = max(predictions.total(), compilations.total())
    rows = [(axes, predictions[axes], compilations[axes]) for axes in predictions | compilations]
    rows.sort(key=lambda row: -max(row[1:]))
    return [
        (_along(axes), words.gib(predicted), words.gib(compiled), difference(predicted, compiled))
        for axes, predicted, compiled in rows
        if 1000 * max(predicted, compiled) >= whole > 0
    ]


def time(verification: "Verification") -> list[tuple[str, str]]:
    """What the planner and, in cycles, the compiler say of the time of the program."""
    if not verification.seconds:
        return []
    return [
        ("Predicted, all told", words.seconds(verification.predicted_seconds)),
        ("Compiled, what one device computes", words.seconds(verification.seconds)),
        ("Cycles", words.short_count(verification.cycles)),
    ]


def _along(axes: tuple[str, ...]) -> str:
    return words.TIMES.join(axes) or "no axis"


def notes(verification: "Verification") -> list[str]:
    """How the verdict came about."""
    names = " and ".join(program.name for program in verification.programs)
    said = [f"Compiled for {verification.cluster} in {words.seconds(verification.compile_seconds)}: {names}."]
    if len(verification.programs) > 1:
        said.append(f"The figures are those of {verification.compiled.name}, which needs most memory.")
    if verification.depths:
        few, many = sorted(verification.depths)
        said.append(f"Extrapolated in the number of layers from models of {few} and of {many} layers.")
    if verification.seconds:
        clock = verification.cluster.hardware.clock
        said.append(
            f"Cycles are the compiler's estimate for a whole device, loops included, at {clock / 1e9:g} GHz: transfers "
            "that run beside are not in them."
        )
    if untold := verification.compiled.untold:
        said.append(
            f"Nor are {words.count(untold)} runs of kernels (such as splash attention) or of ragged products, whose "
            "cycles the compiler cannot tell."
        )
    if any("pp" in collective.axes for collective in verification.collectives):
        said.append("Collectives are counted as on a stage that has both ends of the model.")
    if unknown := verification.compiled.unknown_loops:
        said.append(f"Loops whose length the program does not tell, counted as one turn: {unknown}.")
    return said
