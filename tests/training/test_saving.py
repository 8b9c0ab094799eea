"""A run's checkpoints: of the step they name, whole or not there, and gone on from on any mesh."""

import logging
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.faults import fill
from benchmarks.kills import kill_again_and_again
from benchmarks.victims import Nursery, mounts
from tbjax import api, manifest, rows, stored
from tbjax.mesh import make_mesh
from tbjax.sharding import by_path
from tbjax.training import init_state
from tbjax.training.compression import TopK
from tbjax.training.config import TrainConfig
from tbjax.training.loop import train
from tbjax.training.optimizer import HOST
from tbjax.training.saving import SaveFailed, Saver, leeway, read_progress, saved_steps
from tests import processes
from tests.training.test_loop import BASE, Batches, arrays, same_bits
from tests.training.test_loop import CONFIG as SHAPE

SHORT = BASE | {"steps": 6, "log_every": 1}


def model(mesh=(1, 2, 1), *, layers=2, **options):
    import dataclasses

    shape = dataclasses.replace(SHAPE, layer_kinds=SHAPE.layer_kinds[:1] * layers)
    sizes = list(mesh.values()) if isinstance(mesh, dict) else mesh
    devices = jax.devices()[: int(np.prod(sizes))]
    return api.from_config(shape, make_mesh(mesh, devices), **{"dtype": "float32", "seed": 1} | options)


def state_of(made, *, fill=True, **options):
    """A state whose every number is another, wherever it lies."""
    config = TrainConfig(steps=10, precision="float32").with_plan(None)
    state = init_state(made, config.make_optimizer(made), **{"precision": "float32"} | options)
    if not fill:
        return state
    parts = as_stored(state)
    drawn = {
        name: np.random.default_rng(len(name)).standard_normal(array.shape).astype(array.dtype)
        for name, array in parts.items()
    }
    return drawn_into(state, drawn)


def as_stored(state):
    """The arrays of parameters and optimizer, stacks in the layers' order."""
    found = rows.in_order(by_path(state.model), state.model)
    for kind in ("mu", "nu"):
        moment = getattr(state.optimizer[1][0], kind)
        found |= {f"{kind} {path}": array for path, array in rows.in_order(moment, state.model).items()}
    return found


def drawn_into(state, drawn):
    """The state with these numbers, given in the layers' order."""
    from tbjax.sharding import with_arrays

    def placed(prefix, wanted):
        ordered = rows.in_order(wanted, state.model)
        arrays = {path: jax.device_put(drawn[prefix + path], array.sharding) for path, array in ordered.items()}
        return rows.on_stages(arrays, wanted, state.model)

    adam, *others = state.optimizer[1]
    adam = adam._replace(mu=placed("mu ", adam.mu), nu=placed("nu ", adam.nu))
    optimizer = (state.optimizer[0], (adam, *others), *state.optimizer[2:])
    return state._replace(
        model=with_arrays(state.model, placed("", by_path(state.model))), optimizer=type(state.optimizer)(optimizer)
    )


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def save(folder, state, *steps, **options):
    with Saver(folder, **options) as saver:
        for step in steps:
            saver.save(state, step, data={"position": step}, config=None)


@pytest.fixture(scope="module")
def state():
    return state_of(model())


def flip(path, at=None):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# What is saved.


def test_a_run_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_of_its_step(tmp_path, monkeypatch):
    """Steps 21 and 22 are done, and take the memory of the state, before the disk has step 20; 23 waits for it."""
    begun, may_end = stored.start, threading.Event()

    def slow(folder, arrays, **options):
        wait = begun(folder, arrays, **options)

        def later():
            assert may_end.wait(60)
            wait()

        return later

    seen = []

    def on_record(record):
        seen.append((record.step, saved_steps(tmp_path)))
        if record.step == 22:
            monkeypatch.undo()
            may_end.set()

    monkeypatch.setattr(stored, "start", slow)
    config = TrainConfig(**SHORT | {"save_every": 20, "steps": 23})
    train(model(), Batches(), config, checkpoint_dir=tmp_path, on_record=on_record)
    assert seen[19:] == [(20, []), (21, []), (22, []), (23, [20])]
    twenty = train(model(), Batches(), TrainConfig(**SHORT | {"steps": 20}))
    shutil.rmtree(tmp_path / "23")
    with Saver(tmp_path) as saver:
        assert same_bits(saver.restore(abstract(twenty.state)), twenty.state)


