"""What a long sequence takes when cp cuts it: memory and transfers as the vendors' compilers count them.

    python -m benchmarks.context                        compiles what benchmarks/context.csv lacks, prints the tables
    python -m benchmarks.context --stored               prints them from that file alone
    python -m benchmarks.context --clusters nvidia      one vendor's

Each row is a whole step of training in the shape of Llama 3.1 8B, 8 layers of it, with AdamW: 4 sequences of 32768
tokens over fsdp=4 x tp=2 x cp, on 8 to 64 H100 and TPU v5p. Of a step's memory, weights and what belongs to them do not
depend on the sequence: what does is told apart by compiling the same step for a sequence of 1024 on the same mesh. It
needs the compilers (`python -m tbjax.planner.compilers`) and no accelerator: seconds a step for NVIDIA, minutes for a
TPU.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.verify import Verification, verify
from tbjax.planner.workload import Layout, Workload

FILE = Path(__file__).with_suffix(".csv")
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


class Row(NamedTuple):
    """A step, compiled for one mesh: bytes and seconds."""

    cluster: str
    cp: int
    temp: int  # temporaries of one device
    short: int  # those of the same step for a short sequence
    seconds: float  # that compiling took

    @property
    def of_sequence(self) -> float:
        """What the sequence takes of `temp`: what the short one takes itself is a known share of it."""
        return (self.temp - self.short) / (1 - SHORT / SEQUENCE)


def compiled(cluster: str, cp: int) -> Row:
    """A step for the long sequence, and one for the short."""
    whole, short = (
        verify(MODEL, Workload(global_batch=4, seq_len=length), Layout(fsdp=4, tp=2, cp=cp), cluster, timeout=3600)
        for length in (SEQUENCE, SHORT)
    )
    if cp > 1:
        check_transfers(whole)
    return Row(cluster, cp, whole.compiled.bytes["temp"], short.compiled.bytes["temp"], round(whole.compile_seconds, 1))


def check_transfers(found: Verification) -> None:
    """Raises unless keys and values pass from neighbour to neighbour: gathered over cp are only integers of tokens."""
    over_cp = [c for c in found.collectives if "cp" in c.axes]
    if not any(c.kind == "collective-permute" for c in over_cp):
        raise RuntimeError(f"nothing is passed around over cp: {over_cp}")
    gathered = sum(c.bytes for c in over_cp if c.kind == "all-gather")
    keys = SEQUENCE * MODEL.kv_heads * MODEL.head_dim  # less than the bytes of one layer's keys on one tp device
    if gathered > keys:
        raise RuntimeError(f"{gathered} bytes are gathered over cp, and tokens alone are not as many: {over_cp}")


def kept() -> dict[str, Row]:
    """What has been compiled so far, by cluster."""
    if not FILE.exists():
        return {}
    with FILE.open(newline="") as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        found = [Row(r["cluster"], int(r["cp"]), int(r["temp"]), int(r["short"]), float(r["seconds"])) for r in rows]
    return {row.cluster: row for row in found}


def keep(rows: Mapping[str, Row]) -> None:
    with FILE.open("w", newline="") as lines:
        lines.write("# Steps of 4 x 32768 tokens, by the compilers: python -m benchmarks.context\n")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows.values())


def table(rows: Sequence[Row]) -> Table:
    """Memory beside cp, and as a multiple of what an even cut of the first row's would be."""
    result = Table(title=f"4 x {SEQUENCE} tokens, fsdp=4 x tp=2 x cp: GiB per device", title_justify="left")
    for heading in ("cluster", "cp", "temp", "of the sequence", "x cp / of cp=1", "compile s"):
        result.add_column(heading, justify="left" if heading == "cluster" else "right")
    for row in rows:
        share = row.of_sequence * row.cp / rows[0].of_sequence
        figures = f"{row.temp / GIB:.2f}", f"{row.of_sequence / GIB:.2f}", f"{share:.2f}"
        result.add_row(row.cluster, str(row.cp), *figures, f"{row.seconds:.0f}")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", nargs="+", choices=CLUSTERS, default=list(CLUSTERS))
    parser.add_argument("--stored", action="store_true", help="compile nothing")
    parser.add_argument("--again", action="store_true", help="compile what is in the file too")
    given = parser.parse_args(arguments)
    console, rows = Console(), kept()
    for vendor in given.clusters:
        for cp, cluster in CLUSTERS[vendor].items():
            if not given.stored and (given.again or cluster not in rows):
                rows[cluster] = compiled(cluster, cp)
                keep(rows)
        if found := [rows[cluster] for cluster in CLUSTERS[vendor].values() if cluster in rows]:
            console.print(table(found))


if __name__ == "__main__":
    main()
