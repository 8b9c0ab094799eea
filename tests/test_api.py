"""The face: a checkpoint in, a model that answers as transformers does, a checkpoint out."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import tbjax
from tbjax import api
from tbjax.sharding import leaves
from tests import tiny

CASE = tiny.BY_NAME["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny.save(CASE, path)
    return path


def same(ours, theirs) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_a_loaded_model_says_what_transformers_says(folder):
    tokens, mask = tiny.batch(CASE)
    model = tbjax.load(folder, mesh=(2, 2, 2), progress=False)
    assert model.mesh.shape["tp"] == 2
    assert model.tokenizer is None
    with torch.no_grad():
        theirs = tiny.make(CASE)(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    kept = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(model(tokens, mask))[kept], theirs[kept], rtol=1e-3, atol=1e-4)


def test_generation_is_transformers_greedy_search(folder):
    tokens, _ = tiny.batch(CASE)
    prompt = tokens[:1, :9]
    model = tbjax.load(folder, mesh=(1, 4, 2), progress=False)
    theirs = (
        tiny.make(CASE)
        .generate(
            torch.tensor(prompt), attention_mask=torch.ones(1, 9), max_new_tokens=20, do_sample=False, pad_token_id=0
        )[0, 9:]
        .tolist()
    )
    eos = tiny.hf_config(CASE).eos_token_id
    assert model.generate(prompt, max_new_tokens=20) == [theirs[: theirs.index(eos)] if eos in theirs else theirs]


def test_saved_and_loaded_again_it_is_the_same(folder, tmp_path):
    model = tbjax.load(folder, mesh=(2, 2, 2), progress=False)
    tbjax.save(model, tmp_path / "hf")
    assert same(tbjax.load(tmp_path / "hf", mesh=(1, 1, 8), progress=False), model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), tiny.make(CASE).parameters(), strict=True))


def test_a_dtype_is_taken_on_the_way(folder):
    model = tbjax.load(folder, mesh=(1, 8, 1), dtype="bfloat16", progress=False)
    wide = tbjax.load(folder, mesh=(1, 8, 1), progress=False)
    assert {array.dtype for array in jax.tree.leaves(model)} == {jnp.dtype("bfloat16")}
    assert same(model, jax.tree.map(lambda array: array.astype("bfloat16"), wide))


def stored(folder, path, change, **fields):
    """A copy of the checkpoint whose tensors are `change`d and whose config has other `fields`."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file(
        {name: change(name, tensor) for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    return path


def test_without_a_word_in_the_config_the_dtype_is_that_of_most_numbers(folder, tmp_path):
    # More tensors are norms, more numbers are in the matrices.
    path = stored(folder, tmp_path / "x", lambda name, x: x if "norm" in name else x.bfloat16(), dtype=None)
    assert "dtype" not in json.loads((path / "config.json").read_text())
    model = tbjax.load(path, mesh=(8, 1, 1), progress=False)
    assert model.dtype == model.config.dtype == "bfloat16"
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_the_config_is_believed_about_the_dtype_and_the_log_says_so(folder, tmp_path, caplog):
    path = stored(folder, tmp_path / "x", lambda _, x: x, dtype="bfloat16")
    with caplog.at_level(logging.INFO, logger="interop.source"):
        assert tbjax.load(path, mesh=(8, 1, 1), progress=False).dtype == "bfloat16"
        tbjax.load(folder, mesh=(8, 1, 1), progress=False)
    messages = [record.getMessage() for record in caplog.records if record.name == "interop.source"]
    assert messages == [
        f"{path}: most numbers are stored as float32, and config.json says dtype bfloat16, which is what a model has "
        "unless it is loaded with another (dtype=)."
    ]


@pytest.mark.parametrize("dtype", ["int8", "bool", int, "float8_e4m3fn", "float64", "foo", ""], ids=str)
def test_a_dtype_that_cannot_hold_weights_is_refused(folder, dtype):
    for make in (tbjax.load, tbjax.from_config):
        with pytest.raises(ValueError, match=r"dtype=.* not supported: dtype can be float32, bfloat16, float16 .*x64"):
            make(folder, mesh=(8, 1, 1), dtype=dtype)


def test_double_precision_is_there_where_jax_has_it(folder):
    with jax.enable_x64(True):
        assert tbjax.from_config(tiny.our_config(CASE), (8, 1, 1), dtype=float).dtype == jnp.float64
    with pytest.raises(ValueError, match="the model's dtype='float64' is not supported"):
        tbjax.from_config({**tiny.hf_config(CASE).to_dict(), "dtype": "float64"}, (8, 1, 1))


def test_random_weights_are_the_same_on_every_mesh_and_born_where_they_lie():
    config = tiny.hf_config(CASE).to_dict()
    models = [tbjax.from_config(config, mesh, seed=5) for mesh in ((8, 1, 1), (2, 2, 2), (1, 1, 8))]
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    assert not same(models[0], tbjax.from_config(config, (8, 1, 1), seed=6))
    assert models[2].head.weight[...].addressable_shards[0].data.shape == (128 // 8, 32)


def test_a_config_is_taken_in_every_form(tmp_path):
    config = tiny.hf_config(CASE)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    forms = (config, config.to_dict(), tmp_path / "config.json", str(tmp_path / "config.json"))
    models = [tbjax.from_config(form, (8, 1, 1)) for form in forms]
    assert all(model.config == models[0].config for model in models)
    with pytest.raises(TypeError, match="int"):
        tbjax.from_config(5)


def test_a_model_without_a_hugging_face_config_says_so(tmp_path):
    model = tbjax.from_config(tiny.our_config(CASE), (8, 1, 1))
    with pytest.raises(ValueError, match="orbax"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="'zip'"):
        tbjax.save(model, tmp_path / "out", format="zip")
    tbjax.save(model, tmp_path / "out", format="orbax")
    assert tbjax.checkpoint.read_about(tmp_path / "out").config == model.config
    assert same(tbjax.load(tmp_path / "out", mesh=(1, 1, 8)), model)


def test_an_orbax_checkpoint_loads_like_any_other(folder, tmp_path):
    model = tbjax.load(folder, mesh=(2, 2, 2), progress=False)
    tbjax.save(model, tmp_path / "orbax", format="orbax")
    again = tbjax.load(tmp_path / "orbax", mesh=(1, 4, 2))
    assert same(again, model)
    assert again.origin.config == model.origin.config
    narrow = tbjax.load(tmp_path / "orbax", mesh=(1, 4, 2), dtype="bfloat16")
    assert same(narrow, jax.tree.map(lambda array: array.astype("bfloat16"), model))


def test_two_loads_of_one_checkpoint_are_one_kind_of_tree(folder):
    one, two = (tbjax.load(folder, mesh=(2, 2, 2), progress=False) for _ in range(2))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(jax.tree.map(jnp.subtract, one, two)))
    tokens, _ = tiny.batch(CASE)
    one(tokens)
    compiled = api._forward._cache_size()
    two(tokens)
    assert api._forward._cache_size() == compiled
    assert one.origin == two.origin
    assert one.origin != dataclasses.replace(two.origin, generation_config={"eos_token_id": 7})
    assert one.origin != dataclasses.replace(two.origin, config={**two.origin.config, "eos_token_id": 7})


def test_what_stays_whole_is_named(caplog):
    config = tiny.our_config(tiny.BY_NAME["llama"])
    odd = dataclasses.replace(config, heads=4, kv_heads=1, head_dim=36, mlp=8, vocab_size=128)
    with caplog.at_level(logging.WARNING, logger="tbjax"):
        model = tbjax.from_config(odd, (1, 1, 8))
    named = [record.getMessage() for record in caplog.records]
    assert any("attention.key.weight" in message and "tp" in message for message in named)
    assert all("query" not in message for message in named)
    assert model.stacks[0][0].attention.key.weight[...].addressable_shards[0].data.shape == (2, 36, 32)


def test_a_mesh_that_the_model_does_not_fit_names_one_that_it_does(folder):
    with pytest.raises(ValueError, match="would do"):
        tbjax.from_config({**tiny.hf_config(CASE).to_dict(), "intermediate_size": 60}, (1, 1, 8))
    with pytest.raises(ValueError, match="needs 4 devices, but there are 8"):
        tbjax.load(folder, mesh=(1, 2, 2))


def test_another_mesh_that_a_user_has_set_does_not_disturb(folder):
    tokens, _ = tiny.batch(CASE)
    model = tbjax.load(folder, mesh=(2, 2, 2), progress=False)
    expected = np.asarray(model(tokens)), model.generate(tokens[:1, :5], max_new_tokens=3)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        np.testing.assert_array_equal(np.asarray(model(tokens)), expected[0])
        assert model.generate(tokens[:1, :5], max_new_tokens=3) == expected[1]


def test_masks_of_any_library_are_taken(folder):
    tokens, mask = tiny.batch(CASE)
    model = tbjax.load(folder, mesh=(2, 2, 2), progress=False)
    ours = np.asarray(model(tokens, mask))
    np.testing.assert_array_equal(np.asarray(model(torch.tensor(tokens), torch.tensor(mask))), ours)
    left_out = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    assert model.generate(left_out, max_new_tokens=2) == model.generate([[5, 6]], max_new_tokens=2)


def test_a_moved_model_lies_as_it_did(folder):
    model = tbjax.load(folder, mesh=(2, 2, 2), sharding="OPTIMIZER", sequence_parallel=True, progress=False)
    moved = model.moved({"fsdp": 4, "tp": 2})
    assert moved.sharding.strategy == "OPTIMIZER"
    assert moved.sharding.sequence_parallel
    assert same(moved, model)
    assert model.moved((1, 8, 1), sharding="FULL_SHARD").sharding.strategy == "FULL_SHARD"


def test_a_schedule_that_a_model_lies_for_is_the_one_that_trains_it(folder):
    model = tbjax.load(folder, mesh={"pp": 2, "fsdp": 4}, schedule="zb-h1", progress=False)
    assert (model.training_defaults.pipeline, model.training_defaults.chunks) == ("zb-h1", 1)
    assert same(tbjax.load(folder, mesh=(1, 8, 1), progress=False), tbjax.load(folder, mesh=(8, 1, 1), progress=False))
    with pytest.raises(ValueError, match=r"stage_layers=\[1, 1\]: the mesh has no stages"):
        tbjax.load(folder, mesh=(1, 8, 1), stage_layers=[1, 1], progress=False)
    options = {"task": "train", "global_batch": 8, "seq_len": 32, "mesh": {"pp": 2}, "schedule": "1f1b"}
    planned = tbjax.plan(folder, "cpu:8", **options)
    with pytest.raises(ValueError, match="the plan has the schedule '1f1b'"):
        tbjax.load(folder, mesh=planned, schedule="zb-v", progress=False)


def test_an_end_token_that_is_none_is_named():
    model = tbjax.from_config(tiny.hf_config(CASE), (8, 1, 1))
    model.origin = dataclasses.replace(model.origin, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match="eos_token_id='</s>' must be a token id"):
        model.generate([1, 2, 3])


def test_a_strategy_that_is_none_is_named():
    with pytest.raises(ValueError, match="sharding='ZERO' is not a strategy: tbjax knows NO_SHARD, "):
        tbjax.from_config(tiny.our_config(CASE), (8, 1, 1), sharding="ZERO")


def test_importing_is_light():
    program = (
        "import sys, tbjax; assert 'jax' not in sys.modules; tbjax.load, tbjax.from_config;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there():
    assert set(tbjax.__all__) <= set(dir(tbjax))
    for name in tbjax.__all__:
        assert getattr(tbjax, name) is not None
    with pytest.raises(AttributeError, match="'lode'"):
        tbjax.lode  # noqa: B018


def test_leaves_name_every_parameter_once(folder):
    model = tbjax.load(folder, mesh=(8, 1, 1), progress=False)
    paths = [leaf.path for leaf in leaves(model)]
    assert len(set(paths)) == len(paths) == len(jax.tree.leaves(model))
