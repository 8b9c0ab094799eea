"""Who types another library's name is told ours, wherever they type it."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tbjax
from tbjax import compat, elsewhere
from tbjax.cli import app
from tbjax.mesh import make_mesh
from tbjax.terminal import run
from tests import tiny

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def model():
    return tbjax.from_config(tiny.hf_config(tiny.BY_NAME["llama"]), (1, 1, 8))


@pytest.mark.parametrize("module", ["tbjax", "tbjax.compat"])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Accelerator", "tbjax.make_train_step"),
        ("FSDP2Manager", 'sharding="FULL_SHARD"'),
        ("DeepSpeedEngine", "tbjax.compat.deepspeed(config)"),
        ("ScheduleZBVZeroBubble", 'TrainConfig(pipeline="zb-v")'),
        ("fully_shard", 'sharding="FULL_SHARD"'),
    ],
)
def test_a_name_that_is_imported(module, name, ours):
    with pytest.raises(ImportError, match=rf"^{module}: '{name}' is .*; here it is .*{re.escape(ours)}"):
        exec(f"from {module} import {name}")  # noqa: S102 (our own text)


def test_what_nobody_has_is_missing_as_anywhere():
    for module in (tbjax, compat):
        assert not hasattr(module, "nobody_s")
    with pytest.raises(ImportError, match=r"from tbjax\.compat import DistributedDataParallel"):
        tbjax.DistributedDataParallel  # noqa: B018
    assert tbjax.AutoModelForCausalLM is compat.AutoModelForCausalLM
    with pytest.raises(TypeError, match="unexpected keyword argument 'nobody_s'"):
        tbjax.load("nothing", nobody_s=1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("module", [tbjax, compat])
def test_a_setting_of_theirs_is_no_import(module):
    for name in ("lr", "bf16", "profiler"):
        assert elsewhere.called_here(name)
        assert not hasattr(module, name)


def test_a_module_of_ours_has_no_name_that_is_refused():
    folders = (Path(tbjax.__file__).parent, Path(compat.__file__).parent)
    modules = {file.stem for folder in folders for file in folder.iterdir()}
    assert {"optim", "mesh"} <= modules
    assert not modules & {name for names in elsewhere.NAMES.values() for name in names}


NO_RUN: Any = (None, [], None)  # refused before it is looked at

TAKING = [
    (lambda **given: tbjax.TrainConfig(steps=1, **given), "TrainConfig", "remat_policy", 'TrainConfig(remat="full")'),
    (lambda **given: tbjax.TrainConfig(steps=1, **given), "TrainConfig", "lr", "TrainConfig(learning_rate=...)"),
    (lambda **given: tbjax.load("nothing", **given), "load", "device_map", "load(mesh=...), left out for all devices"),
    (lambda **given: tbjax.load("nothing", **given), "load", "ici_fsdp_parallelism", "mesh={'fsdp': ...}"),
    (lambda **given: tbjax.from_config({}, **given), "from_config", "tensor_parallel_size", "mesh={'tp': ...}"),
    (lambda **given: tbjax.plan("nothing", "h100:8", **given), "plan", "train_batch_size", "plan(global_batch=...)."),
    (
        lambda **given: tbjax.plan("nothing", "h100:8", **given),
        "plan",
        "lr_scheduler_type",
        "TrainConfig(schedule=...)",
    ),
    (lambda **given: tbjax.plan("nothing", "h100:8", **given), "plan", "remat_policy", "plan(remat=...)."),
    (lambda **given: tbjax.train(*NO_RUN, **given), "train", "output_dir", "train(checkpoint_dir=...)"),
    (lambda **given: tbjax.train(*NO_RUN, **given), "train", "lr", "TrainConfig(learning_rate=...)"),
    (
        lambda **given: compat.AutoModelForCausalLM.from_pretrained("nothing", **given),
        "load",
        "load_in_8bit",
        'quantization="int8"',
    ),
    (
        lambda **given: compat.create_distributed_llm("nothing", **given),
        "DistributedConfig",
        "dcn_pipeline_parallelism",
        "mesh={'pp': ...}",
    ),
    (
        lambda **given: compat.DistributedLLMOptimizer("nothing", **given),
        "DistributedLLMOptimizer",
        "context_parallel_size",
        "mesh={'cp': ...}",
    ),
    (
        lambda **given: compat.DistributedDataParallel(None, **given),
        "DistributedDataParallel",
        "gradient_checkpointing",
        'TrainConfig(remat="full")',
    ),
]


@pytest.mark.parametrize(("call", "where", "name", "ours"), TAKING, ids=[f"{row[1]}-{row[2]}" for row in TAKING])
def test_a_setting_that_is_given(call, where, name, ours):
    with pytest.raises(TypeError, match=rf"^{where}: '{name}' is .*; here it is .*{re.escape(ours)}"):
        call(**{name: 1})


def test_signatures_are_what_they_were():
    assert "remat" in inspect.signature(tbjax.TrainConfig).parameters
    assert list(inspect.signature(tbjax.load).parameters)[:2] == ["name_or_path", "mesh"]
    assert list(inspect.signature(tbjax.train).parameters)[:3] == ["model", "data", "config"]
    assert inspect.getdoc(tbjax.load).startswith("A checkpoint as a sharded model.")
    assert inspect.getdoc(tbjax.train).startswith("Train `model`, in place")


def test_a_mesh_s_axis_and_a_key_of_a_config_s_json():
    with pytest.raises(ValueError, match=r"ici_fsdp_parallelism.*here it is mesh={'fsdp': \.\.\.}"):
        make_mesh({"ici_fsdp_parallelism": 8})
    with pytest.raises(ValueError, match=r"no field 'zero_optimization'.*tbjax.compat.deepspeed"):
        tbjax.TrainConfig.from_json(json.dumps({"steps": 1, "zero_optimization": {"stage": 3}}))


TRAIN = ("train", "model", "--data", "corpus.jsonl")
PLAN = ("plan", "model", "--hardware", "h100:8")


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ((*TRAIN, "--remat_policy", "full"), "'remat_policy' is MaxText's; here it is --remat. See"),
        ((*TRAIN, "--remat-policy", "full"), "'remat_policy' is MaxText's; here it is --remat. See"),
        ((*TRAIN, "remat_policy=full"), "'remat_policy' is MaxText's; here it is --remat. See"),
        ((*TRAIN, "--optim", "sgd"), "'optim' is transformers'; here it is --optimizer. See"),
        ((*TRAIN, "--warmup-ratio", "0.1"), "here it is --warmup, in steps. See"),
        ((*TRAIN, "--output_dir", "run"), "here it is --checkpoint-dir. See"),
        ((*TRAIN, "--adam-b1", "0.9"), "here it is TrainConfig(optimizer=optax.adamw(rate, b1=...)). See"),
        ((*PLAN, "--tp_size", "2"), "here it is --mesh tp=N. See"),
        ((*PLAN, "--load-in-8bit"), "here it is --quantization int8. See"),
        ((*PLAN, "--global_batch_size", "8"), "here it is --global-batch. See"),
        ((*PLAN, "--lr-scheduler-type", "cosine"), "here it is TrainConfig(schedule=...). See"),
        (("generate", "model", "--device-map", "auto"), "here it is --mesh, left out for all devices on fsdp. See"),
    ],
)
def test_an_option_of_a_command(arguments, ours, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tbjax", *arguments])
    with pytest.raises(SystemExit) as exited:
        run(app, "tbjax")
    assert exited.value.code == 2
    assert ours in capsys.readouterr().err


def test_what_pytorch_s_models_are_asked_for(model):
    rows = [row for ours in elsewhere.METHODS.values() for row in ours.items()]
    assert {"to", "parameters", "state_dict"} <= {name for name, _ in rows}
    for name, ours in rows:
        with pytest.raises(AttributeError, match=rf"a CausalLM has no attribute '{name}': .*{re.escape(ours)}"):
            getattr(model, name)
    assert getattr(model, "nobody_s", None) is None


def test_an_error_inside_a_property_is_not_hidden(model, monkeypatch):
    monkeypatch.setattr(tbjax.CausalLM, "tokenizer", property(lambda self: self.origin.nothing))
    with pytest.raises(AttributeError, match="'Origin' object has no attribute 'nothing'"):
        model.tokenizer  # noqa: B018


def test_what_two_libraries_call_alike_is_told_of_both():
    assert elsewhere.called_here("nothing", "gradient_accumulation_steps") == (
        "'gradient_accumulation_steps' is MaxText's and DeepSpeed's and transformers' and accelerate's; "
        "here it is TrainConfig(microbatches=...)."
    )


def test_the_readme_s_table_and_this_one_know_the_same_names():
    """Names that the table has on its left are compat's, or answered with ours; nothing of compat's is answered so."""
    rows = re.findall(r"^\| (`.*?) \| ", README.split("## Coming from")[1].split("## Families")[0], re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"\b([A-Z]\w*[a-z]\w*|\w+_\w+)(?==|\(|`|\.)", row)}
    assert {"ici_fsdp_parallelism", "dcn_data_parallelism", "remat_policy", "device_map"} <= names
    answered = {name for table in (elsewhere.SETTINGS, elsewhere.NAMES) for ours in table.values() for name in ours}
    assert not {name for names in elsewhere.NAMES.values() for name in names} & {*compat.__all__}
    of_these = {"from_pretrained", "checkpoint_ratio", "offload_params", "world_size", "save_dot_except_mlp"}
    assert names - of_these <= answered | {*compat.__all__}


def test_every_field_and_name_that_an_answer_has_is_ours(model):
    answers = [
        ours
        for table in (elsewhere.SETTINGS, elsewhere.NAMES, elsewhere.METHODS)
        for said in table.values()
        for ours in said.values()
    ]
    fields = inspect.signature(tbjax.TrainConfig).parameters
    for call in re.findall(r"TrainConfig\((.*?)\)", " ".join(answers)):
        assert {*re.findall(r"(\w+)=", re.sub(r"optax.*", "", call))} <= {*fields}, call
    for name in re.findall(r"tbjax\.([\w.]+\w)", " ".join(answers)):
        value = tbjax
        for part in name.split("."):
            value = getattr(value, part)
    for name in re.findall(r"\bmodel\.(\w+)", " ".join(answers)):
        assert hasattr(model, name), name
