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
    assert [row[0] for row in rows] == ["all-reduce", "all-gather", "collective-permute"]
    assert [row[1] for row in rows] == ["dp × tp", "fsdp", "no axis"]  # noqa: RUF001


def test_what_qualifies_a_verdict_is_noted():
    said = " ".join(compared.notes(plans.verification(plans.PLANS["64 GPUs"]())))
    for fact in ("h100:8x8", "31.4 s", "of 2 and of 4 layers", "12.3B cycles", "one turn: 1"):
        assert fact in said