def test_a_run_that_waits_for_its_checkpoints_takes_no_step_before_they_are_there(tmp_path):
    seen = []
    config = TrainConfig(**SHORT | {"save_every": 2, "async_save": False, "steps": 5})
    train(
        model(),
        Batches(),
        config,
        checkpoint_dir=tmp_path,
        on_record=lambda record: seen.append((record.step, saved_steps(tmp_path))),
    )
    assert seen == [(1, []), (2, []), (3, [2]), (4, [2]), (5, [2, 4])]


def test_a_run_may_go_on_for_a_tenth_of_the_interval():
    assert [leeway(every) for every in (1, 2, 19, 20, 500)] == [1, 1, 1, 2, 50]


def test_memory_that_is_given_up_while_it_is_written_is_not_what_is_written(tmp_path):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    add = jax.jit(lambda arrays: jax.tree.map(lambda a: a + 1, arrays), donate_argnums=0)
    arrays = {f"a{i}": jax.device_put(np.full((4 << 20,), 7, np.float32), place) for i in range(4)}
    arrays = add(arrays)  # now the devices' own
    (tmp_path / "x").mkdir()
    wait = stored.start(tmp_path / "x", arrays)
    thread, turns = threading.Thread(target=wait), 0
    thread.start()
    while thread.is_alive():
        arrays, turns = jax.block_until_ready(add(arrays)), turns + 1
    stored.finish(tmp_path / "x")
    assert turns > 0
    assert float(arrays["a0"][0]) == 8 + turns
    found = stored.read(tmp_path / "x", arrays)
    assert all(np.all(np.asarray(array) == 8) for array in found.values())


def test_a_checkpoint_says_where_the_run_stood(tmp_path):
    config = TrainConfig(**SHORT | {"steps": 1})
    train(model(), Batches(), config, checkpoint_dir=tmp_path)
    found = read_progress(tmp_path / "1")
    assert (found.step, found.data, found.plan) == (1, {"position": 1}, None)
    assert found.config["learning_rate"] == config.learning_rate
    assert found.config["precision"] == "float32"


def test_the_newest_stay_and_those_of_every_so_many_steps(tmp_path, state):
    save(tmp_path, state, 1, 2, 3, 4, 5, keep=2, keep_every=2)
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert sorted(os.listdir(tmp_path)) == ["2", "4", "5"]


# Where it is restored.

LAYOUTS = {
    "eight devices, hybrid": lambda: model((2, 2, 2), layers=5, sharding="HYBRID_SHARD"),
    "optimizer alone sharded": lambda: model((4, 2, 1), layers=5, sharding="OPTIMIZER"),
    "uneven stages": lambda: model({"pp": 2, "tp": 2}, layers=5, stage_layers=[2, 3]),
    "interleaved": lambda: model({"pp": 2, "dp": 2}, layers=5, schedule="interleaved"),
    "not scanned": lambda: model((1, 2, 1), layers=5, scan=False),
}


