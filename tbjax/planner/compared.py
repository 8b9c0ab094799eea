"""What was predicted beside what the compiler says, as rows of words for the terminal and the page."""

from typing import TYPE_CHECKING

from tbjax.planner import words

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


def collectives(verification: "Verification") -> list[tuple[str, str, str, str]]:
    """Rows of kind, axes, how often, how much."""
    found = sorted(verification.collectives, key=lambda collective: -collective.bytes)
    return [
        (
            collective.kind,
            words.TIMES.join(collective.axes) or "no axis",
            words.count(collective.count),
            words.gib(collective.bytes),
        )
        for collective in found
    ]


def notes(verification: "Verification") -> list[str]:
    """How the verdict came about."""
    names = " and ".join(program.name for program in verification.programs)
    said = [f"Compiled for {verification.cluster} in {words.seconds(verification.compile_seconds)}: {names}."]
    if len(verification.programs) > 1:
        said.append(f"The figures are those of {verification.compiled.name}, which needs most memory.")
    if verification.depths:
        few, many = sorted(verification.depths)
        said.append(f"Extrapolated in the number of layers from models of {few} and of {many} layers.")
    if verification.cycles:
        said.append(f"The compiler estimates {words.short_count(verification.cycles)} cycles of one core.")
    if unknown := verification.compiled.unknown_loops:
        said.append(f"Loops whose length the program does not tell, counted as one turn: {unknown}.")
    return said
