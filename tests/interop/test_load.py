"""Loading: what arrives is the checkpoint, wherever and however it is laid out, and each byte was read once."""

import itertools
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from interop import destinations
from interop.bindings import bindings
from interop.load import Budget, load_parameters
from interop.readers.base import CheckpointError, SourceTensor
from interop.readers.memory import MemoryCheckpoint
from tbjax.api import abstract
from tests import by_table, tiny

MESHES = [(1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2), {"pp": 2, "fsdp": 2, "tp": 2}]
LLAMA, MIXTRAL = tiny.BY_NAME["llama"], tiny.BY_NAME["mixtral"]


def load(case, mesh=(1, 4, 2), *, dtype=None, tensors=None, **options):
    config = tiny.our_config(case)
    checkpoint = MemoryCheckpoint(tiny.tensors(case) if tensors is None else tensors)
    return load_parameters(abstract(config, mesh, dtype=dtype), config, case.family, checkpoint, **options)


def values(model):
    return {path: variable.get_value() for path, variable in by_table.paths(model).items()}


def assert_is_checkpoint(model, case):
    for path, expected in by_table.read(tiny.our_config(case), tiny.tensors(case)).items():
        np.testing.assert_array_equal(np.asarray(values(model)[path]), expected, err_msg=path)


@pytest.mark.parametrize("staged", [False, True], ids=["in host memory", "on devices"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", [LLAMA, MIXTRAL, tiny.BY_NAME["falcon"]], ids=str)
def test_a_model_is_its_checkpoint_on_every_mesh_by_both_ways(case, mesh, staged):
    wanted = abstract(tiny.our_config(case), mesh)
    model = load(case, mesh, staged=staged)
    assert_is_checkpoint(model, case)
    for struct, array in zip(jax.tree.leaves(wanted), jax.tree.leaves(model), strict=True):
        assert array.sharding == struct.sharding
        assert array.dtype == struct.dtype
    assert jax.tree.structure(wanted) == jax.tree.structure(model)


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_every_case_is_its_checkpoint(case):
    assert_is_checkpoint(load(case, (2, 2, 2)), case)


def test_experts_may_lie_on_different_devices():
    assert_is_checkpoint(load(MIXTRAL, {"ep": 4, "tp": 2}), MIXTRAL)
    assert_is_checkpoint(load(MIXTRAL, {"ep": 4, "tp": 2}, staged=True), MIXTRAL)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("staged", [False, True])
def test_what_several_devices_hold_is_read_once(mesh, staged):
    reports = []
    load(LLAMA, mesh, staged=staged, report=reports.append)
    assert reports[0].bytes_read == sum(tensor.nbytes for tensor in tiny.tensors(LLAMA).values())
    assert reports[0].seconds > 0


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["llama-odd-vocabulary", "llama-odd-vocabulary-tied"])
def test_the_padding_of_the_vocabulary_is_zero(name, staged):
    case = tiny.BY_NAME[name]
    embedding = values(load(case, (1, 1, 8), staged=staged))["embedding.weight"]
    size = tiny.our_config(case).vocab_size
    assert embedding.shape[0] > size
    assert not np.asarray(embedding)[size:].any()


@pytest.mark.parametrize("staged", [False, True])
def test_numbers_are_converted_on_the_way(staged):
    loaded = values(load(MIXTRAL, dtype="bfloat16", staged=staged))
    for path, exact in by_table.read(tiny.our_config(MIXTRAL), tiny.tensors(MIXTRAL)).items():
        assert loaded[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(loaded[path]), exact.astype(ml_dtypes.bfloat16))


def test_the_cpu_backend_adopts_the_buffers_without_a_copy(monkeypatch):
    made = {}

    def remember(*args, **options):
        array = aligned(*args, **options)
        made[array.ctypes.data] = array.nbytes
        return array

    aligned = destinations.aligned
    monkeypatch.setattr(destinations, "aligned", remember)
    for array in jax.tree.leaves(load(LLAMA)):
        for shard in array.addressable_shards:
            assert made[shard.data.unsafe_buffer_pointer()] == shard.data.nbytes


def test_a_buffer_that_several_devices_share_survives_donation():
    double = jax.jit(lambda x: 2 * x, donate_argnums=0)
    expected = by_table.read(tiny.our_config(LLAMA), tiny.tensors(LLAMA))
    for path, array in values(load(LLAMA, (8, 1, 1))).items():
        given, kept = (array.addressable_shards[i].data for i in (0, 5))
        assert given.unsafe_buffer_pointer() == kept.unsafe_buffer_pointer()
        np.testing.assert_array_equal(np.asarray(double(given)), 2 * expected[path])
        assert given.is_deleted()
        np.testing.assert_array_equal(np.asarray(kept), expected[path])


# --- The budget -------------------------------------------------------------------------------------------------------


def test_a_budget_lets_in_what_fits_and_anything_alone():
    budget = Budget(10)
    budget.acquire(4)
    budget.acquire(6)
    entered = threading.Event()
    large = threading.Thread(target=lambda: (budget.acquire(25), entered.set()))
    large.start()
    budget.release(4)
    assert not entered.is_set()  # six are still held
    budget.release(6)
    large.join(timeout=60)
    assert entered.is_set()


@pytest.mark.parametrize("budget", [1, 1000, 1 << 20])
@pytest.mark.parametrize("staged", [False, True])
def test_any_budget_loads_the_same(budget, staged):
    assert_is_checkpoint(load(MIXTRAL, budget=budget, staged=staged, threads=3), MIXTRAL)


@pytest.mark.parametrize("budget", [1, 6000, 1 << 20])
def test_no_staged_job_holds_more_than_the_budget_or_one_slice(budget):
    config = tiny.our_config(LLAMA)
    model = abstract(config, (1, 4, 2))
    structs = dict(zip(by_table.paths(model), jax.tree.leaves(model), strict=True))
    checkpoint = MemoryCheckpoint(tiny.tensors(LLAMA))
    for binding in bindings(model, config, LLAMA.family):
        destination = destinations.DeviceDestination(structs[binding.path], budget=budget)
        piece = max(np.prod(shard.shape[len(binding.part) :]) * 4 for shard in destination._shards)
        jobs = list(destination.jobs(binding, checkpoint[binding.source]))
        assert all(job.holds <= max(budget, piece) for job in jobs)
        assert sum(job.reads for job in jobs) == checkpoint[binding.source].nbytes


@pytest.mark.parametrize(("name", "value"), [("budget", 0), ("budget", 1.5), ("threads", 0)])
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        load(LLAMA, **{name: value})


# --- What goes wrong --------------------------------------------------------------------------------------------------


class Failing(SourceTensor):
    """A tensor whose disk fails."""

    def read(self, index=()):
        raise OSError("the disk is gone")


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_a_read_that_fails_ends_the_load_with_its_error(budget):
    config, checkpoint = tiny.our_config(LLAMA), MemoryCheckpoint(tiny.tensors(LLAMA))
    good = checkpoint["model.norm.weight"]
    checkpoint._tensors["model.norm.weight"] = Failing(good.name, good.shape, good.dtype, good.file, good.nbytes)
    with pytest.raises(OSError, match="the disk is gone"):
        load_parameters(abstract(config, (1, 4, 2)), config, LLAMA.family, checkpoint, budget=budget)


def test_a_checkpoint_of_another_model_is_refused_before_it_is_read():
    tensors = tiny.tensors(LLAMA)
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"model.norm.weight"):
        load(LLAMA, tensors=tensors)


