"""The compilers' verdicts: the CPU's always, the vendors' where they are installed."""

import dataclasses
import math
import os
from collections import Counter

import jax
import pytest

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.planner import compilers, hlo, traffic
from tbjax.planner import verify as verify_module
from tbjax.planner.catalogue import RECORDS
from tbjax.planner.compilers import compiler_for, environment, gpu_target, installed, requirements
from tbjax.planner.hardware import Hardware, cluster
from tbjax.planner.verify import CompilationError, OutOfMemory, verify
from tbjax.planner.workload import Layout, Workload

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    embed=256,
    mlp=512,
    heads=8,
    kv_heads=4,
    head_dim=64,
    layer_kinds=(LayerKind(),) * 6,
    max_positions=4096,
)
EXPERTS = dataclasses.replace(
    CONFIG, layer_kinds=(LayerKind(sparse=True),) * 2, moe=MoE(experts=4, experts_per_token=2, mlp=128)
)
TRAIN = Workload(global_batch=16, seq_len=128, precision="float32")
SERVE = Workload(task="inference", global_batch=8, seq_len=96, new_tokens=32, precision="float32")
MIXED = Layout(dp=2, fsdp=2, tp=2)

needs_tpu = pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed: tbjax[verify]")
needs_cuda = pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")


@pytest.fixture(scope="module")
def trained():
    return verify(CONFIG, TRAIN, MIXED, "cpu:8")


