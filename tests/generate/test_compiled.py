"""Decode steps, by the vendors' compilers those of large models: they fit, and send what they should."""

import dataclasses
from collections import Counter

import pytest

from benchmarks.generate_compiled import BATCH, MODELS, compiled
from tbjax.planner.compile import Case, compile_case
from tbjax.planner.compilers import installed
from tbjax.planner.hardware import cluster
from tbjax.planner.verify import verify
from tbjax.planner.workload import Layout, Workload
from tbjax.planning import model_config
from tests import tiny

# What every device must know of each row in the end, its token and how good it is, beside its features.
LITTLE = 4096


def sent_by_decoding(layers, tp):
    """How often a tiny model with two key-value heads sends, by kind."""
    config = tiny.our_config(tiny.BY_NAME["llama"])
    config = dataclasses.replace(config, layer_kinds=config.layer_kinds[:1] * layers)
    workload = Workload(task="inference", global_batch=2, seq_len=32, new_tokens=16, precision="float32")
    case = Case(config=config, workload=workload, layout=Layout(tp=tp), cluster=cluster(f"cpu:{tp}"), compiler="cpu")
    *_, decode = compile_case(case)
    return Counter({c.kind: c.count for c in decode.collectives})


# Where tp has more devices than there are key-value heads it cuts the cache by tokens. What every query found in the
# parts is then joined by three more reductions (the largest score, the sum of weights, the values), and queries, keys
# and values are gathered, each once. Nothing else is moved, though parts of heads are what each device computes.
@pytest.mark.parametrize(("tp", "a_layer"), [(2, {"all-reduce": 2}), (8, {"all-reduce": 5, "all-gather": 3})])
def test_a_layer_sends_two_reductions_and_more_only_where_its_cache_is_cut_by_tokens(tp, a_layer):
    assert sent_by_decoding(3, tp) - sent_by_decoding(2, tp) == Counter(a_layer)


@pytest.mark.skipif(not installed("cuda"), reason="the CUDA plugin is not installed: tbjax[verify]")
def test_a_single_rows_token_is_looked_up_where_it_lies():
    # Left to it, the compiler for NVIDIA would bring the whole table to every device for every token.
    config = tiny.our_config(tiny.BY_NAME["llama"])
    workload = Workload(task="inference", global_batch=1, seq_len=32, new_tokens=16, precision="bfloat16")
    _, decode = verify(config, workload, Layout(tp=2), "h100:2").programs
    assert sum(c.bytes for c in decode.collectives if c.kind == "all-gather") < config.vocab_size * config.embed


needs_both = pytest.mark.skipif(
    not (installed("cuda") and installed("tpu")), reason="the compilers are not installed: tbjax[verify]"
)


@pytest.mark.slow
@needs_both
@pytest.mark.parametrize("machine", ["h100", "v5p"])
@pytest.mark.parametrize("model", MODELS)
def test_a_decode_step_fits_and_sends_two_reductions_a_layer_and_no_weights(model, machine):
    config, _ = model_config(model)
    row = compiled(model, MODELS[model][machine])
    assert row.verification.fits
    notable = [c for c in row.decode.collectives if c.bytes > LITTLE * c.count]
    # Weights that are gathered, even of one layer, are far larger than a token's states of all rows.
    states = BATCH * config.embed * 2
    assert max(c.bytes / c.count for c in notable) <= 4 * states
    if set(row.mesh) != {"tp"}:
        return
    assert {c.axes for c in notable} == {("tp",)}
    assert {c.kind for c in notable} <= {"all-reduce", "all-gather"}
    if machine == "h100":
        # One of attention and one of the feed-forward layer, or of both at once; and the lookup of the token.
        at_once = 1 if config.block == "sequential" else 2
        (found,) = notable
        assert (found.kind, found.count) == ("all-reduce", config.layers * 2 // at_once + 1)
        assert found.bytes == states * (2 * config.layers + 1)


@pytest.mark.slow
@needs_both
def test_a_large_cache_that_is_cut_by_tokens_costs_six_small_collectives_a_layer():
    model = "meta-llama/Llama-3.1-405B"
    config, _ = model_config(model)
    row = compiled(model, MODELS[model]["v5p"], mesh={"tp": 32})
    assert row.verification.fits
    assert {(c.kind, c.axes) for c in row.decode.collectives} == {("all-reduce", ("tp",)), ("all-gather", ("tp",))}
    # And four a token: its lookup, how many tokens each row has by now, and the best score of every part of the
    # vocabulary with the token that has it.
    assert sum(c.count for c in row.decode.collectives) == (2 + 6) * config.layers + 4
    assert sum(c.bytes for c in row.decode.collectives) <= 8 * BATCH * config.embed * 2 * config.layers
