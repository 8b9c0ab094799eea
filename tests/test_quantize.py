"""Quantised weights: the same on every mesh, in as few bytes as arithmetic says, and never a model in full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from typer.testing import CliRunner

import interop
import tbjax
from interop.convert import app
from interop.load import load_parameters
from interop.readers.base import CheckpointError
from interop.readers.memory import MemoryCheckpoint
from tbjax import compat
from tbjax.api import abstract
from tbjax.config import LayerKind, ModelConfig
from tbjax.placement import bytes_held, placements
from tbjax.planner.compilers import installed
from tbjax.planner.parameters import bytes_per_device
from tbjax.planner.verify import verify
from tbjax.planner.workload import Layout, Workload
from tbjax.quantize import RULES, Encoding, convert, numbers, recipe
from tbjax.quantize.rules import HEAD, PROJECTIONS
from tbjax.sharding import by_path
from tests import tiny

ROOT = Path(__file__).parent.parent
LLAMA, MIXTRAL = tiny.BY_NAME["llama"], tiny.BY_NAME["mixtral"]

# Groups of 16 divide the 48 inputs of the tiny models' widest layer, and eight devices cut it through them.
INT8 = {PROJECTIONS: "int8:16", HEAD: "int8:16"}
INT4 = {PROJECTIONS: "int4:16", HEAD: "int8:16"}
CHANNELS = {PROJECTIONS: "int8:channel", HEAD: "int8:channel"}
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]


def load(case, mesh, quantization, tensors=None, **options):
    config = tiny.our_config(case)
    model = abstract(config, mesh, quantization=quantization)
    checkpoint = MemoryCheckpoint(tiny.tensors(case) if tensors is None else tensors)
    return load_parameters(model, config, case.family, checkpoint, **options)


def one_device():
    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("dp", "fsdp", "tp"))


def arrays(model):
    return {path: np.asarray(array).astype(np.float32) for path, array in by_path(model).items()}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, tiny.VOCABULARY, (8, 16))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_eight_bits_of_a_channel_are_qwix_own():
    weight = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    scale, offset = numbers.frames(np, weight, Encoding("int8", None))
    ours = numbers.integers(np, weight, scale, offset, Encoding("int8", None))
    theirs = qwix.quantize(jnp.asarray(weight), jnp.int8, channelwise_axes=(0,))
    assert offset is None
    # The largest magnitude lies between two integers, and we take the one that there is on both sides of zero.
    np.testing.assert_array_equal(ours, np.maximum(np.asarray(theirs.qvalue), -127))
    np.testing.assert_allclose(scale, np.asarray(theirs.scale), rtol=2e-7)


@pytest.mark.parametrize("text", ["int8:16", "int4:16", "int4"])
def test_a_group_is_within_half_a_step_and_uses_every_integer(text):
    encoding = Encoding.parse(text)
    weight = 3 + np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    scale, offset = numbers.frames(np, weight, encoding)
    found = numbers.integers(np, weight, scale, offset, encoding)
    parts = found.reshape(5, -1, encoding.group)
    steps = np.abs(parts * scale[..., None] + offset[..., None] - weight.reshape(parts.shape)) / scale[..., None]
    # A step of the outermost integers is lost at most to what bfloat16 rounds off scale and offset.
    assert steps.max() <= 0.5 + 2 ** (encoding.bits - 1) / 256 + 3 / (256 * scale.min())
    assert parts.max() <= 2 ** (encoding.bits - 1) - 1
    assert np.ptp(parts.astype(int), axis=-1).min() >= 2**encoding.bits - 2


def test_numbers_that_are_all_the_same_stay_what_they_are():
    for encoding in (Encoding("int8", 16), Encoding("int4", 16), Encoding("int8", None)):
        weight = np.zeros((2, 32), np.float32)
        scale, offset = numbers.frames(np, weight, encoding)
        assert not numbers.integers(np, weight, scale, offset, encoding).any()
        assert not scale.any()


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "rules", "meshes"),
    [
        (LLAMA, INT4, [*MESHES, {"pp": 2, "fsdp": 2, "tp": 2}]),
        (MIXTRAL, CHANNELS, [(2, 2, 2), {"ep": 4, "tp": 2}]),
        (MIXTRAL, INT8, [(1, 1, 8), {"ep": 2, "fsdp": 4}]),
    ],
    ids=["llama-int4", "mixtral-channels", "mixtral-int8"],
)
def test_every_mesh_has_the_same_weights_bit_for_bit_and_the_same_logits(case, rules, meshes, tokens):
    reference = load(case, one_device(), rules)
    weights, logits = arrays(reference), np.asarray(reference(tokens))
    full = reference.dequantized()
    assert not convert.weights(full)
    np.testing.assert_allclose(np.asarray(full(tokens)), logits, atol=1e-5 * np.abs(logits).max())
    for mesh in meshes:
        model = load(case, mesh, rules)
        for path, array in arrays(model).items():
            np.testing.assert_array_equal(array, weights[path], err_msg=f"{path} on {mesh}")
        wanted = abstract(tiny.our_config(case), mesh, quantization=rules)
        assert jax.tree.structure(wanted) == jax.tree.structure(model)
        rows = list(placements(wanted))
        assert set(bytes_held(model).values()) == {sum(row.nbytes_per_device for row in rows)}
        difference = np.abs(np.asarray(model(tokens)) - logits).max()
        assert difference <= 1e-5 * np.abs(logits).max(), mesh


def test_the_shards_have_the_bytes_that_arithmetic_says():
    model = load(LLAMA, (1, 4, 2), INT4)
    held = {row.path: row for row in placements(model)}
    up = "stacks.0.0.mlp.up.weight"  # [2, 48, 32], cut over tp and fsdp
    assert held[f"{up}.values"].nbytes_per_device == 2 * 48 * 32 // 2 // 8
    # Two groups do not go into four parts: every device along fsdp has both.
    assert held[f"{up}.scale"].nbytes_per_device == held[f"{up}.offset"].nbytes_per_device == 2 * 48 * 2 * 2 // 2
    assert held["head.weight.values"].nbytes_per_device == 128 * 32 // 8
    assert held["embedding.weight"].dtype == "float32"
    assert str(by_path(model)[f"{up}.values"].dtype) == "int4"


def test_what_is_loaded_is_what_the_whole_weights_quantise_to():
    loaded, full = load(LLAMA, (1, 4, 2), INT4), load(LLAMA, (1, 4, 2), None)
    made = arrays(convert.quantized(full, recipe(INT4), full.sharding))
    for path, array in arrays(loaded).items():
        np.testing.assert_array_equal(array, made[path], err_msg=path)


def test_on_their_devices_piece_by_piece_they_are_the_same():
    loaded, staged = (arrays(load(MIXTRAL, (1, 4, 2), CHANNELS, staged=staged)) for staged in (False, True))
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, staged[path], err_msg=path)


def test_numbers_that_are_not_finite_are_named():
    tensors = dict(tiny.tensors(LLAMA))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = np.where(np.arange(48)[:, None] == 3, np.inf, tensors[name]).astype(np.float32)
    with pytest.raises(CheckpointError, match=f"{name}' has values that are no finite numbers"):
        load(LLAMA, (1, 4, 2), INT8, tensors)


MEMORY = """
import gc, json, sys
import jax
from benchmarks.memory import AnonymousMemory
import tbjax
from tbjax.placement import bytes_held

