"""tbjax.plan: any name for a model and a machine, defaults, what is wrong; and a plan as the mesh of load."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import transformers

import tbjax
from tbjax.config import LayerKind, ModelConfig
from tbjax.mesh import AXES, fixed_sizes, make_mesh
from tbjax.planner.models import UnknownModel, describe
from tbjax.planner.parameters import parameters
from tbjax.sharding import leaves
from tests import tiny

CONFIG = ModelConfig(
    family="llama",
    vocab_size=1280,
    embed=64,
    mlp=128,
    heads=8,
    kv_heads=4,
    head_dim=16,
    layer_kinds=(LayerKind(),) * 2,
    max_positions=64,
)


def planned(model=CONFIG, hardware="cpu:8", **options):
    return tbjax.plan(model, hardware, **options)


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-70b-hf", "llama-2-70b-hf", "Llama-2-70B-HF"])
def test_a_model_that_people_name_needs_no_network(name):
    plan = planned(name, "h100:8x8", global_batch=512)
    assert parameters(plan.config) == 68_976_648_192
    assert plan.model == name
    assert plan.fits


def test_every_form_of_a_config_is_one_model(tmp_path):
    values = describe("llama-2-7b-hf")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    forms = [values, transformers.LlamaConfig(**values), file, str(file), tmp_path, str(tmp_path)]
    configs = {planned(form, "h100:8").config for form in forms}
    assert len(configs) == 1
    named = planned("llama-2-7b-hf", "h100:8").config
    assert planned(named, "h100:8").config == named
    assert {(c.layers, c.embed, c.mlp) for c in configs} == {(named.layers, named.embed, named.mlp)}


def test_a_folder_comes_before_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tiny.BY_NAME["llama"], tmp_path / "llama-2-7b-hf")
    assert planned("llama-2-7b-hf", "h100:1").config.embed == tiny.SIZES["hidden_size"]


def test_a_loaded_model_and_a_checkpoint_of_ours_know_their_config(tmp_path):
    model = tbjax.from_config(CONFIG)
    assert planned(model).config == CONFIG
    tbjax.save(model, tmp_path / "orbax", "orbax")
    assert planned(tmp_path / "orbax").config == CONFIG


def test_a_model_inside_a_package_is_found_without_the_hub():
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert parameters(planned(name).config) == 134_515_008


@pytest.mark.parametrize("name", ["gpt3", "llama-2-71b-hf", "llama", "nobody/nothing", "not a name", "a/b/c"])
def test_a_name_that_is_nothing_raises(name):
    with pytest.raises(UnknownModel) as error:
        planned(name)
    assert name in str(error.value)


def test_a_near_name_is_suggested():
    with pytest.raises(UnknownModel, match="meta-llama/Llama-2-70b-hf"):
        planned("llama-2-71b-hf")


def test_a_path_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        planned(tmp_path / "nowhere")


def test_what_is_no_model_says_what_is_needed():
    with pytest.raises(TypeError, match=r"an? int.*a name, a path, a config"):
        planned(3)


# --- Defaults ---------------------------------------------------------------------------------------------------------


def test_training_defaults_to_a_sequence_for_each_device():
    workload = planned("llama-3.1-8b", "h100:2x8").workload
    assert (workload.global_batch, workload.seq_len, workload.new_tokens) == (16, 4096, 0)


def test_serving_defaults_to_one_sequence_an_eighth_of_it_generated():
    workload = planned("llama-2-7b-hf", "h100:8", task="inference").workload
    assert (workload.global_batch, workload.seq_len, workload.new_tokens) == (1, 4096, 512)
    assert planned(task="inference").workload.new_tokens == 8


def test_a_short_model_gets_its_own_length():
    assert planned().workload.seq_len == 64


def test_a_sequence_that_is_served_may_be_cut_over_devices():
    plan = planned(mesh={"cp": 2, "tp": 4}, task="inference")
    assert plan.layout.cp == 2
    model = tbjax.from_config(CONFIG, mesh=plan)
    assert dict(model.mesh.shape) == plan.mesh
    alone = model.moved(tbjax.make_mesh((1, 1, 1), jax.devices()[:1]))
    prompt = [[1, 2, 3, 4, 5]]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    assert model.generate(prompt, **options) == alone.generate(prompt, **options)


# --- Fixed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (None, {}),
        ("auto", {}),
        ((1, 4, 2), {"pp": 1, "dp": 1, "fsdp": 4, "ep": 1, "cp": 1, "tp": 2}),
        ((-1, -1, 2), {"pp": 1, "ep": 1, "cp": 1, "tp": 2}),
        ({"tp": 2}, {"tp": 2}),
        ({"tp": 2, "fsdp": -1}, {"tp": 2}),
    ],
)
def test_a_mesh_fixes_what_it_says(mesh, sizes):
    assert fixed_sizes(mesh) == sizes
    assert {axis: planned(mesh=mesh).mesh[axis] for axis in sizes} == sizes


def test_a_mesh_of_devices_and_a_plan_fix_everything():
    mesh = make_mesh({"dp": 2, "tp": 4})
    assert planned(mesh=mesh).mesh == dict.fromkeys(AXES, 1) | {"dp": 2, "tp": 4}
    plan = planned(mesh={"tp": 4, "dp": 2})
    assert planned(mesh=plan).mesh == plan.mesh


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("remat", "dots"),
        ("microbatches", 2),
        ("schedule", "zb-h1"),
        ("offload", ("optimizer",)),
        ("sequence_parallel", True),
    ],
)
def test_a_setting_that_is_given_stands(setting, value):
    plan = planned(global_batch=64, mesh={"tp": 2, "pp": 2}, **{setting: value})
    assert getattr(plan.layout, setting) == value


def test_a_strategy_that_is_given_stands():
    assert planned(sharding="OPTIMIZER", mesh=(1, 8, 1)).layout.strategy is tbjax.ShardingStrategy.OPTIMIZER


# --- What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hardware": "h1000:8"}, ["'h1000'", "'h100'"]),
        ({"hardware": "h100:0"}, ["'0'", "above zero"]),
        ({"hardware": "h100:1.5"}, ["'1.5'", "whole numbers"]),
        ({"hardware": "h100:-8"}, ["'-8'"]),
        ({"hardware": "v5p:3x3x3"}, ["v5p", "3x3x3", "2x2x4"]),
        ({"hardware": "h100:4x16"}, ["8 devices each, not 16", "h100:8x8"]),
        ({"hardware": 8}, ["8", "'h100:8'"]),
        ({"global_batch": 0}, ["global_batch", "0"]),
        ({"global_batch": 8.0}, ["global_batch", "8.0"]),
        ({"seq_len": -1}, ["seq_len", "-1"]),
        ({"task": "inference", "seq_len": 8, "new_tokens": 9}, ["new_tokens=9", "seq_len=8"]),
        ({"task": "serve"}, ["'serve'", "'inference'"]),
        ({"precision": "float8"}, ["'float8'", "'bfloat16'"]),
        ({"optimizer": "adam"}, ["'adam'", "'adamw'"]),
        ({"quantization": "int8"}, ["int8", "inference"]),
        ({"mesh": (1, 8, 4)}, ["(1, 8, 4)", "32", "8", "would do: (1, 2, 4)"]),
        ({"mesh": {"tp": 3}}, ["multiple of 3", "would do: (1, 8, 1)"]),
        ({"mesh": {"model": 8}}, ["'model'", "tp"]),
        ({"mesh": {"tp": 0}}, ["'tp'", "0"]),
        ({"mesh": (2, 4)}, ["is not a mesh", "(dp, fsdp, tp)"]),
        ({"mesh": (1, 8, 1), "global_batch": 12}, ["12 sequences", "fsdp=8", "global_batch=16 would do"]),
        ({"microbatches": 3}, ["global_batch=8", "microbatches=3", "9 would"]),
        ({"mesh": {"ep": 8}}, ["ep=8: the model has no experts", "A mesh that would do: "]),
        ({"sharding": "ZERO"}, ["'ZERO'", "FULL_SHARD"]),
        ({"objective": "speed"}, ["'speed'", "'throughput'"]),
        ({"search": "deep"}, ["'deep'", "'verified'"]),
    ],
)
def test_what_cannot_be_says_what_would_do(options, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        planned(**options)
    for word in words:
        assert word in str(error.value)


# --- A plan is the mesh of load ---------------------------------------------------------------------------------------


def test_a_model_is_born_as_it_was_planned():
    plan = planned(mesh={"tp": 2}, sharding="OPTIMIZER", sequence_parallel=True)
    model = tbjax.from_config(CONFIG, mesh=plan)
    assert model.plan is plan
    assert dict(model.mesh.shape) == plan.mesh
    assert model.sharding.strategy is tbjax.ShardingStrategy.OPTIMIZER
    assert model.sharding.sequence_parallel
    tokens = np.ones((8, 4), np.int32)
    alone = tbjax.from_config(CONFIG, mesh=make_mesh((1, 1, 1), jax.devices()[:1]))
    assert alone.plan is None
    np.testing.assert_allclose(model(tokens), alone(tokens), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_loaded_as_it_was_planned(tmp_path):
    tiny.save(tiny.BY_NAME["llama"], tmp_path)
    plan = tbjax.Plan.from_json(planned(tmp_path, global_batch=16, seq_len=32).to_json())
    model = tbjax.load(tmp_path, mesh=plan, progress=False)
    assert model.plan == plan
    assert dict(model.mesh.shape) == plan.mesh
    assert model.sharding.strategy is plan.layout.strategy


def test_a_pipeline_that_trains_is_laid_out_over_its_stages():
    plan = planned(mesh={"pp": 2, "tp": 2}, global_batch=16)
    model = tbjax.from_config(CONFIG, mesh=plan)
    assert dict(model.mesh.shape) == plan.mesh
    for path, dims, variable in leaves(model):
        spec = variable.get_value().sharding.spec
        assert (dims[0] == "layers") == (len(spec) > 0 and spec[0] == "pp"), path


def test_a_plan_for_another_model_is_refused():
    other = planned("llama-2-7b-hf", "cpu:8")
    with pytest.raises(ValueError, match=r"another model, llama-2-7b-hf: .*embed is 4096 there and 64 here"):
        tbjax.from_config(CONFIG, mesh=other)


def test_a_plan_is_not_overruled():
    plan = planned(mesh=(1, 8, 1), sharding="FULL_SHARD")
    with pytest.raises(ValueError, match="the plan says FULL_SHARD"):
        tbjax.from_config(CONFIG, mesh=plan, sharding="NO_SHARD")
    with pytest.raises(ValueError, match="sequence_parallel=True, but the plan says False"):
        tbjax.from_config(CONFIG, mesh=plan, sequence_parallel=True)
    assert tbjax.from_config(CONFIG, mesh=plan, sharding="FULL_SHARD", sequence_parallel=False).plan is plan


def test_a_plan_for_other_machines_names_both_numbers():
    with pytest.raises(ValueError, match="64 devices, but there are 8"):
        tbjax.from_config(CONFIG, mesh=planned(hardware="h100:8x8"))


# --- What it needs ----------------------------------------------------------------------------------------------------


def test_planning_touches_no_device_and_needs_no_torch():
    code = """
import sys, tbjax
plan = tbjax.plan("llama-2-70b-hf", "h100:8x8", global_batch=512)
print(plan.mesh["tp"] > 0, "torch" in sys.modules)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["True", "False", "False"], result.stderr
