"""The search returns what pricing everything would, and says why the rest was not chosen."""

import collections
import dataclasses
import itertools
import math

import pytest
from jax.sharding import AbstractMesh, AxisType

import tbjax.planner.search
from interop.families import Fields, family
from tbjax.mesh import AXES
from tbjax.planner.cost import step_time
from tbjax.planner.hardware import cluster
from tbjax.planner.legal import Space
from tbjax.planner.memory import memory
from tbjax.planner.models import describe
from tbjax.planner.parameters import tensors
from tbjax.planner.search import search
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import Sharding


def described(name):
    values = describe(name)
    return family(values["model_type"]).config(Fields(values, name))


# --- Everything, slowly -----------------------------------------------------------------------------------------------


def every_mesh(config, workload, where):
    """Every mesh on which the model, the batch and the sequence can be cut: tried one by one."""
    sizes = [n for n in range(1, where.devices + 1) if where.devices % n == 0]
    domain = where.fast_domain if where.hardware.torus else max(where.fast_domain, where.devices_per_host)
    for mesh in itertools.product(sizes, repeat=6):
        if math.prod(mesh) != where.devices:
            continue
        pp, dp, fsdp, ep, cp, tp = mesh
        if (ep > 1 and config.moe is None) or (pp > 1 and (len(config.groups) > 1 or pp > config.groups[0].repeats)):
            continue
        sequence = workload.prompt_len
        chunks = 2 * cp if cp > 1 else 1
        if workload.global_batch % (dp * fsdp * ep) or sequence % chunks or domain % tp:
            continue
        sharding = Sharding(AbstractMesh((1, *mesh[1:]), AXES, axis_types=(AxisType.Auto,) * 6))
        try:
            for tensor in tensors(config):
                sharding.parameter(tensor.dims, tensor.shape, tensor.path)
        except ValueError:
            continue
        yield dict(zip(AXES, mesh, strict=True))


