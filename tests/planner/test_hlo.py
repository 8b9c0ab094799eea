"""The walk through a compiled program: what runs how often, over which axes, with how many bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.mesh import AXES, make_mesh
from tbjax.planner import hlo

MESH = {"pp": 1, "dp": 2, "fsdp": 2, "ep": 1, "cp": 1, "tp": 2}


def program(*instructions: str, computations: str = "") -> str:
    body = "\n".join(f"  {instruction}" for instruction in instructions)
    return f"HloModule m, is_scheduled=true\n\n{computations}\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def only(text: str) -> hlo.Collective:
    (collective,) = hlo.read(text, MESH).collectives
    return collective


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tp",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("dp",)),
        ("replica_groups=[4,2]<=[8]", ("tp",)),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("dp", "fsdp")),
        ("replica_groups=[1,8]<=[8]", ("dp", "fsdp", "tp")),
        ("replica_groups={}", ("dp", "fsdp", "tp")),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", ("dp", "fsdp")),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", ("tp",)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ("tp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("dp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2,'a':(4)2}", ("dp", "tp")),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ("tp",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("dp", "fsdp")),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ],
)
def test_the_axes_of_a_collective_are_those_along_which_its_groups_differ(groups, axes):
    collective = only(program(f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"))
    assert (collective.kind, collective.axes, collective.count, collective.bytes) == ("all-reduce", axes, 1, 32)


def test_a_permutation_goes_along_the_axis_of_its_pairs():
    pairs = "source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"
    collective = only(program(f"ROOT %r = bf16[2,8]{{1,0}} collective-permute(%p), channel_id=1, {pairs}"))
    assert (collective.kind, collective.axes, collective.bytes) == ("collective-permute", ("tp",), 32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("%r = f32[16]{0} all-gather(%p), GROUPS, dimensions={0}", 64),
        ("%r = f32[4]{0} reduce-scatter(%p), GROUPS, dimensions={0}, to_apply=%add", 32),
        ("%r = (f32[8]{0}, bf16[4]{0}) all-reduce(%p, %q), GROUPS, to_apply=%add", 40),
        ("%r = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), GROUPS, dimensions={0}", 64),
        ("%r = ((f32[8]{0}, f32[2]{0}), (f32[4]{0}, f32[1]{0})) reduce-scatter-start(%p, %q), GROUPS", 40),
        (
            "%r = (bf16[8]{0:T(8,128)(2,1)}, bf16[8]{0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%p), GROUPS",
            16,
        ),
        ("%r = s4[9]{0} all-to-all(%p), GROUPS, dimensions={0}", 5),
        ("%r = pred[] all-reduce(%p), GROUPS, to_apply=%or", 1),
    ],
)
def test_bytes_are_those_of_the_whole_buffers(instruction, expected):
    assert only(program("ROOT " + instruction.replace("GROUPS", "replica_groups=[4,2]<=[8]"))).bytes == expected


def test_a_reduction_of_which_each_device_keeps_a_part_is_a_scatter_on_tpu_too():
    fused = """%all-reduce-scatter.2.clone (input: bf16[8]) -> bf16[4] {
  %whole = bf16[8]{0} all-reduce(%input), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %part = bf16[4]{0} dynamic-slice(%whole, %place), dynamic_slice_sizes={4}
}"""
    call = "ROOT %f = bf16[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.2.clone"
    collective = only(program(call, computations=fused))
    assert (collective.kind, collective.bytes, collective.sent) == ("reduce-scatter", 16, 8)


def test_the_end_of_an_asynchronous_collective_is_not_another_one():
    text = program(
        "%s = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
        "ROOT %d = f32[16]{0} all-gather-done(%s)",
    )
    assert only(text).count == 1


def test_what_goes_between_slices_is_read_from_the_message_to_the_host():
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    shape = "(bf16[4,8]{1,0:T(8,128)(2,1)}, u32[], token[])"
    text = program(
        f"%s = {shape} send(%p, %t), channel_id=3, is_host_transfer=true, frontend_attributes={{{attributes}}}",
        f"ROOT %r = {shape} recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={{{attributes}}}",
    )
    (collective,) = hlo.read(text, MESH, slices=2).collectives
    assert (collective.kind, collective.axes) == ("all-reduce", ("dp",))
    assert (collective.count, collective.bytes) == (1, 64)


LOOPS = """%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inner = (s32[], f32[8]) while(%p), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"integer_config":{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8]) tuple(%i, %f)
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
}

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[16]{0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%cond.2 (p: (s32[], f32[8])) -> pred[] {
  ROOT %done = pred[] custom-call(%p), custom_call_target="anything"
}"""


def test_loops_multiply_what_they_hold_and_loops_in_them():
    text = program(
        "%w = (s32[], f32[8]) while(%p), condition=%cond.1, body=%body.1",
        'ROOT %c = f32[8]{0} copy(%w), backend_config={"estimated_cycles":"7"}',
        '%u = f32[8]{0} custom-call(%w), backend_config={"estimated_cycles":"9223372036854775807"}',  # it cannot tell
        computations=LOOPS,
    )
    found = hlo.read(text, MESH)
    assert {(c.kind, c.count, c.bytes) for c in found.collectives} == {("all-reduce", 3, 96), ("all-gather", 15, 960)}
    assert found.cycles == 3 * 100 + 7
    assert (found.untold, found.unknown_loops) == (1, 0)


def test_a_loop_that_counts_in_twos_turns_half_as_often():
    text = program(
        "ROOT %w = (s32[], f32[8]) while(%p), condition=%cond.1, body=%body.3",
        computations=f"""{LOOPS}

%body.3 (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[]{{:T(128)}} add(%i, %two), metadata={{op_name="a"}}
  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%fused, backend_config={{"estimated_cycles":"100"}}
  ROOT %t = (s32[], f32[8]) tuple(%next, /*index=1*/%f)
}}""",
    )
    found = hlo.read(text, MESH)
    assert [c.count for c in found.collectives] == [2]  # from 0 to 3
    assert found.cycles == 200


def test_what_a_kernel_notes_of_itself_over_several_lines_ends_no_computation():
    text = program(
        '%k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
        '"xprof_metadata":"{\\"block_q\\": 512}"',
        '}}, metadata={op_name="a"}',
        'ROOT %c = f32[8]{0} copy(%k), backend_config={"estimated_cycles":"7"}',
    )
    found = hlo.read(text.replace('  "x', '"x').replace("  }}", "}}"), MESH)
    assert (found.cycles, found.untold) == (7, 1)


def test_a_loop_whose_trips_are_unknown_counts_once_and_is_reported():
    text = program("ROOT %w = (s32[], f32[8]) while(%p), condition=%cond.2, body=%body.2", computations=LOOPS)
    found = hlo.read(text, MESH)
    assert [c.count for c in found.collectives] == [1]
    assert found.unknown_loops == 1


def test_loops_of_a_turn_or_none_run_as_often_as_the_schedule_of_the_pipeline_says():
    known = 'backend_config={"known_trip_count":{"n":"10"}}'
    text = program(
        f"ROOT %w = (s32[], f32[8]) while(%p), condition=%cond.2, body=%tick, {known}",
        computations=f"""{LOOPS}

