"""A run learns, shows what it does, stops when it is told to, and goes on as if it had not."""

import itertools
import json
import logging
import os
import re
import signal

import jax
import numpy as np
import pytest

from tbjax.api import from_config
from tbjax.mesh import make_mesh
from tbjax.training import IGNORED, Batch, init_state
from tbjax.training import loop as loops
from tbjax.training.config import TrainConfig
from tbjax.training.evaluation import evaluate
from tbjax.training.loop import DataEnded, Diverged, make_train_step, train
from tbjax.training.watchdog import Watchdog
from tests import processes, tiny

ROWS, SEQUENCE = 8, 16
MESH = (1, 2, 1)  # compiles in a fraction of the time that eight devices take
CONFIG = tiny.our_config(tiny.BY_NAME["llama"])
# A constant rate, so that runs of all lengths are of one program, which is compiled once.
BASE = {
    "steps": 10,
    "learning_rate": 5e-3,
    "schedule": "constant",
    "precision": "float32",
    "remat": "none",
    "log_every": 5,
}


def model(mesh=MESH):
    return from_config(CONFIG, make_mesh(mesh, jax.devices()[: int(np.prod(mesh))]), dtype="float32", seed=1)


def batch(seed):
    """A batch of the same few sentences for every seed, in another order and with other gaps."""
    random = np.random.default_rng(seed)
    sentences = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, SEQUENCE + 1))
    rows = sentences[random.integers(0, 4, ROWS)].astype(np.int32)
    targets = rows[:, 1:].copy()
    targets[:, : random.integers(1, 6)] = IGNORED
    return Batch(rows[:, :-1], targets)


class Batches:
    """Endless batches that know where they stand."""

    def __init__(self, position=0):
        self.position = position

    def __iter__(self):
        while True:
            self.position += 1
            yield batch(self.position)

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


def arrays(tree):
    return [np.asarray(array) for array in jax.tree.leaves(tree)]


def same_bits(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(arrays(ours), arrays(theirs), strict=True))


@pytest.fixture(scope="module")
def whole():
    """Ten steps, without a stop."""
    return train(model(), Batches(), TrainConfig(**BASE))


def test_a_run_learns_and_trains_the_model_that_it_was_given(whole):
    assert whole.end == "finished"
    assert (whole.step, len(whole.losses)) == (10, 10)
    assert whole.losses[-1] < 0.9 * whole.losses[0]
    assert same_bits(whole.model, whole.state.model)
    assert not same_bits(whole.model, model())


def test_a_step_is_compiled_once_and_what_the_compiler_took_given_back_before_it_runs(monkeypatch, caplog):
    order = []
    monkeypatch.setattr(loops, "give_back", lambda: order.append("given back"))
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        train(
            model(), Batches(), TrainConfig(**BASE | {"steps": 3}), on_record=lambda record: order.append(record.step)
        )
    assert order == ["given back", 3]
    compiled = [line for line in caplog.messages if line.startswith("Finished XLA compilation of jit(step)")]
    assert len(compiled) == 1


def test_it_takes_the_steps_of_a_loop_of_ones_own(whole, caplog):
    mine = model()
    config = TrainConfig(**BASE)
    optimizer = config.make_optimizer(mine)
    step = make_train_step(mine, None, optimizer, precision="float32", remat="none", on_nonfinite="stop")
    state = init_state(mine, optimizer, precision="float32", on_nonfinite="stop")
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number in range(1, 4):
            state, metrics = step(state, batch(number))
            assert float(metrics.loss) == pytest.approx(whole.losses[number - 1], rel=1e-6)
    # The state that comes out fits where it went in.
    assert len(re.findall(r"Compiling jit\(step\)", caplog.text)) == 1


def test_what_is_reported_is_what_happened(whole):
    assert [record.step for record in whole.records] == [5, 10]
    targets = [int(np.sum(batch(number).targets >= 0)) for number in range(1, 11)]
    assert [record.tokens for record in whole.records] == [sum(targets[:5]), sum(targets)]
    assert whole.records[0].loss == pytest.approx(np.average(whole.losses[:5], weights=targets[:5]))
    assert whole.records[1].learning_rate == pytest.approx(TrainConfig(**BASE).rate(10))
    assert whole.records[1].tokens_per_second > 0
    assert whole.records[1].mfu is None  # of a CPU it would mean nothing


