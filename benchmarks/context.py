"""What a long sequence takes when cp cuts it: memory and transfers as the vendors' compilers count them.

    python -m benchmarks.context                        cp = 1, 2, 4, 8 on 8 to 64 H100 and TPU v5p (minutes)
    python -m benchmarks.context --clusters nvidia      one vendor's

Each row is a whole step of training in the shape of Llama 3.1 8B, 8 layers of it, with AdamW: 4 sequences of 32768
tokens over fsdp=4 x tp=2 x cp. Of a step's memory, weights and what belongs to them do not depend on the sequence: what
does is told apart by compiling the same step for a sequence of 1024 on the same mesh. It needs the compilers (`python
-m tbjax.planner.compilers`) and no accelerator.
"""

import argparse

from rich.console import Console
from rich.table import Table

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.verify import Verification, verify
from tbjax.planner.workload import Layout, Workload

GIB = 2**30
SEQUENCE, SHORT = 32768, 1024
CLUSTERS = {
    "nvidia": {1: "h100:8", 2: "h100:2x8", 4: "h100:4x8", 8: "h100:8x8"},
    "google": {1: "v5p:2x2x2", 2: "v5p:2x2x4", 4: "v5p:2x4x4", 8: "v5p:4x4x4"},
}
MODEL = ModelConfig(
    family="llama",
    vocab_size=128256,
    embed=4096,
    mlp=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    layer_kinds=(LayerKind(),) * 8,
    max_positions=131072,
)


def compiled(cluster: str, cp: int, sequence: int) -> Verification:
    work = Workload(global_batch=4, seq_len=sequence)
    return verify(MODEL, work, Layout(fsdp=4, tp=2, cp=cp), cluster, timeout=1800)


def check_transfers(found: Verification) -> None:
    """Raises unless keys and values pass from neighbour to neighbour: gathered over cp are only integers of tokens."""
    over_cp = [c for c in found.collectives if "cp" in c.axes]
    if not any(c.kind == "collective-permute" for c in over_cp):
        raise RuntimeError(f"nothing is passed around over cp: {over_cp}")
    gathered = sum(c.bytes for c in over_cp if c.kind == "all-gather")
    keys = SEQUENCE * MODEL.kv_heads * MODEL.head_dim  # less than the bytes of one layer's keys on one tp device
    if gathered > keys:
        raise RuntimeError(f"{gathered} bytes are gathered over cp, and tokens alone are not as many: {over_cp}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a long sequence takes when cp cuts it.")
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    arguments = parser.parse_args()
    console = Console()
    for vendor in arguments.clusters:
        table = Table(title=f"4 x {SEQUENCE} tokens, fsdp=4 x tp=2 x cp: GiB per device", title_justify="left")
        for heading in ("cluster", "cp", "temp", "of the sequence", "x cp / of cp=1", "compile s"):
            table.add_column(heading, justify="left" if heading == "cluster" else "right")
        first = None
        for cp, cluster in CLUSTERS[vendor].items():
            whole, short = (compiled(cluster, cp, sequence) for sequence in (SEQUENCE, SHORT))
            if cp > 1:
                check_transfers(whole)
            temp, rest = (found.compiled.bytes["temp"] for found in (whole, short))
            # What the short sequence takes itself is a known share of what the long one does.
            of_sequence = (temp - rest) / (1 - SHORT / SEQUENCE)
            first = of_sequence if first is None else first
            row = f"{temp / GIB:.2f}", f"{of_sequence / GIB:.2f}", f"{of_sequence * cp / first:.2f}"
            table.add_row(cluster, str(cp), *row, f"{whole.compile_seconds:.0f}")
        console.print(table)


if __name__ == "__main__":
    main()