@pytest.fixture(scope="module")
def layouts():
    """The same state on all of them, born where it is first asked for."""
    made = {}
    return lambda name: made.setdefault(name, state_of(LAYOUTS[name]()))


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("interleaved", "eight devices, hybrid"),
        ("eight devices, hybrid", "uneven stages"),
        ("uneven stages", "interleaved"),
        ("not scanned", "optimizer alone sharded"),
        ("optimizer alone sharded", "not scanned"),
    ],
)
def test_parameters_and_optimizer_are_restored_on_any_layout(tmp_path, layouts, there, here):
    save(tmp_path, layouts(there), 3)
    wanted = layouts(here)
    with Saver(tmp_path) as saver:
        saver.check(abstract(wanted))
        found = saver.restore(abstract(wanted))
    restored = as_stored(found)
    for name, array in as_stored(wanted).items():
        assert np.array_equal(np.asarray(restored[name]), np.asarray(array)), name
    for array, meant in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == meant.sharding


def test_what_lies_in_the_hosts_memory_comes_back_there(tmp_path):
    before = state_of(model(), fill=False, offload=("optimizer",))
    save(tmp_path, before, 3)
    with Saver(tmp_path) as saver:
        found = saver.restore(abstract(before))
    assert same_bits(found, before)
    places = [[array.sharding for array in jax.tree.leaves(state)] for state in (found, before)]
    assert places[0] == places[1]
    assert HOST in {place.memory_kind for place in places[0]}


def test_another_precision_converts_and_may_begin_to_scale(tmp_path, state, caplog):
    save(tmp_path, state, 3)
    half = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding) if a.dtype == jnp.float32 else a,
        abstract(state),
    )
    scaled = state_of(model(), fill=False, precision="float16")
    with caplog.at_level(logging.INFO, "tbjax"), Saver(tmp_path) as saver:
        saver.check(half)
        assert "parameters: what was saved as float32 goes on as bfloat16" in caplog.text
        found = saver.restore(half)
        assert {a.dtype for a in jax.tree.leaves(found.model)} == {jnp.dtype(jnp.bfloat16)}
        assert same_bits(found.model, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.model))
        like = abstract(scaled)._replace(loss_scale=scaled.loss_scale)
        saver.check(like)
        found = saver.restore(like)
    assert same_bits(found.model, state.model)
    assert same_bits(found.loss_scale, scaled.loss_scale)


@pytest.mark.parametrize(("there", "here"), [((4, 1, 1), (2, 1, 1)), ((2, 1, 1), (4, 2, 1))])
def test_what_compression_has_not_sent_stays_the_same_in_sum_on_another_dp(tmp_path, there, here):
    before = state_of(model(there), fill=False, compression=TopK(0.1))
    draw = np.random.default_rng(0)
    residual = {
        path: jax.device_put(draw.standard_normal(array.shape).astype(np.float32), array.sharding)
        for path, array in before.residual.items()
    }
    save(tmp_path, before._replace(residual=residual), 3)
    wanted = abstract(state_of(model(here), fill=False, compression=TopK(0.1)))
    with Saver(tmp_path) as saver:
        saver.check(wanted)
        found = saver.restore(wanted).residual
    for path, array in found.items():
        assert array.sharding == wanted.residual[path].sharding
        np.testing.assert_allclose(np.asarray(array).sum(0), np.asarray(residual[path]).sum(0), rtol=1e-5, atol=1e-6)