@pytest.mark.slow
def test_five_steps_and_five_more_are_ten_on_eight_devices(tmp_path):
    config = TrainConfig(**BASE | {"precision": "mixed", "microbatches": 2, "remat": "full"})
    mesh = (2, 2, 2)
    whole = train(model(mesh), Batches(), config)
    first = train(model(mesh), Batches(), config, checkpoint_dir=tmp_path, on_record=kill)
    second = train(model(mesh), Batches(), config, checkpoint_dir=tmp_path)
    assert first.losses + second.losses == whole.losses
    assert same_bits(second.state, whole.state)


@pytest.mark.parametrize("data", [Batches, lambda: [batch(number) for number in range(1, 11)]], ids=["state", "list"])
def test_five_steps_and_five_more_are_ten(whole, tmp_path, data):
    first = train(model(), data(), TrainConfig(**BASE | {"save_every": 5}), checkpoint_dir=tmp_path, on_record=kill)
    assert (first.end, first.step) == ("SIGTERM", 6)  # the step after the fifth was under way already
    second = train(model(), data(), TrainConfig(**BASE), checkpoint_dir=tmp_path)
    assert second.step == 10
    assert first.losses + second.losses == whole.losses
    assert second.records[-1].tokens == whole.records[-1].tokens
    assert same_bits(second.state, whole.state)


def test_the_other_five_may_be_taken_on_another_mesh(whole, tmp_path):
    """More of it in test_saving.py, slowly."""
    train(model(), Batches(), TrainConfig(**BASE | {"steps": 5}), checkpoint_dir=tmp_path)
    on = train(model((2, 1, 1)), Batches(), TrainConfig(**BASE), checkpoint_dir=tmp_path)
    np.testing.assert_allclose(on.losses, whole.losses[5:], rtol=1e-5)


def kill(record):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_checkpoint_of_a_run_is_a_model(whole, tmp_path):
    from tbjax.api import load

    done = train(model(), Batches(), TrainConfig(**BASE | {"steps": 2}), checkpoint_dir=tmp_path)
    back = load(tmp_path / "2", mesh=(1, 8, 1))
    assert same_bits(back, done.model)


def test_another_run_is_not_gone_on_from(tmp_path):
    short = BASE | {"steps": 1}
    train(model(), Batches(), TrainConfig(**short), checkpoint_dir=tmp_path)
    other = model()
    with pytest.raises(
        ValueError, match=r"holds another run: its .* Give the optimizer and the compression of that run"
    ):
        train(other, Batches(), TrainConfig(**short | {"optimizer": "sgd"}), checkpoint_dir=tmp_path)
    assert same_bits(other, model())  # unharmed
    # Nor with data that is not that run's, whose refusal leaves the model as it was.
    with pytest.raises(DataEnded, match=r"ended before step 1, from which the run in .* is to go on"):
        train(other, [], TrainConfig(**short), checkpoint_dir=tmp_path)
    strange = Batches()
    strange.restore = lambda state: state["elsewhere"]
    with pytest.raises(KeyError):
        train(other, strange, TrainConfig(**short), checkpoint_dir=tmp_path)
    assert same_bits(other, model())
    with pytest.raises(ValueError, match="holds step 1 of a run, and resume=False"):
        train(other, Batches(), TrainConfig(**short), checkpoint_dir=tmp_path, resume=False)


