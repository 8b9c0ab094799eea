"""The planner's memory: what it says when one thing is changed, and the facts that it shares with the program."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as draw

from benchmarks.planner_memory import model
from tbjax import room, sharding
from tbjax.layers import attend, blocks
from tbjax.layers.attention import HeadLayout
from tbjax.pipeline.grid import lay_out
from tbjax.pipeline.schedule import named
from tbjax.planner import liveness
from tbjax.planner.flight import activations_in_flight, arrivals_in_flight
from tbjax.planner.hardware import cluster
from tbjax.planner.memory import Memory, memory
from tbjax.planner.moments import LOGITS_CHUNK, STATIONARY_SHARE
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import ShardingStrategy
from tbjax.training import loss

H100 = cluster("h100:8").hardware
LLAMA = model("llama-2-7b")
MIXTRAL = model("mixtral-8x7b")
TRAIN = Workload(global_batch=64, seq_len=4096)
SERVE = Workload(task="inference", global_batch=64, seq_len=4096, new_tokens=1024)
FSDP = Layout(fsdp=8)


def held(workload: Workload = TRAIN, layout: Layout = FSDP, config=LLAMA, **changed) -> Memory:
    return memory(config, workload, dataclasses.replace(layout, **changed), H100)


# Facts that stand in the program too: the planner builds no model, so it says them again.


def test_chunks_and_blocks_are_those_of_the_program() -> None:
    assert LOGITS_CHUNK == loss.CHUNK_BYTES
    assert STATIONARY_SHARE == sharding.STATIONARY_SHARE
    assert (liveness.SCORE_BYTES, liveness.BLOCK_MULTIPLE) == (blocks.SCORE_BYTES, blocks.BLOCK_MULTIPLE)
    cudnn = (liveness.CUDNN_CAPABILITY, liveness.CUDNN_HEAD_DIM)
    assert cudnn == (attend.CUDNN_CAPABILITY, attend.CUDNN_HEAD_DIM)
    assert liveness.SPLASH_MULTIPLE == attend.SPLASH_MULTIPLE


@given(queries=draw.integers(1, 40_000), keys=draw.integers(1, 40_000), heads=draw.integers(1, 512))
def test_a_block_of_queries_is_the_programs(queries: int, keys: int, heads: int) -> None:
    assert liveness.block_of(queries, keys, heads) == blocks.block_queries(queries, keys, heads)
    assert liveness.band_of(queries) == blocks.bands_of(queries, None)[0].last


@given(kv_heads=draw.integers(1, 16), group=draw.integers(1, 16), tp=draw.integers(1, 32))
def test_heads_of_a_device_are_the_programs(kv_heads: int, group: int, tp: int) -> None:
    layout = HeadLayout.fit(kv_heads * group, kv_heads, tp)
    expected = (layout.total // tp * layout.group, layout.total // tp)
    assert liveness.heads_on_device(kv_heads * group, kv_heads, tp) == expected


# What training holds.


def test_parameters_and_optimizer_take_sixteen_bytes_less_the_gradients() -> None:
    parts = held().parts
    per_device = 6_738_415_616 / 8
    assert parts["parameters"] == pytest.approx(4 * per_device, rel=1e-3)
    assert parts["optimizer"] == 2 * parts["parameters"]


@pytest.mark.parametrize(
    ("optimizer", "arrays"), [("adamw", 2), ("lion", 1), ("sgd", 1), ("muon", 1.04), ("adafactor", 0)]
)
def test_an_optimizer_holds_its_arrays(optimizer, arrays: int) -> None:
    parts = held(dataclasses.replace(TRAIN, optimizer=optimizer)).parts
    assert parts.get("optimizer", 0) == pytest.approx(arrays * parts["parameters"], rel=0.05, abs=1e8)


def test_each_strategy_cuts_more_than_the_one_before() -> None:
    order = ("NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP", "FULL_SHARD")
    totals = [held(layout=Layout(fsdp=8, strategy=ShardingStrategy(name))).total for name in order]
    assert totals == sorted(totals, reverse=True)
    assert held(layout=Layout(dp=8)).parts["parameters"] == pytest.approx(8 * held().parts["parameters"], rel=1e-3)


def test_remat_holds_less_the_more_it_computes_again() -> None:
    totals = [held(remat=remat).total for remat in ("none", "dots", "full")]
    assert totals == sorted(totals, reverse=True)
    assert held().parts["saved activations"] == 32 * 8 * 4096 * 4096 * 2  # layers, rows, sequence, embed, bytes


def test_sequence_parallelism_cuts_what_is_saved() -> None:
    layout = Layout(fsdp=2, tp=4)
    whole, cut = held(layout=layout), held(layout=layout, sequence_parallel=True)
    assert cut.parts["saved activations"] * 4 == whole.parts["saved activations"]


def test_microbatches_trade_activations_for_a_second_set_of_gradients() -> None:
    one, four = held(), held(microbatches=4)
    assert four.parts["saved activations"] * 4 == one.parts["saved activations"]
    assert four.parts["gradients"] > 1.9 * one.parts["gradients"]


def test_context_parallelism_cuts_the_sequence() -> None:
    alone, cut = held(layout=Layout(fsdp=4)), held(layout=Layout(fsdp=4, cp=2))
    assert cut.parts["saved activations"] * 2 == alone.parts["saved activations"]


def test_what_is_offloaded_lies_in_the_host() -> None:
    here, there = held(), held(offload=("optimizer", "activations"))
    assert there.host == here.parts["optimizer"] + here.parts["saved activations"]
    assert there.total < here.total - 0.8 * there.host


def test_a_stage_has_its_share_of_the_layers() -> None:
    layout = Layout(pp=4, fsdp=2, microbatches=8)
    assert held(layout=layout).parts["gradients"] < held(layout=Layout(fsdp=2, microbatches=8)).parts["gradients"] / 3


@pytest.mark.parametrize(
    ("schedule", "microbatches", "flight"),
    [("gpipe", 16, 16), ("1f1b", 16, 4), ("zb-h1", 16, 4), ("zb-h2", 16, 7), ("zb-v", 16, 4), ("1f1b", 2, 2)],
)
def test_a_schedule_holds_so_many_microbatches(schedule, microbatches: int, flight: float) -> None:
    assert activations_in_flight(schedule, 4, microbatches) == flight


# The interleaved schedule runs microbatches in groups of as many as there are stages.
SCHEDULES = [
    (name, stages, microbatches)
    for name in ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "interleaved")
    for stages in (2, 4, 8)
    for microbatches in (2, 4, 8, 16)
    if name != "interleaved" or microbatches % stages == 0
]
SCHEDULES += [(name, stages, 2 * stages) for name in ("1f1b", "interleaved", "zb-v") for stages in (12, 16)]


@pytest.mark.parametrize(("name", "stages", "microbatches"), SCHEDULES)
def test_what_is_in_flight_is_what_the_executor_has_slots_for(name, stages: int, microbatches: int) -> None:
    schedule = named(name)
    grid = lay_out(schedule, stages, microbatches, saves=True)
    assert activations_in_flight(name, stages, microbatches, schedule.chunks) * schedule.chunks == grid.kept_slots
    assert arrivals_in_flight(name, stages, microbatches) >= grid.slots
    waiting = lay_out(schedule, stages, microbatches, saves=False)
    room = arrivals_in_flight(name, stages, microbatches, schedule.chunks, waiting=True)
    assert waiting.slots <= room <= waiting.slots + 2


def test_a_stage_that_keeps_its_input_alone_holds_less_than_one_that_keeps_its_layers() -> None:
    layout = Layout(pp=4, fsdp=2, microbatches=16)
    full, stage = (held(layout=dataclasses.replace(layout, remat=remat)) for remat in ("full", "stage"))
    assert stage.parts["saved activations"] == pytest.approx(full.parts["saved activations"] / 4, rel=1e-6)
    assert stage.total < full.total
    with pytest.raises(ValueError, match="pp=1 has none"):
        Layout(remat="stage")


def test_interleaving_holds_a_little_more() -> None:
    assert activations_in_flight("interleaved", 4, 16, chunks=3) == 4 * (1 + 3 / 12)


def test_experts_are_cut_over_ep() -> None:
    layout = Layout(ep=8)
    assert held(config=MIXTRAL, layout=layout).parts["parameters"] == pytest.approx(4 * 46.7e9 / 8, rel=1e-2)


# What serving holds.


def test_a_cache_has_keys_and_values_of_every_token() -> None:
    parts = held(SERVE, Layout(tp=8)).parts
    assert parts["KV cache"] == 32 * 64 * 4096 * 2 * 4096 * 2 // 8  # layers, rows, slots, keys and values, width, bytes


def test_grouped_queries_share_a_cache() -> None:
    full = held(SERVE, Layout(tp=8)).parts["KV cache"]
    assert held(SERVE, Layout(tp=8), model("mistral-7b-v0.1")).parts["KV cache"] * 4 == full


def test_a_cache_is_cut_by_tokens_where_tp_exceeds_the_heads() -> None:
    config = model("llama-2-70b")
    eight, sixteen = (held(SERVE, Layout(tp=tp), config).parts["KV cache"] for tp in (8, 16))
    assert eight == 2 * sixteen


def test_long_rings_are_whole_tiles_and_no_longer_than_what_they_are_rings_of() -> None:
    assert room.slots(4096, 16384, 1024) == 4096 + 1024
    assert room.slots(4096, 16384, 1024, cut=3) % (3 * room.TILE) == 0
    assert room.slots(4096, 4100, 1) == 4096
    assert room.slots(4090, 4095, 8) == 4095
    assert room.slots(6, 64, 3) == 8
    assert room.slots(room.LONGEST_LOOSE_RING, 4096, 1, cut=3) == room.LONGEST_LOOSE_RING + 1  # in three equal parts


def test_prompts_read_at_once_have_a_cache_without_windows() -> None:
    gemma = model("gemma-3-4b-pt")
    one = dataclasses.replace(SERVE, global_batch=1, seq_len=9216)  # 8192 of them to read
    token = 2 * 4 * 256 * 2  # keys and values, heads, width, bytes
    parts = held(one, Layout(), gemma).parts
    full = sum(kind.window is None for kind in gemma.layer_kinds)
    lasting = token * (full * 9216 + (gemma.layers - full) * 1024)
    assert parts["KV cache"] == lasting
    assert parts["KV cache of prompts"] == token * gemma.layers * 8192 - lasting
    assert "KV cache of prompts" not in held(dataclasses.replace(one, seq_len=9217), Layout(), gemma).parts


def test_quantised_weights_are_smaller() -> None:
    plain = held(SERVE).parts["parameters"]
    # The projections have 9, 8 or 5 bits, in groups of 32 or by channel, those to values (a twelfth of a layer) 9 where
    # others have 5; the table 16, and the head its own.
    for kind, bytes_each in (("int8", 9 / 8), ("int8:channel", 1), ("int4", (5 + 4 / 12) / 8)):
        found = held(dataclasses.replace(SERVE, quantization=kind)).parts["parameters"]
        assert plain * bytes_each / 2 < found < plain * (bytes_each + 0.04) / 2


# The whole.


@pytest.mark.parametrize("where", ["h100:8", "v5p:2x2x2", "cpu:8"])
@pytest.mark.parametrize("workload", [TRAIN, SERVE], ids=["train", "serve"])
@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x7b", "gemma-2-2b", "falcon-7b", "qwen2.5-0.5b"])
def test_parts_are_whole_bytes_that_sum_to_the_total(name: str, workload: Workload, where: str) -> None:
    found = memory(model(name), workload, FSDP, cluster(where).hardware)
    assert all(isinstance(size, int) and size > 0 for size in found.parts.values())
    assert found.total == sum(found.parts.values())
    assert found.total > found.parts["parameters"]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch=60"):
        held(dataclasses.replace(TRAIN, global_batch=60))
