"""What the step is predicted to send: by hand, and beside what compilers make of it."""

from collections import defaultdict

import pytest

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner import hlo, liveness, traffic
from tbjax.planner.compilers import installed
from tbjax.planner.moments import Reading
from tbjax.planner.verify import verify
from tbjax.planner.workload import Layout, Workload

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    embed=256,
    mlp=512,
    heads=8,
    kv_heads=4,
    head_dim=64,
    layer_kinds=(LayerKind(),) * 4,
    max_positions=4096,
)
WORKLOAD = Workload(global_batch=16, seq_len=128)
LAYER = 2 * (8 + 4) * 64 * 256 + 3 * 256 * 512  # elements of a layer's matrices
TABLE = 1024 * 256

needs_cuda = pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
needs_tpu = pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed: tbjax[verify]")


def predicted(workload: Workload = WORKLOAD, **layout) -> dict[tuple[str, str], tuple[int, int]]:
    """Runs and bytes by kind and axes."""
    found = traffic.collectives(CONFIG, workload, Layout(**layout))
    return {(each.kind, "*".join(each.axes)): (each.count, each.bytes) for each in found}


def test_one_device_says_nothing():
    assert predicted() == {}


def test_weights_are_gathered_twice_and_their_gradients_scattered():
    found = predicted(fsdp=8)
    norms = 2 * 4 * 256 * 2  # two of each layer, which are whole but small
    assert found["all-gather", "fsdp"][1] == pytest.approx(2 * (2 * 4 * LAYER + 2 * TABLE), abs=2 * norms)
    assert found["reduce-scatter", "fsdp"][1] == pytest.approx(2 * (4 * LAYER + TABLE), abs=norms)
    assert found["all-reduce", "fsdp"] == (1, 4 * TABLE)  # the lookup's gradient, in float32


def test_a_layer_reduces_its_tokens_over_tp_five_times():
    stream = 4 * 128 * 256 * 2
    assert predicted(dp=4, tp=2)["all-reduce", "tp"] == (5 * 4 + 2, (5 * 4 + 2) * stream)
    assert predicted(dp=4, tp=2, remat="none")["all-reduce", "tp"][0] == 4 * 4 + 2


def test_what_is_reduced_or_gathered_and_scattered_is_sent_alike():
    for axes in ({"tp": 8}, {"tp": 2, "dp": 4}):
        sent: dict[bool, int] = defaultdict(int)
        for parallel in (False, True):
            for each in traffic.collectives(CONFIG, WORKLOAD, Layout(**axes, sequence_parallel=parallel)):
                sent[parallel] += each.sent if "tp" in each.axes else 0
        # The gathers of what the backward pass needs again, and the table that comes to the tokens, are on top.
        assert sent[False] < sent[True] < 2 * sent[False]


def test_microbatches_gather_weights_each_and_a_pipeline_sends_in_every_tick():
    whole, parts = predicted(fsdp=2), predicted(fsdp=2, microbatches=4)
    assert parts["all-gather", "fsdp"][1] == 4 * whole["all-gather", "fsdp"][1]
    piped = predicted(pp=4, fsdp=2, microbatches=8)
    ticks = 2 * 8 + 2 * (4 - 1)
    assert piped["collective-permute", "pp"] == (2 * ticks, 2 * ticks * 128 * 256 * 2)


def test_stages_read_prompts_into_the_cache_that_lasts():
    serving = Workload(task="inference", global_batch=1, seq_len=8192, new_tokens=4096)
    alone, staged = (traffic.met(CONFIG, serving, LayerKind(), 1, serving.prompt_len, pp) for pp in (1, 2))
    assert (alone, staged) == (4096, 8192)
    # What memory is planned for.
    for keys, layout in ((alone, Layout(tp=2)), (staged, Layout(pp=2))):
        kind = liveness.layers(CONFIG, layout.tp, layout.ep, layout.sequence_parallel)[0]
        assert Reading.make(CONFIG, serving, layout).slots(kind) == keys


def test_parameters_that_are_updated_in_parts_are_brought_together():
    found = predicted(fsdp=8, strategy="OPTIMIZER")
    assert found["all-gather", "fsdp"][1] == pytest.approx(4 * (4 * LAYER + 2 * TABLE), rel=0.01)


def compared(spec: str, layout: Layout, workload: Workload = WORKLOAD) -> dict[tuple[str, ...], tuple[int, int]]:
    """Bytes that a device sends along each axis, predicted and compiled, where they are more than a hundredth."""
    verification = verify(CONFIG, workload, layout, spec)
    said, found = hlo.sent(verification.predicted), verification.sent
    return {
        axes: (said[axes], found[axes]) for axes in said | found if 100 * max(said[axes], found[axes]) > found.total()
    }


def close(found: dict[tuple[str, ...], tuple[int, int]], within: float) -> None:
    assert found
    for axes, (said, compiled) in found.items():
        assert said == pytest.approx(compiled, rel=within), axes


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(fsdp=4, tp=2),
        Layout(dp=4, tp=2, strategy="NO_SHARD", sequence_parallel=True),
        Layout(dp=2, fsdp=4, microbatches=2),
        Layout(pp=2, fsdp=4, microbatches=4),
    ],
    ids=str,
)
def test_the_compiler_for_nvidia_sends_along_each_axis_what_was_predicted(layout):
    close(compared("h100:8", layout), 0.06)


@needs_tpu
@pytest.mark.slow
def test_the_compiler_for_tpu_sends_along_each_axis_what_was_predicted():
    # Gradients of small matrices it reduces whole, which in a model as small as this one is a tenth of what fsdp sends.
    close(compared("v5p:2x2x2", Layout(fsdp=4, tp=2)), 0.15)
