"""A training configuration is checked when it is made, survives JSON, and takes what it leaves open from the plan."""

import optax
import pytest

from tbjax.mesh import make_mesh
from tbjax.planning import plan
from tbjax.training.config import USUAL, Defaults, TrainConfig
from tbjax.training.learning_rate import learning_rate
from tests import tiny


def test_json_and_back(tmp_path):
    config = TrainConfig(
        steps=100, optimizer="muon", warmup=3, schedule="wsd", decay=20, offload=("optimizer",), frozen="norm"
    )
    assert TrainConfig.from_json(config.to_json()) == config
    config.to_json(tmp_path / "run.json")
    assert TrainConfig.from_json(tmp_path / "run.json") == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, ["TrainConfig.steps=0", "whole number"]),
        ({"steps": 2.5}, ["TrainConfig.steps=2.5"]),
        ({"batch_size": True}, ["TrainConfig.batch_size=True"]),
        ({"learning_rate": -1e-3}, ["TrainConfig.learning_rate=-0.001"]),
        ({"learning_rate": float("nan")}, ["TrainConfig.learning_rate=nan"]),
        ({"optimizer": "adam"}, ["'adam'", "'adamw'"]),
        ({"optimizer": 3}, ["TrainConfig.optimizer=3", "optax"]),
        ({"schedule": "cosin"}, ["'cosin'", "'cosine'"]),
        ({"precision": "fp8"}, ["'fp8'", "'mixed'"]),
        ({"remat": "some"}, ["'some'", "dots"]),
        ({"pipeline": "2f2b"}, ["'2f2b'"]),
        ({"offload": ("gradients",)}, ["'gradients'", "'optimizer'"]),
        ({"on_nonfinite": "ignore"}, ["'ignore'", "'skip'"]),
        ({"frozen": "("}, ["TrainConfig.frozen='('", "regular expression"]),
        ({"warmup": 10}, ["warmup=10", "steps=10"]),
        ({"schedule": "wsd", "warmup": 5, "decay": 6}, ["warmup=5 and decay=6", "steps=10"]),
        ({"decay": 5}, ["decay=5", "'wsd'"]),
        ({"optimizer": optax.sgd(0.1), "weight_decay": 0.2}, ["TrainConfig.weight_decay=0.2", "optax"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=r"TrainConfig|schedule|remat") as raised:
        TrainConfig(**{"steps": 10} | fields)
    assert all(word in str(raised.value) for word in words), raised.value


def test_json_that_is_not_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no field 'epochs': it has steps, batch_size"):
        TrainConfig.from_json('{"steps": 10, "epochs": 3}')
    (tmp_path / "run.json").write_text("{steps}")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        TrainConfig.from_json(tmp_path / "run.json")
    with pytest.raises(TypeError, match="name the optimizer"):
        TrainConfig(steps=1, optimizer=optax.sgd(0.1)).to_json()


def test_what_is_left_open_is_the_plans():
    made = plan(
        tiny.our_config(tiny.BY_NAME["llama"]),
        "cpu:4",
        global_batch=16,
        seq_len=32,
        mesh={"fsdp": 4},
        precision="float32",
        remat="dots",
        microbatches=2,
    )
    filled = TrainConfig(steps=1, microbatches=4).with_plan(made)
    assert (filled.precision, filled.remat, filled.microbatches) == ("float32", "dots", 4)
    usual = TrainConfig(steps=1).with_plan(None)
    assert {name: getattr(usual, name) for name in USUAL} == USUAL


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_rates_rise_to_the_peak_and_fall_to_the_end(schedule):
    steps, warmup = 40, 4
    rate = learning_rate(schedule, 1.0, steps, warmup=warmup, final=0.1)
    rates = [float(rate(step)) for step in range(steps + 1)]
    assert rates[0] > 0
    assert rates[warmup] == max(rates) == pytest.approx(1.0)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[steps] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    middle = {"constant": 1.0, "cosine": 0.55, "linear": 0.55, "wsd": 1.0}[schedule]
    assert rates[(steps + warmup) // 2] == pytest.approx(middle)


def test_the_rate_of_a_step_is_the_one_that_the_optimizer_takes():
    config = TrainConfig(steps=10, learning_rate=0.5, warmup=1, schedule="linear")
    assert config.rate(1) == pytest.approx(0.25)
    assert config.rate(2) == pytest.approx(0.5)
    assert TrainConfig(steps=10, optimizer=optax.sgd(0.1)).rate(1) is None


def test_a_pipelines_schedule_is_told_to_pipelines_alone():
    config = TrainConfig(steps=1, pipeline="zb-h1").with_plan(None)
    assert config.step_options(tiny_model({"pp": 2}))["schedule"].name == "zb-h1"
    assert config.step_options(tiny_model({"fsdp": 2}))["schedule"] is None


def test_compression_by_name_draws_by_the_seed():
    assert TrainConfig(steps=1, seed=3, compression="int8").state_options["compression"].seed == 3
    assert TrainConfig(steps=1, seed=3, compression="random-k:0.1").state_options["compression"].seed == 3
    assert TrainConfig(steps=1, compression="int8").state_options["compression"].seed == 0
    with pytest.raises(ValueError, match=r"seed=-1 must be a whole number"):
        TrainConfig(steps=1, seed=-1)


def tiny_model(mesh):
    import jax

    from tbjax.api import abstract

    return abstract(tiny.our_config(tiny.BY_NAME["llama"]), make_mesh(mesh, jax.devices()[:2]), dtype="float32")


def test_what_a_plan_says_of_training_is_taken_and_what_it_says_of_serving_is_not():
    mesh = {"pp": 2, "tp": 2}
    options = {
        "mesh": mesh,
        "optimizer": "lion",
        "schedule": "zb-h1",
        "remat": "full",
        "global_batch": 8,
        "seq_len": 64,
    }
    planned = plan(tiny.our_config(tiny.BY_NAME["llama"]), "h100:4", **options)
    config = TrainConfig(steps=10).with_plan(planned)
    assert (config.optimizer, config.pipeline, config.remat) == ("lion", "zb-h1", "full")
    assert TrainConfig(steps=10, optimizer="sgd").with_plan(planned).optimizer == "sgd"
    defaults = Defaults(pipeline="interleaved", chunks=3)
    assert TrainConfig(steps=10).with_plan(planned, defaults).chunks == 3
    assert TrainConfig(steps=10, pipeline="gpipe").with_plan(planned, defaults).chunks is None
    serving = plan(tiny.our_config(tiny.BY_NAME["llama"]), "h100:4", task="inference", mesh={"tp": 4})
    assert TrainConfig(steps=10).with_plan(serving) == TrainConfig(steps=10).with_plan(None)
    assert TrainConfig(steps=10).with_plan(None).optimizer == "adamw"


def test_wsd_needs_the_steps_of_its_warm_up_and_of_its_fall():
    with pytest.raises(ValueError, match="warmup=95 and decay=10 leave nothing of steps=100"):
        TrainConfig(steps=100, schedule="wsd", warmup=95)


def test_optimizers_that_decay_nothing_say_so():
    with pytest.raises(ValueError, match=r"weight_decay=0\.2: sgd decays nothing"):
        TrainConfig(steps=10, optimizer="sgd", weight_decay=0.2)
