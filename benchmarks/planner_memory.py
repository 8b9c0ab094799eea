"""Bytes per device: what the planner predicts beside what the vendors' compilers say of the very program.

    python -m benchmarks.planner_memory                    the table, from the compiled figures kept in tests/data
    python -m benchmarks.planner_memory --compile          compiles what is not in that file yet, and keeps it
    python -m benchmarks.planner_memory --compile NAME ... compiles these cases anew

Compiling needs `tbjax[verify]` but no GPU and no TPU. Seconds a case for NVIDIA and the CPU, a minute or so for a TPU.

A compiled figure is of the program that needs more where there are two (reading a prompt, writing tokens): arguments,
temporaries, and results that replace no arguments.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from interop.families import Fields, family
from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.hardware import Cluster, cluster
from tbjax.planner.memory import Memory, memory
from tbjax.planner.models import describe
from tbjax.planner.verify import verify
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import ShardingStrategy

FILE = Path(__file__).parent.parent / "tests" / "data" / "compiled_memory.csv"
GiB = 1 << 30


class Case(NamedTuple):
    """A model, what it is to do, and how it is laid out on what."""

    name: str
    model: str
    cluster: str
    workload: Mapping[str, Any]
    layout: Mapping[str, Any]

    def inputs(self) -> tuple[ModelConfig, Workload, Layout, Cluster]:
        return model(self.model), Workload(**self.workload), Layout(**self.layout), cluster(self.cluster)

    def predicted(self) -> Memory:
        config, workload, layout, where = self.inputs()
        return memory(config, workload, layout, where.hardware)


class Compiled(NamedTuple):
    """What the compiler said of a case: bytes on each device."""

    name: str
    compiler: str
    jax: str
    program: str
    argument: int
    output: int
    alias: int
    temp: int
    peak: int

    @property
    def total(self) -> int:
        """What a device must have free. What libtpu calls temporaries is more than it allocates; its peak is right."""
        if self.compiler == "tpu":
            return self.peak
        return self.argument + self.output - self.alias + self.temp

    @property
    def fits(self) -> bool:
        return self.total <= CASE[self.name].inputs()[3].hardware.usable


# A model too small for anyone's use, whose layers are of the usual kind.
TINY = ModelConfig(
    family="llama",
    vocab_size=2048,
    embed=512,
    mlp=1408,
    heads=8,
    kv_heads=4,
    head_dim=64,
    layer_kinds=(LayerKind(),) * 4,
    max_positions=4096,
)


# And one whose query heads all share one key-value head, which no tp can cut: in serving it cuts tokens.
MULTI_QUERY = dataclasses.replace(
    TINY, embed=1024, mlp=4096, heads=32, kv_heads=1, head_dim=128, layer_kinds=(LayerKind(),) * 2
)
UNPUBLISHED = {"tiny": TINY, "multi-query": MULTI_QUERY}


@functools.cache
def model(name: str) -> ModelConfig:
    """A built-in model, or the first so many layers of one: "llama-2-7b", "llama-2-7b/4"."""
    name, _, layers = name.partition("/")
    if name in UNPUBLISHED:
        config = UNPUBLISHED[name]
    else:
        fields = describe(name)
        config = family(fields["model_type"]).config(Fields(fields))
    return dataclasses.replace(config, layer_kinds=config.layer_kinds[: int(layers)]) if layers else config


def train(batch: int, sequence: int = 4096, **other: Any) -> dict[str, Any]:
    return {"global_batch": batch, "seq_len": sequence, **other}


def serve(batch: int, sequence: int, new: int) -> dict[str, Any]:
    return {"task": "inference", "global_batch": batch, "seq_len": sequence, "new_tokens": new}


DATA_PARALLEL = {"strategy": ShardingStrategy.NO_SHARD}

CASES = (
    # NVIDIA: each axis alone, mixed, and each policy.
    Case("7b fsdp", "llama-2-7b", "h100:8", train(16), {"fsdp": 8}),
    Case("7b fsdp dots", "llama-2-7b", "h100:8", train(16), {"fsdp": 8, "remat": "dots"}),
    Case("7b fsdp none", "llama-2-7b", "h100:8", train(8, 2048), {"fsdp": 8, "remat": "none"}),
    Case("7b tp", "llama-2-7b", "h100:8", train(4), {"tp": 8}),
    Case("7b dp", "llama-2-7b/8", "h100:8", train(16), {"dp": 8, **DATA_PARALLEL}),
    Case("7b dp x fsdp", "llama-2-7b", "h100:2x8", train(32), {"dp": 2, "fsdp": 8}),
    Case("7b fsdp x tp, sequence parallel", "llama-2-7b", "h100:8", train(16),
         {"fsdp": 4, "tp": 2, "sequence_parallel": True}),
    Case("7b microbatches", "llama-2-7b", "h100:8", train(32), {"fsdp": 8, "microbatches": 4}),
    Case("7b lion", "llama-2-7b", "h100:8", train(8, optimizer="lion"), {"fsdp": 8}),
    Case("7b adafactor", "llama-2-7b", "h100:8", train(8, optimizer="adafactor"), {"fsdp": 8}),
    Case("7b muon", "llama-2-7b", "h100:8", train(8, optimizer="muon"), {"fsdp": 8}),
    Case("7b bfloat16", "llama-2-7b", "h100:8", train(8, precision="bfloat16"), {"fsdp": 8}),
    Case("7b float32", "llama-2-7b", "h100:8", train(8, 1024, precision="float32"), {"fsdp": 8}),
    Case("llama 3.1 8b fsdp", "llama-3.1-8b", "h100:8", train(16), {"fsdp": 8}),
    Case("llama 3.1 8b fsdp x tp, long", "llama-3.1-8b", "h100:8", train(4, 16384), {"fsdp": 2, "tp": 4}),
    Case("70b fsdp x tp", "llama-2-70b", "h100:8x8", train(64), {"fsdp": 8, "tp": 8}),
    Case("70b fsdp", "llama-2-70b", "h100:8x8", train(64), {"fsdp": 64}),
    Case("70b fsdp x tp dots", "llama-2-70b", "h100:16x8", train(64),
         {"fsdp": 32, "tp": 4, "remat": "dots", "sequence_parallel": True}),
    Case("mixtral ep x fsdp", "mixtral-8x7b", "h200:2x8", train(16), {"fsdp": 2, "ep": 8}),
    Case("mixtral ep x fsdp x tp", "mixtral-8x7b", "h200:2x8", train(16, 2048), {"fsdp": 2, "ep": 4, "tp": 2}),
    Case("mixtral/4 ep dots", "mixtral-8x7b/4", "h100:8", train(8), {"ep": 4, "tp": 2, "remat": "dots"}),
    Case("mixtral/4 ep none", "mixtral-8x7b/4", "h100:8", train(8), {"ep": 8, "remat": "none"}),
    Case("qwen2.5 0.5b dp", "qwen2.5-0.5b", "h100:8", train(32), {"dp": 8, **DATA_PARALLEL}),
    Case("qwen2.5 1.5b zero-1", "qwen2.5-1.5b", "h100:8", train(16),
         {"fsdp": 8, "strategy": ShardingStrategy.OPTIMIZER}),
    Case("qwen2.5 1.5b zero-2", "qwen2.5-1.5b", "h100:8", train(16),
         {"fsdp": 8, "strategy": ShardingStrategy.SHARD_GRAD_OP}),
    Case("qwen2.5 0.5b alone", "qwen2.5-0.5b", "a100-80:1", train(4, 2048), {}),
    Case("gemma 2 2b fsdp", "gemma-2-2b", "h100:8", train(16), {"fsdp": 8}),
    Case("falcon 7b fsdp", "falcon-7b", "a100-80:8", train(32, 2048), {"fsdp": 8}),
    Case("mistral fsdp, long", "mistral-7b-v0.1", "h100:8", train(8, 8192), {"fsdp": 8}),
    Case("7b serve tp", "llama-2-7b", "h100:8", serve(64, 4096, 1024), {"tp": 8}),
    Case("70b serve tp", "llama-2-70b", "h100:8", serve(32, 4096, 512), {"tp": 8}),
    Case("llama 3.1 8b serve fsdp", "llama-3.1-8b", "h100:8", serve(64, 4096, 1024), {"fsdp": 8}),
    Case("mixtral serve ep x tp", "mixtral-8x7b", "h100:8", serve(16, 4096, 1024), {"ep": 4, "tp": 2}),
    Case("qwen2.5 1.5b serve dp", "qwen2.5-1.5b", "h100:8", serve(256, 2048, 1024), {"dp": 8, **DATA_PARALLEL}),
    Case("70b pp x tp", "llama-2-70b", "h100:8x8", train(32), {"pp": 8, "tp": 8, "microbatches": 32}),
    Case("7b pp x fsdp gpipe", "llama-2-7b", "h100:8", train(32),
         {"pp": 4, "fsdp": 2, "microbatches": 16, "schedule": "gpipe"}),
    Case("7b pp interleaved", "llama-2-7b", "h100:8", train(16),
         {"pp": 4, "tp": 2, "microbatches": 16, "schedule": "interleaved", "chunks": 2}),
    Case("7b pp zb-h1", "llama-2-7b", "h100:8", train(16, 2048),
         {"pp": 4, "tp": 2, "microbatches": 16, "schedule": "zb-h1"}),
    Case("7b pp dots", "llama-2-7b", "h100:8", train(32), {"pp": 2, "fsdp": 4, "microbatches": 8, "remat": "dots"}),
    Case("7b pp zb-v", "llama-2-7b", "h100:8", train(16, 2048),
         {"pp": 4, "tp": 2, "microbatches": 16, "schedule": "zb-v"}),
    Case("7b pp stage", "llama-2-7b", "h100:8", train(32),
         {"pp": 4, "fsdp": 2, "microbatches": 16, "remat": "stage"}),
    Case("llama 3.1 8b cp x fsdp, long", "llama-3.1-8b", "h100:8", train(4, 32768), {"fsdp": 2, "cp": 4}),
    Case("7b cp x fsdp dots", "llama-2-7b", "h100:8", train(8, 8192), {"fsdp": 4, "cp": 2, "remat": "dots"}),
    Case("7b cp x tp x fsdp", "llama-2-7b", "h100:8", train(4, 8192), {"fsdp": 2, "cp": 2, "tp": 2}),
    Case("7b optimizer offloaded", "llama-2-7b", "h100:8", train(16), {"fsdp": 8, "offload": ("optimizer",)}),
    Case("7b activations offloaded", "llama-2-7b", "h100:8", train(16), {"fsdp": 8, "offload": ("activations",)}),
    # Predicted before they were compiled, and nothing fitted to them.
    Case("falcon 40b fsdp x tp", "falcon-40b", "h100:4x8", train(32, 2048), {"fsdp": 8, "tp": 4}),
    Case("gemma 3 4b fsdp", "gemma-3-4b-pt", "h100:8", train(16, 2048), {"fsdp": 8}),
    Case("llama 3.2 3b dp x fsdp x tp dots", "llama-3.2-3b", "h100:2x8", train(32, 2048),
         {"dp": 2, "fsdp": 4, "tp": 2, "remat": "dots"}),
    Case("qwen3 8b fsdp x tp, microbatches", "qwen3-8b", "h200:8", train(16), {"fsdp": 4, "tp": 2, "microbatches": 2}),
    Case("qwen3 30b a3b ep x fsdp", "qwen3-30b-a3b", "h200:2x8", train(16, 1024), {"fsdp": 2, "ep": 8}),
    Case("13b fsdp none, sequence parallel", "llama-2-13b", "h100:2x8", train(16, 2048),
         {"fsdp": 8, "tp": 2, "remat": "none", "sequence_parallel": True}),
    Case("llama 3.1 70b serve tp, long", "llama-3.1-70b", "h200:8", serve(4, 32768, 2048), {"tp": 8}),
    Case("qwen2.5 7b serve fsdp x tp", "qwen2.5-7b", "h100:8", serve(32, 4096, 512), {"fsdp": 4, "tp": 2}),
    Case("mistral serve tp, window", "mistral-7b-v0.1", "h100:8", serve(8, 16384, 1024), {"tp": 8}),
    Case("gemma 3 4b serve tp, read at once", "gemma-3-4b-pt", "h100:4", serve(1, 9216, 1024), {"tp": 4}),
    Case("llama 3.1 8b serve cp, long", "llama-3.1-8b", "h100:8", serve(1, 131072, 512), {"cp": 8}),
    Case("multi-query serve tp", "multi-query", "h100:8", serve(16, 640, 128), {"tp": 8}),
    Case("70b fsdp x tp, more than fits", "llama-2-70b", "h100:8x8", train(128), {"fsdp": 8, "tp": 8}),
    Case("13b serve, more than fits", "llama-2-13b", "a100-40:1", serve(16, 4096, 1024), {}),
    # The CPU.
    Case("tiny cpu fsdp", "tiny", "cpu:8", train(64, 512), {"fsdp": 8}),
    Case("tiny cpu float32 tp", "tiny", "cpu:4", train(8, 512, precision="float32"), {"tp": 4}),
    Case("tiny cpu alone", "tiny", "cpu:1", train(8, 512, precision="float32"), {}),
    Case("qwen2.5 0.5b cpu fsdp x tp", "qwen2.5-0.5b", "cpu:4", train(8, 1024), {"fsdp": 2, "tp": 2}),
    Case("qwen2.5 0.5b cpu dp dots", "qwen2.5-0.5b", "cpu:4", train(8, 512),
         {"dp": 4, "remat": "dots", **DATA_PARALLEL}),
    Case("gemma 2 2b cpu fsdp", "gemma-2-2b", "cpu:8", train(8, 1024), {"fsdp": 8}),
    Case("mixtral/2 cpu ep", "mixtral-8x7b/2", "cpu:8", train(8, 512), {"ep": 8}),
    Case("qwen2.5 0.5b cpu serve", "qwen2.5-0.5b", "cpu:4", serve(16, 1024, 256), {"tp": 2, "dp": 2}),
    # TPU.
    Case("7b tpu fsdp", "llama-2-7b", "v5p:2x2x2", train(16), {"fsdp": 8}),
    Case("7b tpu fsdp dots", "llama-2-7b", "v5p:2x2x2", train(8), {"fsdp": 8, "remat": "dots"}),
    Case("7b tpu tp", "llama-2-7b", "v5p:2x2x2", train(4), {"tp": 8}),
    Case("7b tpu fsdp x tp, sequence parallel", "llama-2-7b", "v5p:2x2x2", train(16),
         {"fsdp": 4, "tp": 2, "sequence_parallel": True}),
    Case("llama 3.1 8b tpu fsdp", "llama-3.1-8b", "v6e:4x4", train(16), {"fsdp": 16}),
    Case("70b tpu fsdp x tp", "llama-2-70b", "v5p:4x4x4", train(64), {"fsdp": 16, "tp": 4}),
    Case("mixtral tpu ep x fsdp", "mixtral-8x7b", "v5p:2x2x4", train(16), {"fsdp": 2, "ep": 8}),
    Case("qwen2.5 0.5b tpu dp", "qwen2.5-0.5b", "v5e:2x4", train(16, 2048), {"dp": 8, **DATA_PARALLEL}),
    Case("qwen2.5 0.5b tpu fsdp", "qwen2.5-0.5b", "v5e:4x4", train(16, 2048), {"fsdp": 16}),
    Case("gemma 2 2b tpu fsdp", "gemma-2-2b", "v6e:2x4", train(8), {"fsdp": 8}),
    Case("7b tpu microbatches", "llama-2-7b", "v5p:2x2x2", train(32), {"fsdp": 8, "microbatches": 4}),
    Case("7b tpu serve tp", "llama-2-7b", "v5p:2x2x2", serve(32, 4096, 1024), {"tp": 8}),
    Case("llama 3.1 8b tpu serve fsdp", "llama-3.1-8b", "v6e:2x4", serve(64, 4096, 1024), {"fsdp": 8}),
    Case("mistral tpu serve tp, window", "mistral-7b-v0.1", "v5e:2x4", serve(8, 16384, 1024), {"tp": 8}),
)  # fmt: skip


CASE = {case.name: case for case in CASES}


def compile_case(case: Case) -> Compiled:
    """Ask the target's compiler."""
    found = verify(*case.inputs(), timeout=1800)
    program = found.compiled
    bytes_of = {kind: program.bytes[kind] for kind in ("argument", "output", "alias", "temp", "peak")}
    return Compiled(case.name, found.compiler, importlib.metadata.version("jax"), program.name, **bytes_of)


