"""Where could Falcon-180B be trained, and at what speed? One table over kinds of hardware, without any of them.

    python examples/falcon_180b_plan.py
    python examples/falcon_180b_plan.py --hardware h100:8x8 --hardware v5p:4x4x8 --verify --html falcon.html
    python examples/falcon_180b_plan.py --tiny      # a small Falcon on eight CPU devices, compiled

`--verify` has the target's own compiler compile the whole training step of the best plan.
"""

import argparse
import sys
from typing import Any

import tiny
from rich.console import Console
from rich.table import Table

HARDWARE = ("a100-80:16x8", "h100:8x8", "h100:16x8", "h200:8x8", "v5p:4x4x8", "v6e:16x16")


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    import tbjax
    from tbjax.planner import words

    model: Any = arguments.model_name
    hardware, lengths = arguments.hardware or HARDWARE, {"global_batch": 512, "seq_len": 2048}
    if arguments.tiny:
        model = tbjax.from_config(tiny.FALCON, dtype="float32").config
        hardware, lengths = ("cpu:8",), {"global_batch": 8, "seq_len": 128}

    table = Table("hardware", "mesh", "memory", "tokens/s", "MFU", title="a small Falcon" if arguments.tiny else model)
    plans = []
    for spec in hardware:
        plan = tbjax.plan(model, spec, task="train", **lengths)
        plans.append(plan)
        what = words.mesh(plan.layout) if plan.fits else "does not fit"
        speed = f"{plan.tokens_per_second:,.0f}", f"{plan.mfu:.0%}"
        table.add_row(spec, what, words.gib(plan.memory.total), *speed)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)

    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return 1
    best = max(fitting, key=lambda plan: plan.tokens_per_second)
    console.print(best.explain(), markup=False)
    if arguments.verify or arguments.tiny:
        verification = best.verify()
        console.print(f"compiled for {best.cluster}: {'it fits' if verification.fits else 'it does not fit'}")
        best = best.with_verification(verification)
    if arguments.html:
        best.to_html(arguments.html)
    return 0 if best.verification is None or best.verification.fits else 1


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "tiiuae/falcon-180B")
    parser.add_argument("--hardware", action="append", help="as h100:8x8 or v5p:4x4x8; may be given several times")
    parser.add_argument("--verify", action="store_true", help="compile the best plan for its hardware")
    parser.add_argument("--html", help="write the best plan as a page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