RESUMED = [
    ((2, 2, 2), {"sharding": "HYBRID_SHARD"}, {}),
    ({"pp": 2, "dp": 2}, {"schedule": "interleaved"}, {"microbatches": 4}),
    ({"pp": 2, "tp": 2}, {"stage_layers": [1, 3]}, {"microbatches": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "layout", "settings"), RESUMED, ids=["hybrid", "interleaved", "uneven"])
def test_a_run_goes_on_elsewhere_with_the_same_losses(tmp_path, mesh, layout, settings):
    """Five steps here and five there: the losses of ten here, to 1e-5."""
    whole = train(model(layers=4), Batches(), TrainConfig(**BASE))
    train(model(layers=4), Batches(), TrainConfig(**BASE | {"steps": 5}), checkpoint_dir=tmp_path)
    on = train(model(mesh, layers=4, **layout), Batches(), TrainConfig(**BASE | settings), checkpoint_dir=tmp_path)
    assert on.step == 10
    np.testing.assert_allclose(on.losses, whole.losses[5:], rtol=1e-5)
    # And back.
    shutil.rmtree(tmp_path)
    five = TrainConfig(**BASE | settings | {"steps": 5})
    train(model(mesh, layers=4, **layout), Batches(), five, checkpoint_dir=tmp_path)
    back = train(model(layers=4), Batches(), TrainConfig(**BASE), checkpoint_dir=tmp_path)
    np.testing.assert_allclose(back.losses, whole.losses[5:], rtol=1e-5)


# What is not whole.


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "manifest"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_names_those_it_skips(tmp_path, state, caplog, damage):
    save(tmp_path, state, 1, 2)
    file = tmp_path / "2" / "manifest" if damage == "manifest" else largest(tmp_path / "2")
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        flip(file)
    (tmp_path / ".3.partial" / "parameters").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "tbjax"), Saver(tmp_path) as saver:
        assert saver.latest == 1
        assert saver.progress().data == {"position": 1}
        assert list(saver.skipped) == [".3.partial", "2"]
        assert same_bits(saver.restore(abstract(state)), state)
        saver.save(state, 2, data=None, config=None)
    assert "checkpoint" in caplog.text
    assert file.name in saver.skipped["2"]
    assert "3 was not finished" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.damaged"]
    assert Saver(tmp_path).latest == 2


def test_a_run_none_of_whose_checkpoints_is_whole_is_not_begun_anew_unasked(tmp_path, state):
    save(tmp_path, state, 1)
    flip(largest(tmp_path / "1"))
    with pytest.raises(manifest.Damaged, match=r"none of its checkpoints is whole .*not as it was written"):
        Saver(tmp_path)
    assert os.listdir(tmp_path) == ["1"]  # where it was


def full(folder):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_checkpoint_that_cannot_be_written_costs_itself_or_ends_the_run(tmp_path, monkeypatch, caplog, policy):
    config = TrainConfig(**SHORT | {"save_every": 2, "on_failed_save": policy})

    def on_record(record):
        if record.step == 1:
            monkeypatch.setattr(stored, "finish", full)
        elif record.step == 5:
            monkeypatch.undo()

    learning = model()
    if policy == "stop":
        with pytest.raises(SaveFailed, match=r"2 could not be written, and those before it are as they were: .*No sp"):
            train(learning, Batches(), config, checkpoint_dir=tmp_path, on_record=on_record)
        assert os.listdir(tmp_path) == []
    else:
        assert train(learning, Batches(), config, checkpoint_dir=tmp_path, on_record=on_record).step == 6
        assert saved_steps(tmp_path)[-1] == 6
        assert 2 not in saved_steps(tmp_path)
    assert not same_bits(learning, model())  # it has what it has learned
    assert "checkpoint" in caplog.text
    assert "No space left on device" in caplog.text


def test_the_last_checkpoint_must_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "finish", full)
    with pytest.raises(SaveFailed, match="No space left"):
        train(model(), Batches(), TrainConfig(**SHORT | {"steps": 1}), checkpoint_dir=tmp_path)


# Killed.


def test_killed_at_any_moment_a_run_loses_no_more_than_the_interval(tmp_path):
    check_kills(tmp_path, 3, seed=2)


@pytest.mark.slow
def test_killed_many_times_a_run_loses_no_more_than_the_interval(tmp_path):
    """TBJAX_KILLS=500 for as many."""
    check_kills(tmp_path, int(os.environ.get("TBJAX_KILLS", "50")), seed=int(os.environ.get("TBJAX_SEED", "0")))


