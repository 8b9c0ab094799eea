"""Measured training runs as the planner sees them: from a row of a CSV file to model, workload, layout and cluster.

What a file does not say is assumed here and nowhere else; each assumption stands beside the code that makes it.
"""

import csv
import dataclasses
import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.cost import Time, step_time
from tbjax.planner.hardware import Cluster, cluster, hardware
from tbjax.planner.stack import MEGATRON_2021, MEGATRON_2022, XLA, Stack
from tbjax.planner.work import training_flops
from tbjax.planner.workload import Layout, Remat, Workload
from tbjax.sharding import ShardingStrategy

DATA = Path(__file__).parent.parent / "tests" / "data"
ROWS = DATA / "vtrain_a100_single_node.csv", DATA / "vtrain_a100_multi_node.csv"
RUNS = (DATA / "measured_runs.csv",)

Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured run."""

    name: str
    config: ModelConfig
    workload: Workload
    layout: Layout
    cluster: Cluster
    stack: Stack
    measured: float  # seconds per step

    def predicted(self, stack: Stack | None = None) -> Time:
        return step_time(self.config, self.workload, self.layout, self.cluster, stack=stack or self.stack)

    def error(self, stack: Stack | None = None) -> float:
        """Relative; positive where the prediction is too long."""
        return self.predicted(stack).total / self.measured - 1


class Unknown(ValueError):
    """A row that does not say enough to be predicted."""


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def mean_absolute(cases: Iterable[Case], stack: Stack | None = None) -> float:
    """The mean absolute relative error of the predictions."""
    return statistics.fmean(abs(case.error(stack)) for case in cases)


def row_case(row: Row) -> Case:
    """A row of the vTrain authors' measurements: Megatron-DeepSpeed on nodes of eight A100-80GB.

    Assumed: every layer recomputed (`use_checkpoint` in their configurations), a vocabulary of 51,200, and plain data
    parallelism.
    """
    names = "hidden heads layers seq_len gpus tp dp pp micro_batch global_batch".split()
    hidden, heads, layers, sequence, gpus, tp, dp, pp, micro, batch = (int(float(row[name])) for name in names)
    if batch % (dp * micro):
        raise Unknown(f"global_batch={batch} does not divide into dp={dp} x micro_batch={micro}")
    return Case(
        name=f"{hidden}x{layers} tp={tp} dp={dp} pp={pp} microbatch={micro} batch={batch}",
        config=_model("GPT", layers, hidden, heads, heads, 4 * hidden, 51200),
        workload=_workload(batch, sequence),
        layout=Layout(
            pp=pp, dp=dp, tp=tp, strategy=ShardingStrategy.NO_SHARD, microbatches=batch // dp // micro, remat="full"
        ),
        cluster=_vtrain_cluster(gpus),
        stack=MEGATRON_2021,
        measured=float(row["step_ms"]) / 1e3,
    )


def run_case(row: Row) -> Case:
    """A published run. Raises `Unknown` where its shape or its batch is not given."""
    missing = [name for name in ("layers", "hidden", "heads", "seq_len", "global_batch") if not row[name]]
    if missing:
        raise Unknown(f"not given: {', '.join(missing)}")
    layers, hidden, heads, sequence, batch, devices = (
        int(row[name]) for name in ("layers", "hidden", "heads", "seq_len", "global_batch", "devices")
    )
    config = _model(
        row["model"],
        layers,
        hidden,
        heads,
        int(row["kv_heads"] or heads),
        int(row["mlp"] or 4 * hidden),
        int(row["vocab"] or 51200),
    )
    workload = _workload(batch, sequence)
    machine = _machine(row["hardware"], devices)
    stack = _stack_of(row["source"])
    seconds = _seconds(row, config, workload, machine)
    layouts = _layouts(row, config, workload)
    cases = [
        Case(f"{row['source']}: {row['model']}", config, workload, each, machine, stack, seconds) for each in layouts
    ]
    # Who published a run chose what was best: of the layouts that agree with the row, the fastest is meant.
    return min(cases, key=lambda case: case.predicted().total)


# Equal values are made once: prices are remembered by the identity of what they are for.


@functools.lru_cache
def _workload(batch: int, sequence: int) -> Workload:
    return Workload(global_batch=batch, seq_len=sequence)


@functools.lru_cache
def _vtrain_cluster(gpus: int) -> Cluster:
    """4 x 200 Gb/s of network for each node (`inter_node_bandwidth` in vTrain's configurations): half of a DGX A100."""
    record = dataclasses.replace(hardware("a100-80"), network_bandwidth=4 * 200e9 / 8 / 8)
    return Cluster(hardware=record, hosts=-(-gpus // 8), devices_per_host=min(gpus, 8))


@functools.lru_cache
def _model(name: str, layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> ModelConfig:
    """A model of these sizes: with biases and a plain MLP if it is a GPT, otherwise like Llama."""
    gpt = name.startswith("GPT")
    return ModelConfig(
        family="gpt" if gpt else "llama",
        vocab_size=vocab,
        embed=hidden,
        mlp=mlp,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        layer_kinds=(LayerKind(),) * layers,
        max_positions=1 << 20,
        norm="layer" if gpt else "rms",
        gated_mlp=not gpt,
        qkv_bias=gpt,
        attention_out_bias=gpt,
        mlp_bias=gpt,
        tie_embeddings=gpt,
    )


def _stack_of(source: str) -> Stack:
    """The software, by who published: Korthikanti et al. are the first here whose gradients are summed in place."""
    if re.search(r"Narayanan|DeepSpeed", source):
        return MEGATRON_2021
    return MEGATRON_2022 if re.search(r"Korthikanti|Megatron", source) else XLA


def _remat(row: Row) -> Remat:
    """What is recomputed. "selective" keeps the results of products, as "dots" does.

    Where the row does not say: JAX-Toolbox runs MaxText with `remat_policy=minimal_flash`, which does as well;
    AXLearn's fuji recomputes its MLPs, which make up most of a layer; MaxText's own default is full.
    """
    if row["remat"] in ("selective", "none", "full"):
        return "dots" if row["remat"] == "selective" else row["remat"]
    return "dots" if "JAX-Toolbox" in row["source"] else "full"


def _layouts(row: Row, config: ModelConfig, workload: Workload) -> list[Layout]:
    """The layouts that agree with what a row says of its parallelism; what is left of the devices is dp.

    Megatron's microbatch and number of interleaved chunks are not given: powers of two, and up to three chunks.
    """
    text, devices = row["parallelism"], int(row["devices"])
    sizes = {axis: int(size) for axis, size in re.findall(r"\b(pp|dp|fsdp|ep|cp|tp)=(\d+)", text)}
    if re.search(r"\bfsdp\b(?!=)", text):
        sizes["fsdp"] = devices // math.prod(sizes.values())
    sizes.setdefault("dp", max(devices // math.prod(sizes.values()), 1))
    shards = sizes.get("fsdp", 1) > 1
    plain = Layout(
        pp=sizes.get("pp", 1),
        dp=sizes["dp"],
        fsdp=sizes.get("fsdp", 1),
        ep=sizes.get("ep", 1),
        cp=sizes.get("cp", 1),
        tp=sizes.get("tp", 1),
        strategy=ShardingStrategy.FULL_SHARD if shards else ShardingStrategy.NO_SHARD,
        sequence_parallel=bool(re.search(r"\bsp\b", text)),
        remat=_remat(row),
    )
    if plain.devices != devices:
        raise Unknown(f"parallelism {text!r} does not make {devices} devices")
    if _stack_of(row["source"]) is XLA:
        return [plain]
    rows, stage = workload.global_batch // plain.batch_ways, config.layers // plain.pp
    found = []
    for exponent, chunks in itertools.product(range(rows.bit_length()), (1, 2, 3) if plain.pp > 1 else (1,)):
        microbatches, rest = divmod(rows, 1 << exponent)
        if rest or stage % chunks or (chunks > 1 and microbatches % plain.pp):
            continue
        schedule = "interleaved" if chunks > 1 else "1f1b"
        found.append(dataclasses.replace(plain, microbatches=microbatches, schedule=schedule, chunks=chunks))
    return found


@functools.lru_cache
def _machine(text: str, devices: int) -> Cluster:
    """The cluster that a published name and count of devices stand for."""
    found = re.search(r"TPU (v\d\w*)|\b(GB200|[ABHLV]\d+\w*)( PCIe)?( 40)?", text)
    if not found:
        raise Unknown(f"hardware {text!r} is not in the catalogue")
    name = found[1] or f"{found[2]}{'-pcie' if found[3] else '-40' if found[4] else ''}"
    record = hardware(name)
    if record.torus:
        return cluster(f"{record.name}:{_slice(record.torus, devices)}")
    watts = re.search(r"(\d+)W\b", text)
    if watts and record.name == "h100":
        # At its power limit (700 W as sold) a GPU computes in proportion to it.
        share = int(watts[1]) / 700
        record = dataclasses.replace(record, flops={kind: rate * share for kind, rate in record.flops.items()})
    if "96GB" in text:
        # The H100s of Meta's Grand Teton: HBM2e of 2.4 TB/s (torchtitan benchmarks/llama3_h100_202412).
        record = dataclasses.replace(record, memory_bandwidth=2.4e12)
    host = record.devices_per_host
    return Cluster(hardware=record, hosts=-(-devices // host), devices_per_host=min(devices, host))


def _slice(dimensions: int, chips: int) -> str:
    """Slices of `chips` chips in the shape nearest to a cube, or planes of 16 x 16."""
    if dimensions == 2:
        slices, side = max(chips // 256, 1), math.isqrt(min(chips, 256))
        return f"{slices}*{side}x{min(chips, 256) // side}" if slices > 1 else f"{side}x{chips // side}"
    shapes = [
        (a, b, chips // (a * b))
        for a in range(1, chips + 1)
        for b in range(a, chips // a + 1)
        if chips % (a * b) == 0
        and chips // (a * b) >= b
        and (chips < 64 or a % 4 == b % 4 == chips // (a * b) % 4 == 0)
    ]
    return "x".join(map(str, min(shapes, key=max)))


def _seconds(row: Row, config: ModelConfig, workload: Workload, machine: Cluster) -> float:
    """Seconds per step, from whatever was published."""
    value, metric = float(row["value"]), row["metric"]
    causal = "causal attention" in row["notes"]
    if metric == "seconds/step":
        return value
    if metric == "tokens/s/device":
        return workload.tokens / machine.devices / value
    if metric == "TFLOP/s/device":
        recomputed = "recomputation" in row["notes"]
        return training_flops(config, workload, causal=causal, recomputed=recomputed) / machine.devices / value / 1e12
    if metric == "MFU":
        peak = machine.devices * machine.hardware.flops["bfloat16"]
        return training_flops(config, workload, causal=causal) / peak / value
    raise Unknown(f"metric {metric!r}")