def test_a_value_that_the_wanted_dtype_cannot_hold_is_refused():
    tensors = tiny.tensors(LLAMA)
    tensors["model.norm.weight"] = np.full(32, 1e30, np.float32)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has values beyond the range of float16"):
        load(LLAMA, dtype="float16", tensors=tensors)


def test_a_model_without_shardings_is_refused():
    config = tiny.our_config(LLAMA)
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract(config, (1, 4, 2)))
    with pytest.raises(ValueError, match=r"embedding.weight has no sharding"):
        load_parameters(bare, config, LLAMA.family, MemoryCheckpoint(tiny.tensors(LLAMA)))


TIED = tiny.BY_NAME["llama-tied"]


def test_a_tied_model_may_hold_its_embedding_twice():
    tensors = tiny.tensors(TIED)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    reports = []
    assert_is_checkpoint(load(TIED, tensors=tensors, report=reports.append), TIED)
    assert reports[0].bytes_read == weights + 2 * head.nbytes  # to be compared, both are read


@pytest.mark.parametrize("row", [0, tiny.VOCABULARY - 1])
def test_a_head_that_differs_from_the_tied_embedding_is_refused(row):
    tensors = tiny.tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][row, -1] += 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load(TIED, tensors=tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float16)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs"):
        load(TIED, tensors=tensors)


# --- The bar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terminal", "wanted"), list(itertools.product([True, False], [True, False])))
def test_a_bar_is_shown_on_a_terminal_unless_unwanted(terminal, wanted, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    load(LLAMA, progress=wanted)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert bool(printed.err) == (terminal and wanted)
    if printed.err:
        assert "loading" in printed.err
        assert "kB" in printed.err
        assert "/s" in printed.err