folder, budget, quantization = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def load():
    model = tbjax.load(folder, {"tp": 2}, quantization=quantization, budget=budget, progress=False)
    return jax.block_until_ready(model)

load()  # what JAX itself takes for compiling is left out by loading twice
gc.collect()
with AnonymousMemory() as memory:
    model = load()
print(json.dumps({"held": sum(bytes_held(model).values()), "peak": memory.peak - memory.before}))
"""

# 100 MB of bfloat16, most of it in the layers.
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_model_in_full_is_never_in_memory(quantization, tmp_path):
    from benchmarks.checkpoints import synthetic

    budget = 16 << 20
    synthetic(tmp_path / "model", SMALL)
    environment = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), str(budget), quantization]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    layers, table = 3 * (1024 * (2 * 1024 + 2 * 512) + 3 * 1024 * 4096), 2048 * 1024
    bits = {"int8": 9, "int4": 5}[quantization]
    # The embedding is in full; the head has 8 bits and a ninth for its groups, and so have the projections to values.
    values = 3 * 1024 * 512
    assert result["held"] == pytest.approx((bits * (layers - values) + 9 * values + (16 + 9) * table) / 8, rel=1e-3)
    # The backend of the virtual devices keeps an int4 in a byte of its own, which no accelerator does.
    held = result["held"] + (0 if bits == 9 else (layers - values) / 2)
    assert result["peak"] <= held + budget, result
    assert result["peak"] < 2 * (layers + 2 * table)


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_rules_are_tried_in_order_and_none_keeps_a_weight():
    found = recipe([(r"\.output\.", None), (r"\.mlp\.", "int4:64"), *RULES["int8"].items()])
    assert found.encoding("stacks.0.0.attention.output.weight") is None
    assert str(found.encoding("stacks.0.0.mlp.up.weight")) == "int4:64"
    assert str(found.encoding("stacks.0.0.attention.key.weight")) == str(recipe("int8").encoding("stacks.0.0.mlp.up"))
    assert recipe(found.plain()) == found
    assert recipe(recipe("int4").plain()) == recipe("int4")
    assert recipe(None) is None


def test_routers_norms_biases_and_tables_are_kept():
    for case in (MIXTRAL, tiny.BY_NAME["llama-biases"], tiny.BY_NAME["qwen3"], tiny.BY_NAME["llama-tied"]):
        model = abstract(tiny.our_config(case), one_device(), quantization=INT4)
        found = {path.rpartition(".")[2] if "mlp" in path else path.split(".")[-2] for path in convert.weights(model)}
        assert found <= {"query", "key", "value", "output", "gate", "up", "down", "weight", "head"}
        assert not any("router" in path or "norm" in path or "embedding" in path for path in convert.weights(model))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("int3", "quantization='int3' is unknown: tbjax knows 'int8', 'int8:channel', 'int4'"),
        ({r"\.mlp\.": "int5"}, "'int5' is no encoding"),
        ({"(": "int8"}, r"'\(' is no regular expression"),
        ({"nowhere": "int8"}, "'nowhere' is about none of the"),
        ({"embedding": "int8"}, "embedding.weight is looked up"),
        (
            "int4",
            "mlp.down.weight has 48 inputs, which groups of 32 do not divide: a rule that gives it 'int4:24' would do",
        ),
        ([], "rules are a mapping"),
        (["int8"], "rules are a mapping"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(quantization, words):
    with pytest.raises(ValueError, match=words):
        abstract(tiny.our_config(LLAMA), (1, 4, 2), quantization=quantization)


# --- In use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 4, 2), {"pp": 2, "tp": 2, "fsdp": 2}], ids=str)
def test_what_is_generated_is_what_the_full_weights_would_generate(mesh):
    from tbjax.generate import generate

    model = tbjax.from_config(tiny.our_config(LLAMA), mesh, quantization=INT4, seed=3)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    assert generate(model, prompts, max_new_tokens=6) == generate(model.dequantized(), prompts, max_new_tokens=6)


def test_a_quantised_model_is_moved_but_neither_trained_nor_exported(tmp_path):
    case = tiny.BY_NAME["llama"]
    model = tbjax.from_config(tiny.hf_config(case), (1, 4, 2), quantization=INT8)
    there = model.moved((2, 2, 2))
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, arrays(there)[path])
    with pytest.raises(ValueError, match=r"weights are quantised.*model\.dequantized\(\)"):
        model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"weights are quantised.*model\.dequantized\(\)"):
        tbjax.train(model, [[1, 2, 3]], tbjax.TrainConfig(steps=1))
    with pytest.raises(ValueError, match=r"such do not go to PyTorch: take `model\.dequantized\(\)`"):
        interop.to_torch(model)
    full = model.dequantized()
    full.save_pretrained(tmp_path / "hf")
    again = tbjax.load(tmp_path / "hf", (1, 4, 2), quantization=INT8)
    exported = arrays(again.dequantized())
    for path, array in arrays(full).items():
        np.testing.assert_allclose(array, exported[path], atol=5e-4, err_msg=path)  # a step
    module = interop.to_torch(full)
    up = module.model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(up, arrays(full)["stacks.0.0.mlp.up.weight"][1])


def test_a_checkpoint_of_ours_keeps_the_integers(tmp_path):
    model = tbjax.from_config(tiny.our_config(LLAMA), (1, 4, 2), quantization=INT4)
    tbjax.save(model, tmp_path / "saved", format="orbax")
    again = tbjax.load(tmp_path / "saved", (1, 2, 4))
    assert again.quantization == model.quantization
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, arrays(again)[path], err_msg=path)
    with pytest.raises(ValueError, match="is quantised by other rules"):
        tbjax.load(tmp_path / "saved", (1, 2, 4), quantization="int8")
    with pytest.raises(ValueError, match=r"quantised by rules of its own.*name the nearest"):
        tbjax.plan(tmp_path / "saved", "cpu:8", task="inference")


def test_a_quantised_checkpoint_is_planned_shown_and_loaded_as_it_is_but_not_exported(tmp_path):
    model = tbjax.from_config(tiny.hf_config(LLAMA), (1, 4, 2), quantization="int8:channel")
    tbjax.save(model, tmp_path / "saved", format="orbax")
    asked = {"task": "inference", "global_batch": 8, "seq_len": 32, "mesh": (1, 8, 1), "precision": "float32"}
    plan = tbjax.plan(tmp_path / "saved", "cpu:8", **asked)
    assert plan.workload.quantization == tbjax.plan(model, "cpu:8", **asked).workload.quantization == "int8:channel"
    again = tbjax.load(tmp_path / "saved", plan)
    assert set(bytes_held(again).values()) == {plan.memory.parts["parameters"]}
    with pytest.raises(ValueError, match="quantization='int8:channel', but the plan has None"):
        tbjax.load(tmp_path / "saved", tbjax.plan(model.config, "cpu:8", **asked))
    shown = CliRunner().invoke(app, [str(tmp_path / "saved"), "--dry-run", "--mesh", "1,8,1", "--json"])
    rows = {row["path"]: row for row in json.loads(shown.stdout)["parameters"]}
    assert rows["head.weight.values"]["dtype"] == "int8"
    assert sum(row["nbytes_per_device"] for row in rows.values()) == plan.memory.parts["parameters"]
    refused = CliRunner().invoke(app, [str(tmp_path / "saved"), str(tmp_path / "hf"), "-q"])
    assert (refused.exit_code, (tmp_path / "hf").exists()) == (1, False)
    assert "weights quantised by int8:channel; such are not exported" in refused.stderr


def test_torch_s_way_of_loading_quantises_too(tmp_path):
    tiny.save(LLAMA, tmp_path)
    options = {"quantization": "int8:channel", "tensor_parallel_size": 2}
    model, _ = compat.create_distributed_llm(tmp_path, world_size=4, **options)
    assert (str(model.quantization), model.mesh.shape["tp"], model.mesh.devices.size) == ("int8:channel", 2, 4)
    assert by_path(model)["stacks.0.0.mlp.up.weight.values"].dtype == jnp.int8
    same = compat.AutoModelForCausalLM.from_pretrained(tmp_path, quantization="int8:channel")
    for path, array in arrays(same).items():
        np.testing.assert_array_equal(array, arrays(model)[path], err_msg=path)


def test_a_plan_says_how_weights_are_quantised():
    sizes = {"vocab_size": 64, "embed": 64, "mlp": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_positions": 64}
    config = ModelConfig(family="llama", layer_kinds=(LayerKind(),) * 2, **sizes)
    asked = {"task": "inference", "global_batch": 4, "seq_len": 64, "mesh": (1, 4, 2)}
    plan = tbjax.plan(config, "cpu:8", quantization="int4", precision="float32", **asked)
    model = tbjax.from_config(config, plan)
    assert str(model.quantization) == "int4"
    # The planner's bytes are the arrays' own.
    assert set(bytes_held(model).values()) == {plan.memory.parts["parameters"]}
    with pytest.raises(ValueError, match="the plan has 'int4'"):
        tbjax.from_config(config, plan, quantization="int8")
    plain = tbjax.plan(config, "cpu:8", **asked)
    with pytest.raises(ValueError, match="quantization='int8', but the plan has None"):
        tbjax.from_config(config, plain, quantization="int8")


# --- What compilers and numbers say -----------------------------------------------------------------------------------


def of_sixteen_layers():
    sizes = {"vocab_size": 1024, "embed": 1024, "mlp": 4096, "heads": 16, "kv_heads": 8, "head_dim": 64}
    return ModelConfig(family="llama", layer_kinds=(LayerKind(),) * 16, max_positions=64, **sizes)


def serving(quantization):
    served = {"task": "inference", "global_batch": 2, "seq_len": 64, "new_tokens": 32, "precision": "bfloat16"}
    return Workload(quantization=quantization, **served)


@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
@pytest.mark.parametrize("quantization", ["int8:channel", "int4"])
def test_a_program_for_gpus_has_packed_weights_and_no_floats_of_a_stack(quantization):
    config, layout = of_sixteen_layers(), Layout(tp=8)
    *_, decode = verify(config, serving(quantization), layout, "h100:8").programs
    weights = bytes_per_device(config, layout, 2, quantization)
    cache = 16 * 2 * 2 * 64 * 64 * 2  # layers, keys and values, rows, slots, features of a device, bytes
    assert weights + cache <= decode.bytes["argument"] <= weights + cache + 2**16
    assert decode.bytes["temp"] < 2 * 16 * 1024 * 4096 / 8
    assert sum(c.count for c in decode.collectives if c.kind == "all-reduce") == 2 * 16 + 1
    assert all(c.bytes / c.count < 2**16 for c in decode.collectives)  # no weights


@pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed: tbjax[verify]")
def test_a_program_for_tpus_turns_no_stack_of_integers_round():
    config, layout = of_sixteen_layers(), Layout(tp=4)
    for program in verify(config, serving("int8"), layout, "v5p:2x2x1").programs:
        assert program.bytes["temp"] < 16 * 1024 * 4096 / 4, program.name  # one projection's stack


@pytest.mark.slow
def test_a_real_model_says_almost_the_same():
    from benchmarks import quantize
    from benchmarks.checkpoints import SMOLLM2

    full = tbjax.load(SMOLLM2, one_device(), dtype="float32", progress=False)
    tokens = quantize.windows(full.tokenizer, 2, 256)
    said = quantize.log_probabilities(full, tokens)
    # The benchmark's model off the grid of the file is the same function, of other weights.
    other = quantize.rescaled(full)
    assert abs(quantize.divergence(said, quantize.log_probabilities(other, tokens))) < 1e-6
    assert not np.array_equal(*(by_path(m)["stacks.0.0.mlp.down.weight"][0, 0] for m in (full, other)))
    for quantization, most in (("int8", 1e-3), ("int4", 5e-2)):
        model = tbjax.load(SMOLLM2, one_device(), dtype="float32", quantization=quantization, progress=False)
        assert quantize.divergence(said, quantize.log_probabilities(model, tokens)) <= most