def test_the_arguments_of_a_step_are_the_state_and_the_batch(trained):
    attention = 2 * (8 + 4) * 64 * 256
    layer = attention + 3 * 256 * 512
    cut = 2 * 1024 * 256 + 6 * layer  # over fsdp and tp
    whole = (2 * 6 + 1) * 256  # the norms' scales
    state = 3 * 4 * (cut // 4 + whole) + 3 * 4  # parameters and AdamW's two; the counts of AdamW and of steps, ...
    batch = 2 * 4 * 16 * 128 // 4
    compiled = trained.compiled.bytes
    assert compiled["argument"] == pytest.approx(state + batch, abs=64)
    assert compiled["alias"] == pytest.approx(state, abs=64)
    assert compiled["temp"] > 4 * cut // 4  # the gradients at least
    kinds = trained.compiled.bytes
    assert trained.compiled.total == kinds["argument"] + kinds["output"] - kinds["alias"] + kinds["temp"]


def test_the_collectives_are_those_that_the_layout_implies(trained):
    found = {(c.kind, c.axes): c for c in trained.collectives}
    # Every layer sums 4 x 128 x 256 float32 activations over tp after attention and after the MLP, forwards and
    # backwards, and after attention once more where it is computed again.
    sums = found["all-reduce", ("tp",)]
    assert sums.count >= 5 * CONFIG.layers
    assert sums.bytes >= 5 * CONFIG.layers * 4 * 128 * 256 * 4
    # Seven matrices a layer are gathered forwards and backwards, a table and a head once.
    assert found["all-gather", ("fsdp",)].bytes >= 4 * 2 * 6 * (2 * (8 + 4) * 64 * 256 + 3 * 256 * 512) // 2
    assert trained.compiled.unknown_loops == 0


def test_each_axis_sends_what_was_predicted(trained):
    predicted, compiled = hlo.sent(trained.predicted), trained.sent
    large = [axes for axes in predicted | compiled if 100 * max(predicted[axes], compiled[axes]) > compiled.total()]
    assert set(large) >= {("dp",), ("fsdp",), ("tp",)}
    for axes in large:
        assert predicted[axes] == pytest.approx(compiled[axes], rel=0.05), axes


def test_two_depths_extrapolate_to_the_whole(trained):
    guessed = verify(CONFIG, TRAIN, MIXED, "cpu:8", depths=(2, 4))
    assert guessed.depths == (2, 4)
    assert trained.depths is None
    for kind in ("argument", "output", "alias"):
        assert guessed.compiled.bytes[kind] == trained.compiled.bytes[kind]
    assert guessed.compiled.total == pytest.approx(trained.compiled.total, rel=0.02)
    assert {(c.kind, c.axes, c.count) for c in guessed.collectives} == {
        (c.kind, c.axes, c.count) for c in trained.collectives
    }


def test_inference_compiles_both_its_programs():
    verification = verify(CONFIG, SERVE, MIXED, "cpu:8")
    prefill, decode = verification.programs
    assert (prefill.name, decode.name) == ("prefill", "decode")
    cache = 2 * 6 * (8 // 4) * 96 * (4 // 2) * 64 * 4  # keys and values: 2 of 8 rows and 2 of 4 heads a device
    assert decode.bytes["alias"] >= cache  # written in place
    assert decode.unknown_loops == 1  # until every row has ended
    assert verification.compile_seconds == prefill.seconds + decode.seconds


def test_experts_are_reduced_over_their_axis():
    verification = verify(EXPERTS, TRAIN, Layout(ep=2, fsdp=2, tp=2), "cpu:8")
    assert any("ep" in c.axes for c in verification.collectives)


def test_a_pipeline_passes_activations_from_stage_to_stage():
    layout = Layout(pp=2, fsdp=2, tp=2, microbatches=4)
    verification = verify(CONFIG, TRAIN, layout, "cpu:8")
    assert any((c.kind, c.axes) == ("collective-permute", ("pp",)) for c in verification.collectives)
    assert verification.compiled.unknown_loops == 0
    # Every gradient is cut once for each of the four microbatches.
    assert all(c.count % 4 == 0 for c in verification.collectives if c.kind == "reduce-scatter")


def test_the_callers_own_jax_is_as_it_was(trained):
    assert len(jax.devices()) == 8
    assert jax.devices()[0].platform == "cpu"
    assert "device_count=8" in os.environ["XLA_FLAGS"]


@pytest.fixture(scope="module")
def served_over_cp():
    return verify(CONFIG, SERVE, Layout(cp=2), "cpu:2").programs


def test_over_cp_each_device_holds_all_weights_and_its_part_of_the_cache(served_over_cp):
    _, decode = served_over_cp
    weights = 2 * 1024 * 256 + 6 * (2 * (8 + 4) * 64 * 256 + 3 * 256 * 512) + (2 * 6 + 1) * 256
    cache = 6 * 2 * SERVE.global_batch * 4 * 64 * SERVE.seq_len // 2
    # And of each row which tokens it has, and how far it is.
    assert decode.bytes["argument"] == pytest.approx(4 * (weights + cache), abs=1024)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_over_cp_attention_sends_what_was_predicted(served_over_cp, program):
    (found,) = (each for each in served_over_cp if each.name == program)
    tokens = SERVE.prompt_len if program == "prefill" else 1
    sent = {c.kind: c for c in found.collectives if c.axes == ("cp",)}
    predicted: Counter[str] = Counter()
    for message in traffic.joined(CONFIG, SERVE, SERVE.global_batch, tokens, tp=1, cp=2):
        predicted[message.kind] += round(CONFIG.layers * message.runs * message.size)
    assert set(predicted) == ({"all-reduce"} if program == "decode" else {"all-gather", "all-reduce"})
    for kind in predicted:
        assert sent[kind].bytes == pytest.approx(predicted[kind], rel=0.02), kind
    # In each layer the largest scores, the sums of weights and the values; and once how many tokens each row has.
    assert sent["all-reduce"].count == 3 * CONFIG.layers + 1


def test_what_does_not_fit_is_said_with_what_is_missing(trained):
    small = dataclasses.replace(trained.cluster.hardware, memory=trained.compiled.total - 1, reserved=0)
    short = dataclasses.replace(trained, cluster=dataclasses.replace(trained.cluster, hardware=small))
    assert trained.fits
    assert not short.fits
    assert short.margin == -1


def test_what_cannot_be_compiled_is_refused_before_or_by_the_process():
    with pytest.raises(ValueError, match="of 8 devices, cpu:4 has 4"):
        verify(CONFIG, TRAIN, MIXED, "cpu:4")
    with pytest.raises(ValueError, match="compiler='gcc' is unknown: tbjax knows 'auto', 'tpu', 'cuda', 'cpu'"):
        verify(CONFIG, TRAIN, MIXED, "cpu:8", "gcc")
    with pytest.raises(ValueError, match="compiler='tpu' does not compile for h100:8"):
        verify(CONFIG, TRAIN, MIXED, "h100:8", "tpu")
    with pytest.raises(ValueError, match=r"global_batch=6 does not divide"):
        verify(CONFIG, dataclasses.replace(TRAIN, global_batch=6), MIXED, "cpu:8")
    with pytest.raises(ValueError, match="depths has 9, but the model has 6 layers"):
        verify(CONFIG, TRAIN, MIXED, "cpu:8", depths=(2, 9))


def test_a_compilation_that_takes_too_long_is_ended():
    with pytest.raises(CompilationError, match=r"did not end within timeout=0\.1 s"):
        verify(CONFIG, TRAIN, MIXED, "cpu:8", timeout=0.1)


def test_a_compiler_that_dies_says_its_last_words(monkeypatch):
    monkeypatch.setattr(verify_module, "environment", lambda *_: {"PYTHONHOME": "/nowhere"})
    with pytest.raises(CompilationError, match="the 'cpu' compiler died"):
        verify(CONFIG, TRAIN, MIXED, "cpu:8")


def test_a_missing_compiler_names_what_to_install(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda compiler: compiler == "cpu")
    for spec in ("h100:8", "v5p:2x2x2"):
        with pytest.raises(ModuleNotFoundError, match=r"tbjax\[verify\]"):
            verify(CONFIG, TRAIN, MIXED, spec)


def test_what_is_to_be_installed_fits_the_jax_that_is_there():
    wanted = " ".join(requirements())
    for package in ("libtpu==", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12", "nvidia-cuda-nvcc-cu12"):
        assert package in wanted
    assert jax.__version__ in wanted
    assert "jaxlib" not in wanted


def test_each_vendor_has_its_compiler_and_the_cpu_stands_in():
    assert [compiler_for(cluster(spec)) for spec in ("h100:8", "v5p:2x2x2", "cpu:8")] == ["cuda", "tpu", "cpu"]
    assert compiler_for(cluster("h100:8"), "cpu") == "cpu"


def test_the_process_hears_nothing_of_the_callers_settings(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    inside = environment("cuda", 8)
    assert inside["JAX_PLATFORMS"] == "cpu"
    assert inside["XLA_FLAGS"] == ""
    assert "JAX_ENABLE_X64" not in inside
    assert "=512" in environment("cpu", 512)["XLA_FLAGS"]


@pytest.mark.parametrize("record", [r for r in RECORDS.values() if r.vendor == "nvidia"], ids=lambda r: r.name)
def test_a_target_says_what_xla_asks_of_a_gpu(record: Hardware):
    text = gpu_target(cluster(record.name))
    assert text.count("{") == text.count("}")
    assert f"device_memory_size: {record.memory}" in text
    for field in ("core_count", "clock_rate_ghz", "shared_memory_per_block_optin", "cuda_compute_capability"):
        assert field in text


def test_a_gpu_that_is_not_described_is_refused():
    bare = dataclasses.replace(cluster("h100:8").hardware, name="mine", target={})
    with pytest.raises(ValueError, match="'mine' does not say what XLA must know"):
        gpu_target(dataclasses.replace(cluster("h100:8"), hardware=bare))


@needs_cuda
@pytest.mark.parametrize("spec", ["h100:8", "a100-80gb:2x4", "b200:8"])
def test_the_compiler_for_nvidia_compiles_a_step(spec):
    workload = Workload(global_batch=16, seq_len=2048)
    verification = verify(CONFIG, workload, MIXED, spec)
    assert verification.compiler == "cuda"
    # cuDNN's attention: nowhere do all scores of a layer stand.
    scores = 4 * 4 * 4 * 2048 * 2048
    assert verification.compiled.bytes["temp"] < scores
    axes = {c.axes for c in verification.collectives}
    assert {("tp",), ("fsdp",)} <= axes
    assert verification.cycles == 0


@needs_cuda
def test_the_compiler_for_nvidia_compiles_inference():
    names = [p.name for p in verify(CONFIG, dataclasses.replace(SERVE, precision="mixed"), MIXED, "h100:8").programs]
    assert names == ["prefill", "decode"]


@needs_tpu
def test_the_compiler_for_tpu_compiles_a_step_and_counts_its_cycles():
    workload = Workload(global_batch=16, seq_len=128)
    verification = verify(dataclasses.replace(CONFIG, layer_kinds=CONFIG.layer_kinds[:2]), workload, MIXED, "v5p:2x2x2")
    assert verification.compiler == "tpu"
    assert verification.cycles > 0
    assert math.prod(cluster("v5p:2x2x2").topology) == 8
    assert verification.fits


@needs_tpu
@pytest.mark.slow
def test_the_compiler_for_tpu_compiles_inference():
    names = [p.name for p in verify(CONFIG, dataclasses.replace(SERVE, precision="mixed"), MIXED, "v5e:2x4").programs]
    assert names == ["prefill", "decode"]


@needs_tpu
@pytest.mark.slow
def test_what_the_compiler_for_tpu_refuses_does_not_fit_and_is_measured_at_two_depths():
    # 64 rows of 2048 x 1024 bfloat16 are kept for each layer: 20 GiB in all, on a device of 16.
    config = dataclasses.replace(CONFIG, embed=1024, layer_kinds=CONFIG.layer_kinds[:1] * 80)
    verification = verify(config, Workload(global_batch=512, seq_len=2048), Layout(fsdp=8), "v5e:2x4")
    assert not verification.fits
    assert "memory" in verification.refusal
    assert verification.depths == (1, 2)
    assert verification.compiled.bytes["temp"] >= 80 * 64 * 2048 * 1024 * 2
    with pytest.raises(OutOfMemory, match="memory"):
        verify(
            dataclasses.replace(config, layer_kinds=config.layer_kinds[:2], embed=16_384),
            Workload(global_batch=1024, seq_len=2048),
            Layout(fsdp=8),
            "v5e:2x4",
        )