def test_every_target_of_an_evaluation_weighs_the_same(whole):
    data = [batch(20), batch(21)._replace(targets=np.full((ROWS, SEQUENCE), IGNORED))]
    data[1].targets[0, 0] = 3
    found = evaluate(whole.model, data, precision="float32")
    total, targets = 0.0, 0
    for tokens, wanted, *_ in data:
        scores = np.asarray(jax.nn.log_softmax(whole.model(tokens)), np.float64)
        for row, column in np.argwhere(wanted >= 0):
            total -= scores[row, column, wanted[row, column]]
            targets += 1
    assert found.targets == targets
    assert found.loss == pytest.approx(total / targets, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(total / targets), rel=1e-4)
    assert evaluate(whole.model, data, precision="float32", batches=1).targets == targets - 1
    with pytest.raises(ValueError, match="no targets"):
        evaluate(whole.model, [], precision="float32")
    several = iter(data)
    evaluate(whole.model, several, precision="float32", batches=1)
    assert next(several) is data[1]  # no more was taken than was asked for


def test_an_evaluation_is_no_hang_as_long_as_its_batches_come(tmp_path, monkeypatch):
    beats, before = [], []
    beat = Watchdog.beat

    def counted(self, step, **options):
        beats.append(step)
        beat(self, step, **options)

    class HeldOut:
        def __iter__(self):
            for number in range(4):
                before.append(len(beats))
                yield batch(20 + number)

    monkeypatch.setattr(Watchdog, "beat", counted)
    train(model(), Batches(), TrainConfig(**BASE | {"steps": 1, "step_timeout": 60}), eval_data=HeldOut())
    assert [later - earlier for earlier, later in itertools.pairwise(before)] == [1, 1, 1]


def test_data_that_cannot_say_in_json_where_it_stands_is_refused_at_once(tmp_path):
    strange = Batches(np.int64(3))
    with pytest.raises(TypeError, match=r"state\(\) cannot be saved with the run in .*int64 is not JSON"):
        train(model(), strange, TrainConfig(**BASE), checkpoint_dir=tmp_path)
    assert strange.position == 3


def test_a_dataset_is_evaluated_once_though_it_has_no_end(whole):
    from tbjax.training.data.corpus import Corpus, Shard
    from tbjax.training.data.dataset import Dataset

    lengths = np.full(20, SEQUENCE, np.int32)
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, int(lengths.sum())).astype(np.uint16)
    data = Dataset(Corpus([Shard("array", ids)], lengths, CONFIG.vocab_size), seq_len=SEQUENCE, batch_size=ROWS)
    found = evaluate(whole.model, data, precision="float32")
    assert found.targets == 20 * (SEQUENCE - 1)
    assert found == evaluate(whole.model, data.evaluation(), precision="float32")
    assert data.epoch == 0


def test_evaluations_come_when_they_are_due_and_change_nothing(whole):
    config = TrainConfig(**BASE | {"eval_every": 4})
    done = train(model(), Batches(), config, eval_data=[batch(20)])
    assert list(done.evaluations) == [4, 8, 10]
    assert done.evaluations[10].loss < done.evaluations[4].loss
    assert done.losses == whole.losses


def test_a_run_is_saved_before_it_is_evaluated(tmp_path):
    config = TrainConfig(**BASE | {"steps": 2, "eval_every": 1, "save_every": 1})
    with pytest.raises(ValueError, match="no targets"):
        train(model(), Batches(), config, eval_data=[], checkpoint_dir=tmp_path / "first")
    assert (tmp_path / "first" / "1" / "parameters").is_dir()
    last = TrainConfig(**BASE | {"steps": 1})
    with pytest.raises(ValueError, match="no targets"):
        train(model(), Batches(), last, eval_data=[], checkpoint_dir=tmp_path / "last")
    assert (tmp_path / "last" / "1" / "parameters").is_dir()
    with pytest.raises(ValueError, match="eval_data is a list_iterator, which can be gone through once"):
        train(model(), Batches(), TrainConfig(**BASE | {"eval_every": 1}), eval_data=iter([batch(20)]))


def test_logs_are_lines_of_json_and_event_files(tmp_path):
    file, folder = tmp_path / "logs" / "run.jsonl", tmp_path / "events"
    config = TrainConfig(**BASE | {"steps": 4, "log_every": 2})
    done = train(model(), Batches(), config, eval_data=[batch(20)], log_file=file, tensorboard=folder)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert lines[0]["loss"] == done.records[0].loss
    assert lines[2]["perplexity"] == done.evaluations[4].perplexity
    assert ("loss", 4, pytest.approx(done.records[1].loss)) in events(folder)