def every_schedule(config, pp, microbatches):
    if pp == 1:
        return [("1f1b", 1)]
    repeats = config.groups[0].repeats
    found = [("1f1b", 1), ("gpipe", 1)]
    if microbatches >= pp:
        found.append(("zb-h1", 1))
    if microbatches >= 2 * pp - 1:
        found.append(("zb-h2", 1))
        found += [("zb-v", 1)] if repeats % (2 * pp) == 0 else []
    if microbatches % pp == 0 and repeats % pp == 0:
        found += [("interleaved", v) for v in range(2, repeats // pp + 1) if repeats // pp % v == 0]
    return found


def every_layout(config, workload, where):
    """Every legal layout: nothing is left out because it cannot win."""
    for mesh in every_mesh(config, workload, where):
        rows = workload.global_batch // (mesh["dp"] * mesh["fsdp"] * mesh["ep"])
        counts = [m for m in range(1, rows + 1) if rows % m == 0]
        if not workload.training:
            for m in counts if mesh["pp"] > 1 else [1]:
                yield Layout(**mesh, microbatches=m, remat="none")
            continue
        cuttable = mesh["tp"] > 1 and workload.seq_len % (mesh["cp"] * mesh["tp"]) == 0
        for m, strategy, parallel, remat, offload in itertools.product(
            counts,
            ("FULL_SHARD", "SHARD_GRAD_OP", "OPTIMIZER") if mesh["fsdp"] * mesh["ep"] > 1 else ("FULL_SHARD",),
            (False, True) if cuttable else (False,),
            ("none", "dots", "full", "stage") if mesh["pp"] > 1 else ("none", "dots", "full"),
            ((), ("optimizer",), ("activations",), ("optimizer", "activations")),
        ):
            if "activations" in offload and (mesh["pp"] > 1 or remat == "none"):
                continue
            for schedule, chunks in every_schedule(config, mesh["pp"], m):
                yield Layout(
                    **mesh,
                    strategy=STRATEGIES[strategy],
                    sequence_parallel=parallel,
                    microbatches=m,
                    remat=remat,
                    offload=offload,
                    schedule=schedule,
                    chunks=chunks,
                )


STRATEGIES = {strategy.name: strategy for strategy in type(Layout().strategy)}


def exhaustively(config, workload, where):
    """The least time and the least memory of anything that fits, or None; and how many layouts there are."""
    kind, seconds, nbytes, number = where.hardware, math.inf, math.inf, 0
    for layout in every_layout(config, workload, where):
        number += 1
        held = memory(config, workload, layout, kind)
        if held.total <= kind.usable and held.host <= kind.host_memory_per_device:
            seconds = min(seconds, step_time(config, workload, layout, where).total)
            nbytes = min(nbytes, held.total)
    return seconds, nbytes, number


# Models x machines x tasks: memory ample and scarce, dense and sparse, few and many KV heads, one host, several, tori.
SCENARIOS = [
    ("llama-2-7b-hf", "h100:8", "train", 32, 4096),
    ("llama-2-7b-hf", "v5e:4x4", "train", 32, 2048),
    ("llama-2-7b-hf", "a10g:4", "train", 16, 1024),
    ("llama-2-13b-hf", "v5p:2x2x2", "train", 32, 4096),
    ("llama-2-70b-hf", "a100-80:2x8", "train", 16, 4096),
    ("llama-2-70b-hf", "h100:8", "train", 8, 2048),
    ("llama-3.1-8b", "a100-40:8", "train", 16, 8192),
    ("mistral-7b-v0.1", "h200:4", "train", 12, 4096),
    ("mixtral-8x7b-v0.1", "h100:8", "train", 16, 4096),
    ("mixtral-8x7b-v0.1", "h200:8", "train", 16, 2048),
    ("falcon-7b", "l4:8", "train", 16, 2048),
    ("falcon-40b", "h200:8", "train", 16, 2048),
    ("gemma-2-9b", "a10g:8", "train", 8, 1024),
    ("qwen2.5-7b", "h100:6", "train", 18, 4096),
    ("qwen3-30b-a3b", "gb200:2x4", "train", 16, 4096),
    ("llama-2-7b-hf", "h100:8", "inference", 64, 2048),
    ("llama-2-70b-hf", "h100:2x8", "inference", 32, 4096),
    ("mixtral-8x7b-v0.1", "a100-80:8", "inference", 16, 2048),
    ("falcon-40b", "v5e:4x4", "inference", 16, 2048),
    ("llama-3.1-8b", "v6e:2x4", "inference", 8, 8192),
]


@pytest.mark.parametrize(("name", "spec", "task", "batch", "length"), SCENARIOS)
def test_the_best_of_all_layouts_is_found(name, spec, task, batch, length):
    config, where = described(name), cluster(spec)
    new_tokens = 0 if task == "train" else length // 8
    workload = Workload(task=task, global_batch=batch, seq_len=length, new_tokens=new_tokens)
    seconds, nbytes, number = exhaustively(config, workload, where)
    assert number > 20
    space = Space(config, workload, where)
    quickest, smallest = search(space), search(space, "memory")
    assert quickest.fits == smallest.fits == (seconds < math.inf)
    if quickest.fits:
        assert quickest.best[0].time.total == seconds
        assert smallest.best[0].memory.total == nbytes
    else:
        assert quickest.best[0].memory.total > where.hardware.usable


def test_the_scenarios_are_of_both_kinds():
    assert len(SCENARIOS) == len(set(SCENARIOS)) == 20


# --- What is found ----------------------------------------------------------------------------------------------------


def found(spec="h100:2x8", objective="throughput", name="llama-2-13b-hf", batch=64, **fixed):
    space = Space(described(name), Workload(global_batch=batch, seq_len=2048), cluster(spec), fixed)
    return space, search(space, objective)


def test_the_runners_up_are_on_meshes_of_their_own_and_in_order():
    _, result = found()
    meshes = [tuple(candidate.layout.mesh.values()) for candidate in result.best]
    assert len(meshes) == len(set(meshes)) == 6
    times = [candidate.time.total for candidate in result.best]
    assert times == sorted(times)


def test_on_a_fixed_mesh_the_runners_up_differ_in_what_goes_with_it():
    _, result = found(pp=1, dp=1, fsdp=8, ep=1, cp=1, tp=2)
    assert len({candidate.layout for candidate in result.best}) == 6
    assert {tuple(candidate.layout.mesh.values()) for candidate in result.best} == {(1, 1, 8, 1, 1, 2)}


def test_every_candidate_fits_and_has_the_price_of_its_layout():
    space, result = found()
    for candidate in result.best:
        assert candidate.memory == memory(space.config, space.workload, candidate.layout, space.cluster.hardware)
        assert candidate.time == step_time(space.config, space.workload, candidate.layout, space.cluster)
        assert candidate.memory.total <= space.cluster.hardware.usable


def test_every_mesh_is_a_candidate_or_rejected():
    space, result = found()
    legal, illegal = space.meshes()
    others = len(legal) + sum(rejection.count for rejection in illegal) - len(result.best)
    assert sum(rejection.count for rejection in result.rejected) == others


def test_what_does_not_fit_is_rejected_with_what_is_missing():
    space, result = found("a10g:8")
    reasons = [rejection for rejection in result.rejected if "more than the" in rejection.reason]
    assert len(reasons) == 1
    assert "however much is recomputed and offloaded" in reasons[0].reason
    example = Layout(**reasons[0].example)
    assert all(
        memory(space.config, space.workload, layout, space.cluster.hardware).total > space.cluster.hardware.usable
        for layout in space.layouts(example)
    )


def test_only_meshes_on_which_nothing_fits_are_said_not_to_fit():
    """Where some layouts of a mesh fit, it was beaten, though its most promising ones have no room."""
    space, result = found("a100-40:2x8", batch=256, offload=())
    meshes, _ = space.meshes()
    usable = space.cluster.hardware.usable
    full = [
        mesh
        for mesh in meshes
        if all(memory(space.config, space.workload, each, space.cluster.hardware).total > usable
               for each in space.layouts(mesh))
    ]  # fmt: skip
    assert 0 < len(full) < len(meshes) - len(result.best)
    assert sum(rejection.count for rejection in result.rejected if "can hold" in rejection.reason) == len(full)
    assert not any("host" in rejection.reason for rejection in result.rejected)


def test_what_is_slower_is_rejected_with_what_costs_most():
    _, result = found()
    assert any("costs most in: " in rejection.reason for rejection in result.rejected)


def test_replicated_kv_heads_are_named():
    config = dataclasses.replace(described("llama-2-13b-hf"), kv_heads=2)
    space = Space(config, Workload(global_batch=64, seq_len=2048), cluster("h100:8"))
    assert any(r.reason.startswith("2 KV heads < tp 4: KV replicated") for r in search(space).rejected)


def test_whatever_was_fixed_stands():
    _, result = found(tp=4, remat="full", microbatches=2)
    assert {(c.layout.tp, c.layout.remat, c.layout.microbatches) for c in result.best} == {(4, "full", 2)}


def test_where_nothing_fits_the_closest_is_returned_and_the_host_is_not_overdrawn():
    space, result = found("a10g:2", name="llama-2-70b-hf", batch=4)
    assert not result.fits
    kind = space.cluster.hardware
    least = min(
        held.total
        for layout in every_layout(space.config, space.workload, space.cluster)
        if (held := memory(space.config, space.workload, layout, kind)).host <= kind.host_memory_per_device
    )
    assert result.best[0].memory.total == least > kind.usable
    assert result.best[0].memory.host <= kind.host_memory_per_device


def test_where_no_mesh_is_legal_the_next_batch_that_would_do_is_named():
    with pytest.raises(ValueError, match=r"12 sequences .* fsdp=16 .*global_batch=16 would do"):
        found(batch=12, fsdp=16)


def test_where_no_mesh_is_legal_the_nearest_mesh_is_named():
    with pytest.raises(ValueError, match=r"no experts .*A mesh that would do: \(8, 1, 2\)"):
        found(ep=8, tp=2)


def test_an_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'speed'.*'throughput', 'latency', 'memory'"):
        found(objective="speed")


def test_the_largest_search_prices_a_small_part_of_all_layouts(monkeypatch):
    priced = collections.Counter()
    for price in (step_time, memory):

        def counted(*arguments, price=price):
            priced[price.__name__] += 1
            return price(*arguments)

        monkeypatch.setattr(tbjax.planner.search, price.__name__, counted)
    config, where = described("llama-3.1-405b"), cluster("h100:2048x8")
    space = Space(config, Workload(global_batch=2048, seq_len=8192), where, {"offload": ()})
    assert search(space).fits
    layouts = sum(
        len(space.schedules(dataclasses.replace(mesh, remat=remat), count))
        for mesh in space.meshes()[0]
        for strategy, parallel in itertools.product(space.strategies(mesh), space.sequence_parallel(mesh))
        for remat, count in itertools.product(space.remats(mesh), space.microbatches(mesh))
    )
    assert layouts > 300_000
    assert max(priced.values()) < layouts / 8