%tick (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %sent = bf16[8]{{0}} collective-permute(%x), source_target_pairs={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}
  ROOT %task = (s32[], f32[8]) while(%p), condition=%cond.2, body=%task
}}

%task (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%fused
  ROOT %end = (s32[], f32[8]) while(%p), condition=%cond.2, body=%body.2
}}""",
    )
    turns = hlo.Turns(ticks=10, tasks=8, ends=0.5)
    found = hlo.read(text, MESH, turns=turns)
    runs = {c.kind: c.count for c in found.collectives}
    assert runs == {"collective-permute": 10, "all-reduce": 8, "all-gather": 4}
    assert found.unknown_loops == 0
    assert hlo.read(text, MESH).unknown_loops == 2
    assert hlo.read(text, MESH, turns=turns._replace(ticks=11)).unknown_loops == 1  # it is not the schedule's


def test_a_real_program_has_the_collectives_that_were_written_into_it():
    mesh = make_mesh((2, 2, 2))

    def placed(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def step(x, weight):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), placed(None, None)), None

    def function(x, weights):
        return jax.lax.scan(step, x, weights)[0]

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=placed(None, None))
    weights = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=placed(None, "tp", None))
    text = jax.jit(function).lower(x, weights).compile().as_text()
    (collective,) = hlo.read(text, dict(mesh.shape)).collectives
    assert tuple(mesh.shape) == AXES
    # The contraction is cut over tp: one sum of a [16, 32] result in each of the seven layers.
    assert (collective.kind, collective.axes) == ("all-reduce", ("tp",))
    assert (collective.count, collective.bytes) == (7, 7 * 16 * 32 * 4)


def test_what_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("module @jit_f {}", MESH)
