"""Plans to show, of every kind that looks different: made of real prices, without a search."""

import dataclasses

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner.cost import step_time
from tbjax.planner.hardware import cluster
from tbjax.planner.hlo import Collective
from tbjax.planner.legal import Rejection
from tbjax.planner.memory import memory
from tbjax.planner.plan import Plan
from tbjax.planner.search import Candidate
from tbjax.planner.verify import Program, Verification
from tbjax.planner.workload import Layout, Workload


def llama(layers: int = 80) -> ModelConfig:
    """Llama 2 70B, or so many layers of it."""
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        embed=8192,
        mlp=28672,
        heads=64,
        kv_heads=8,
        head_dim=128,
        layer_kinds=(LayerKind(),) * layers,
        max_positions=4096,
    )


TRAINING = Workload(global_batch=512, seq_len=4096)
LARGE_BATCH = Workload(global_batch=8192, seq_len=4096)
SERVING = Workload(task="inference", global_batch=64, seq_len=4096, new_tokens=512, precision="bfloat16")

# A reason that would break a page that does not escape it.
REJECTED = (
    Rejection(reason="tp=16 crosses the domain of 8 GPUs", count=1234, example={"tp": 16, "fsdp": 4}),
    Rejection(reason="8 KV heads < tp 16 & <b>replicated</b>", count=12, example={"tp": 16}),
)


def make(
    spec: str, layout: Layout, workload: Workload = TRAINING, layers: int = 80, model: str = "llama-2-70b"
) -> Plan:
    """A plan with that layout, and with runners-up that differ from it in what goes with the mesh."""
    config, where = llama(layers), cluster(spec)
    remats = ("none", "dots", "full")
    candidates = tuple(
        Candidate(
            layout=other,
            memory=memory(config, workload, other, where.hardware),
            time=step_time(config, workload, other, where),
        )
        for other in (dataclasses.replace(layout, remat=remat) for remat in remats if workload.training)
        if other != layout
    )
    held = memory(config, workload, layout, where.hardware)
    missing = max(held.total - where.hardware.usable, 0)
    return Plan(
        model=model,
        config=config,
        workload=workload,
        cluster=where,
        layout=layout,
        memory=held,
        time=step_time(config, workload, layout, where),
        fits=not missing,
        missing=missing,
        smallest=cluster("h100:4x8") if missing else None,
        candidates=candidates,
        rejected=REJECTED,
    )


PLANS = {
    "one node": lambda: make("h100:8", Layout(fsdp=8, microbatches=16), layers=8),
    "64 GPUs": lambda: make("h100:8x8", Layout(fsdp=8, tp=8, microbatches=16)),
    "16384 GPUs": lambda: make(
        "h100:2048x8",
        Layout(pp=16, dp=2, fsdp=64, tp=8, microbatches=64, schedule="interleaved", chunks=5),
        LARGE_BATCH,
    ),
    "NVL72": lambda: make("gb200:36x4", Layout(dp=18, tp=8, microbatches=2), Workload(global_batch=576, seq_len=4096)),
    "v5p": lambda: make("v5p:4x4x4", Layout(fsdp=16, tp=4, microbatches=8)),
    "two slices": lambda: make("v5p:2*8x8x16", Layout(dp=2, fsdp=256, tp=4)),
    "v5e": lambda: make("v5e:16x16", Layout(fsdp=32, tp=8, microbatches=16)),
    "tpu7x": lambda: make("tpu7x:4x4x4", Layout(fsdp=64, tp=2)),
    "cpu": lambda: make("cpu:8", Layout(pp=2, fsdp=2, tp=2, microbatches=4, schedule="zb-h1"), layers=2),
    "one device": lambda: make("h100:1", Layout(microbatches=512), layers=1),
    "does not fit": lambda: make("h100:8", Layout(fsdp=4, tp=2, microbatches=32)),
    "serving": lambda: make("h100:8", Layout(dp=2, tp=4, remat="none"), SERVING),
    "strange name": lambda: make("h100:8", Layout(tp=8), layers=2, model='<script>alert("& more")</script>'),
}


def verification(plan: Plan) -> Verification:
    """A verdict such as a compiler gives: a tenth above the prediction, with collectives."""
    lasting = sum(plan.memory.parts.get(part, 0) for part in ("parameters", "optimizer", "KV cache"))
    sizes = {"argument": lasting, "output": lasting, "alias": lasting, "generated_code": 0, "host": 0, "peak": 0}
    program = Program(
        name="step",
        bytes=sizes | {"temp": int(1.1 * plan.memory.total) - lasting},
        collectives=(
            Collective(kind="all-gather", axes=("fsdp",), count=482, bytes=3 * 10**11, sent=25 * 10**10),
            Collective(kind="all-reduce", axes=("dp", "tp"), count=5120, bytes=7 * 10**12, sent=13 * 10**12),
            Collective(kind="collective-permute", axes=(), count=2, bytes=128, sent=128),
        ),
        cycles=12_345_678_901,
        unknown_loops=1,
        seconds=31.4,
    )
    return Verification(
        compiler="cuda",
        cluster=plan.cluster,
        programs=(program,),
        depths=(2, 4),
        predicted=(
            Collective(kind="all-gather", axes=("fsdp",), count=480, bytes=29 * 10**10, sent=24 * 10**10),
            Collective(kind="reduce-scatter", axes=("fsdp",), count=240, bytes=10**11, sent=9 * 10**10),
        ),
        predicted_seconds=12.3,
    )