def check_kills(folder, count, seed):
    with Nursery(folder) as nursery:
        report = kill_again_and_again(nursery, folder, count, seed=seed)
    assert report.differing == []
    assert [kill for kill in report.kills if not kill.survived] == []
    assert report.survived == count


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="this user may not mount a file system in a namespace of its own")
def test_a_full_disk_is_said_keeps_what_is_there_and_costs_the_run_nothing(tmp_path):
    """A real one, of 8 MB, that has room again in the end."""
    with Nursery(tmp_path, disk="8m") as nursery:
        run, ballast = nursery.disk / "run", nursery.disk / "ballast"
        victim = nursery.start(nursery.mounted / "run", save_every=20)
        assert victim.wait_for(lambda: bool(saved_steps(run)))
        fill(ballast)
        assert victim.wait_for(lambda: "could not be written" in victim.text)
        whole, before = saved_steps(run), max(victim.steps)
        assert victim.wait_for(lambda: max(victim.steps) > before + 40)
        assert saved_steps(run) == whole
        ballast.unlink()
        assert victim.wait_for(lambda: max(saved_steps(run)) > before + 40)
        victim.kill()
        again = nursery.start(nursery.mounted / "run", save_every=20)
        assert again.wait_for(lambda: bool(again.steps))
        assert again.began > before
        again.kill()
    assert "No space left on device" in victim.text
    assert "Traceback" not in victim.text  # the error has said it


# Several processes.


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_share_the_writing_the_checking_and_the_failing(tmp_path, count):
    script = """
import logging, os, pathlib
import jax.experimental.multihost_utils
import numpy as np
import tensorstore
from tbjax import manifest, stored
from tbjax.training.saving import SaveFailed, Saver, saved_steps
from tests.training.test_saving import abstract, flip, largest, model, same_bits, state_of

def read_from_disk():
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])

run = pathlib.Path(sys.argv[4])
one = jax.process_index() == 1
state = state_of(model((1, 4, 2)), fill=False)
with Saver(run, keep=3) as saver:
    saver.save(state, 1, data={"position": 1}, config=None)
    saver.save(state, 2, data={"position": 2}, config=None)
    saver.wait()
    assert saver.latest == 2, saver.latest
owners = {manifest.owner(name) for name in manifest.read(run / "2")}
assert owners == set(range(jax.process_count())), owners

# One process that cannot write its part: no checkpoint, in neither.
begun = stored.start
def full(*arguments, **options):
    raise OSError(28, "No space left on device")
if one:
    stored.start = full
with Saver(run, keep=3) as saver:
    saver.save(state, 3, data=None, config=None)
    try:
        saver.wait()
    except SaveFailed as error:
        assert "process 1 could not write its part" in str(error), error
    else:
        raise SystemExit("what was not written was not missed")
stored.start = begun
assert saved_steps(run) == [1, 2], saved_steps(run)

# What one of them finds damaged is not restored by the other.
if one:
    flip(largest(run / "2"))
jax.experimental.multihost_utils.sync_global_devices("flipped")
with Saver(run, keep=3) as saver:
    assert saver.latest == 1, saver.latest
    assert list(saver.skipped) == ["2"], saver.skipped
    before = read_from_disk()
    restored = saver.restore(abstract(state))
    # Its own shards, and little besides: the data are cut over the processes, the index is not.
    share = (read_from_disk() - before) / sum(a.nbytes for a in jax.tree.leaves(state))
    assert share < 1.3 / jax.process_count(), share
total = jax.jit(lambda tree: sum(abs(leaf).sum() for leaf in jax.tree.leaves(tree)))
assert total(restored.model) == total(state.model)
"""
    processes.run(
        "import jax.experimental.multihost_utils\n" + script, tmp_path / "run", count=count, devices=8 // count
    )
    # And on one process, on another mesh.
    here = state_of(model((2, 2, 2)), fill=False)
    with Saver(tmp_path / "run") as saver:
        assert saver.latest == 1
        found = saver.restore(abstract(here))
    # Born by another program, whose last bits may differ.
    for array, meant in zip(arrays(found.model), arrays(here.model), strict=True):
        np.testing.assert_allclose(array, meant, rtol=1e-5, atol=1e-7)