def events(folder):
    """The scalars in TensorBoard's event files: (name, step, value)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: its length, a checksum of four bytes, itself, a checksum of four bytes
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_a_progress_line_is_for_terminals(capsys):
    train(model(), Batches(), TrainConfig(**BASE | {"steps": 2}))
    assert capsys.readouterr() == ("", "")


def test_a_progress_line_says_how_it_goes():
    import io

    from rich.console import Console

    from tbjax.training.logs import ProgressLine

    shown = io.StringIO()
    line = ProgressLine(20, 0, console=Console(file=shown, force_terminal=True, width=200))
    line.write(10, {"loss": 2.5, "tokens_per_second": 12345.0, "mfu": 0.5, "memory": 2e9})
    line.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "step 10/20" in text
    assert "loss 2.5000 · 12,345 tokens/s · MFU 50.0% (causal) · 2.0 GB" in text


class Watched:
    """A figure that notes when it is read."""

    def __init__(self, value, name, seen):
        self.value, self.name, self.seen = value, name, seen

    def __array__(self, *arguments, **options):
        self.seen.append(self.name)
        return np.asarray(self.value)

    def __float__(self):
        return float(self.__array__())

    def is_ready(self):
        return False


def test_a_step_is_under_way_before_the_figures_of_the_one_before_it_are_read(monkeypatch):
    seen, make = [], loops.make_step

    def watched(*arguments, **options):
        step = make(*arguments, **options)

        def run(state, batch):
            number = 1 + sum(name.startswith("dispatch") for name in seen)
            seen.append(f"dispatch {number}")
            state, metrics = step(state, batch)
            return state, metrics._replace(loss=Watched(metrics.loss, f"read {number}", seen))

        run.lower = step.lower  # it is compiled before it runs
        return run

    monkeypatch.setattr(loops, "make_step", watched)
    train(model(), Batches(), TrainConfig(**BASE | {"steps": 3}))
    assert seen == ["dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3"]


# A token that the embedding table turns into infinity, and a batch in which it stands.
POISON = 5


def poisoned():
    found = model()
    table = found.embedding.weight[...]
    found.embedding.weight.set_value(jax.device_put(table.at[POISON].set(np.inf), table.sharding))
    return found


def sound(batch):
    return batch._replace(tokens=np.where(batch.tokens == POISON, 6, batch.tokens))


class Mixture:
    """Good batches, and a bad one."""

    def __init__(self, *bad):
        self.bad = bad

    def __iter__(self):
        for number in range(1, 100):
            good = sound(batch(number))
            yield good if number not in self.bad else good._replace(tokens=np.full_like(good.tokens, POISON))


# Embeddings that are not learned, so that the bad row takes no part in the good steps' gradients.
CAREFUL = BASE | {"steps": 4, "frozen": "embedding", "log_every": 1}


def test_a_step_that_is_not_finite_ends_the_run_before_it_does_harm(tmp_path):
    stopped = poisoned()
    with pytest.raises(Diverged, match=r"step 3: loss nan") as raised:
        train(stopped, Mixture(3), TrainConfig(**CAREFUL), checkpoint_dir=tmp_path)
    assert "the parameter embedding.weight was not finite already" in str(raised.value)
    before = train(poisoned(), Mixture(), TrainConfig(**CAREFUL | {"steps": 2}))
    assert same_bits(stopped, before.model)
    # It goes on as the error advises, from the step before and with the same batch.
    on = train(model(), Mixture(3), TrainConfig(**CAREFUL | {"on_nonfinite": "skip"}), checkpoint_dir=tmp_path)
    assert (on.step, len(on.losses)) == (4, 2)
    assert np.isnan(on.losses[0])
    assert np.isfinite(on.losses[1])


def test_a_step_that_is_not_finite_can_be_left_out(caplog):
    config = TrainConfig(**CAREFUL | {"on_nonfinite": "skip"})
    with caplog.at_level(logging.WARNING, "tbjax"):
        done = train(poisoned(), Mixture(2, 3), config)
    assert re.findall(r"step (\d): .*The step was skipped", caplog.text) == ["2", "3"]
    assert caplog.text.count("Before the step, the parameter embedding.weight") == 1  # looked for once
    assert np.isfinite(done.losses[3])
    assert np.isnan(done.losses[2])
    assert done.records[-1].skipped == 2
    assert all(np.isfinite(array).all() for array in arrays(done.state.model.stacks))


def test_a_place_that_cannot_be_found_is_no_reason_to_end(caplog, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(loops, "find_nonfinite", fails)
    done = train(poisoned(), Mixture(3), TrainConfig(**CAREFUL | {"on_nonfinite": "skip"}))
    assert done.step == 4
    assert "could not be found out: RESOURCE_EXHAUSTED" in caplog.text


def test_too_little_data_is_an_error_after_the_steps_that_there_are(tmp_path):
    short = model()
    with pytest.raises(DataEnded, match="the data ended after 3 steps of 10"):
        train(short, [batch(1), batch(2), batch(3)], TrainConfig(**BASE), checkpoint_dir=tmp_path)
    assert not same_bits(short, model())
    assert (tmp_path / "3" / "parameters").is_dir()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": np.zeros((ROWS, SEQUENCE), np.float32)}, "batch 2 of data: tokens is float32"),
        ({"targets": np.zeros((ROWS, 4), np.int32)}, "batch 2 of data: targets is int32"),
        ({"tokens": np.full((ROWS, SEQUENCE), 10**6)}, "tokens holds 1000000, but the model's vocabulary is 0 to"),
        (
            {"mask": np.ones((ROWS, SEQUENCE), bool)},
            "batch 2 of data has 8 sequences of 16 tokens .tokens, targets, ma",
        ),
    ],
)
def test_batches_that_cannot_be_are_named(changed, words):
    with pytest.raises(ValueError, match=words):
        train(model(), [batch(1), batch(2)._replace(**changed)], TrainConfig(**BASE))


def test_what_config_and_data_disagree_on_is_named():
    with pytest.raises(ValueError, match=r"batch_size=4, but the data's batches have 8"):
        train(model(), Batches(), TrainConfig(**BASE | {"batch_size": 4}))
    drawn = Batches()
    drawn.seed = 1
    with pytest.raises(ValueError, match=r"TrainConfig.seed=2, but the data's is 1"):
        train(model(), drawn, TrainConfig(**BASE | {"seed": 2}))
    with pytest.raises(ValueError, match="eval_every=5, but there is no eval_data"):
        train(model(), Batches(), TrainConfig(**BASE | {"eval_every": 5}))
    with pytest.raises(ValueError, match="save_every=5, but there is no checkpoint_dir"):
        train(model(), Batches(), TrainConfig(**BASE | {"save_every": 5}))


def test_a_profile_is_written(tmp_path):
    from tbjax.training.profiling import Profile

    config = TrainConfig(**BASE | {"steps": 5, "profile": str(tmp_path), "profile_steps": 2})
    # A run that goes on near its end traces what there is, or nothing.
    assert (Profile(config, 2).first, Profile(config, 2).last) == (5, 5)
    assert Profile(config, 3).folder is None
    train(model(), Batches(), config)
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="profile_steps=2 from step 3 on go beyond steps=3"):
        train(model(), Batches(), TrainConfig(**BASE | {"steps": 3, "profile": str(tmp_path), "profile_steps": 2}))


def test_a_signal_to_one_of_several_processes_ends_all_after_the_same_step():
    script = """
import os, signal
from tbjax.training.interruption import Interruption
with Interruption() as interruption:
    for step in range(1, 20):
        if step == 4 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if interruption.agreed():
            break
print(step, interruption.cause)
"""
    first, other = (out.splitlines()[-1] for out in processes.run(script, devices=1))
    assert (first, other) == ("5 a signal to another process", "5 SIGTERM")