def kept(file: Path = FILE) -> dict[str, Compiled]:
    """The compiled figures in a file, by the names of their cases."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    kinds = Compiled.__annotations__
    return {row["name"]: Compiled(**{name: kinds[name](value) for name, value in row.items()}) for row in rows}


def keep(found: Mapping[str, Compiled], file: Path = FILE) -> None:
    """Writes compiled figures, in the order of the cases."""
    with file.open("w", newline="") as lines:
        lines.write("# Bytes per device, as the compilers say: python -m benchmarks.planner_memory --compile\n")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(Compiled._fields)
        writer.writerows(found[case.name] for case in CASES if case.name in found)


def error(case: Case, compiled: Compiled) -> float:
    return case.predicted().total / compiled.total - 1


def table(cases: Sequence[Case], found: Mapping[str, Compiled]) -> Table:
    """Each case with its prediction, what was compiled, and the error."""
    result = Table(title="Bytes per device, predicted and compiled", title_justify="left")
    for heading in ("case", "on"):
        result.add_column(heading)
    for heading in ("predicted GiB", "compiled GiB", "error", "arguments", "at its most"):
        result.add_column(heading, justify="right")
    for case in cases:
        compiled, predicted = found[case.name], case.predicted()
        result.add_row(
            case.name,
            case.cluster,
            f"{predicted.total / GiB:.2f}",
            f"{compiled.total / GiB:.2f}",
            f"{error(case, compiled):+.1%}",
            f"{compiled.argument / GiB:.2f}",
            predicted.moment if compiled.program == "step" else f"{predicted.moment} ({compiled.program})",
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--compile", nargs="*", metavar="NAME", help="compile what is missing, or these cases")
    given = parser.parse_args(arguments)
    console, found = Console(), kept()
    if given.compile is not None:
        unknown = set(given.compile) - set(CASE)
        if unknown:
            parser.error(f"no such cases: {sorted(unknown)}")
        for case in CASES:
            if case.name in given.compile or (not given.compile and case.name not in found):
                found[case.name] = compile_case(case)
                keep(found)
                console.print(f"{case.name}: {found[case.name].total / GiB:.2f} GiB")
    cases = [case for case in CASES if case.name in found]
    console.print(table(cases, found))
    errors = {case.name: error(case, found[case.name]) for case in cases}
    if errors:
        worst = max(errors, key=lambda name: abs(errors[name]))
        mean = sum(map(abs, errors.values())) / len(errors)
        console.print(f"{len(errors)} cases: mean absolute error {mean:.1%}, worst {errors[worst]:+.1%} ({worst}).")


if __name__ == "__main__":
    main()
