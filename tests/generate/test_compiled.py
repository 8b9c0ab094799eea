"""Decode steps of large models, by the vendors' compilers: they fit, and send what they should."""

import pytest

from benchmarks.generate_compiled import BATCH, MODELS, compiled
from tbjax.planner.compilers import installed
from tbjax.planning import model_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (installed("cuda") and installed("tpu")), reason="the compilers are not installed: tbjax[verify]"
    ),
]

# What every device must know of each row in the end, its token and how good it is, beside its features.
LITTLE = 4096


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
    if machine == "h100":
        # One of attention and one of the feed-forward layer, or of both at once; and the lookup of the token.
        at_once = 1 if config.block == "sequential" else 2
        (found,) = notable
        assert (found.kind, found.count) == ("all-reduce", config.layers * 2 // at_once + 1)
        assert found.bytes == states * (2 * config.layers + 1)
