import dataclasses

from tbjax.planner import compared, words
from tests.planner import plans


def test_the_rows_of_memory_add_up_on_both_sides():
    plan = plans.PLANS["64 GPUs"]()
    verification = plans.verification(plan)
    lasting, passing, whole = compared.memory(plan, verification)
    assert whole[1:3] == (words.gib(plan.memory.total), words.gib(verification.compiled.total))
    assert lasting[3] == "+0.0 %"
    assert passing[3].startswith("-")


def test_a_difference_is_positive_where_the_prediction_is_too_high():
    assert compared.difference(110, 100) == "+10.0 %"
    assert compared.difference(90, 100) == "-10.0 %"
    assert compared.difference(99999, 100000) == "+0.0 %"
    assert compared.difference(90, 0) == "-"


def test_host_memory_is_compared_where_either_side_has_some():
    plan = plans.PLANS["64 GPUs"]()
    verification = plans.verification(plan)
    assert not any("host" in row[0] for row in compared.memory(plan, verification))
    program = dataclasses.replace(verification.compiled, bytes={**verification.compiled.bytes, "host": 2**30})
    offloaded = dataclasses.replace(verification, programs=(program,))
    assert ("In the host's memory", "0.0 GiB", "1.0 GiB", "-100.0 %") in compared.memory(plan, offloaded)


def test_the_verdict_is_the_compilers_and_not_the_predictions():
    plan = plans.PLANS["64 GPUs"]()
    verification = plans.verification(plan)
    assert compared.verdict(verification).startswith("✓ Fits, says XLA's compiler for NVIDIA")
    program = verification.compiled
    larger = dataclasses.replace(program, bytes={**program.bytes, "temp": 10 * plan.cluster.hardware.memory})
    assert compared.verdict(dataclasses.replace(verification, programs=(larger,))).startswith("✗ Does not fit")


def test_collectives_come_with_the_largest_first_and_name_their_axes():
    rows = compared.collectives(plans.verification(plans.PLANS["64 GPUs"]()))
    assert [row[0] for row in rows] == ["all-reduce", "all-gather", "reduce-scatter", "collective-permute"]
    assert [row[1] for row in rows] == ["dp × tp", "fsdp", "fsdp", "no axis"]  # noqa: RUF001


def test_collectives_stand_beside_those_that_were_predicted():
    rows = {row[0]: row[2:] for row in compared.collectives(plans.verification(plans.PLANS["64 GPUs"]()))}
    assert rows["all-gather"] == ("480", "482", "270 GiB", "279 GiB")
    assert rows["reduce-scatter"] == ("240", "-", "93.1 GiB", "-")
    assert rows["all-reduce"][::2] == ("-", "-")


def test_what_a_device_sends_is_compared_along_each_axis_whatever_the_kind():
    rows = {row[0]: row[1:] for row in compared.sent(plans.verification(plans.PLANS["64 GPUs"]()))}
    assert rows["fsdp"] == ("307 GiB", "233 GiB", "+32.0 %")
    assert "no axis" not in rows  # 128 bytes of terabytes


def test_cycles_stand_as_seconds_beside_the_predicted_ones_where_a_compiler_counts_them():
    assert compared.time(plans.verification(plans.PLANS["64 GPUs"]())) == []
    rows = dict(compared.time(plans.verification(plans.PLANS["v5p"]())))
    assert rows["Predicted, all told"] == "12.3 s"
    assert rows["Compiled, what one device computes"] == words.seconds(12_345_678_901 / 1.75e9)


def test_what_qualifies_a_verdict_is_noted():
    said = " ".join(compared.notes(plans.verification(plans.PLANS["64 GPUs"]())))
    for fact in ("h100:8x8", "31.4 s", "of 2 and of 4 layers", "one turn: 1"):
        assert fact in said
    assert "1.75 GHz" in " ".join(compared.notes(plans.verification(plans.PLANS["v5p"]())))
