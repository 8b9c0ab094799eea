"""A pipeline computes what the model computes without one: loss, gradients, steps of training, hidden states.

Every schedule, kind of model and way to cut a stage is here once; their product is in `test_execute_all`.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbjax.cut import cut
from tbjax.model import Decoder
from tbjax.pipeline.automatic import Automatic
from tbjax.pipeline.execute import pipelined_hidden
from tbjax.pipeline.grid import lay_out
from tbjax.pipeline.schedule import ZBH1, ZBH2, ZBV, ForwardOnly, GPipe, Interleaved1F1B, OneFOneB
from tbjax.pipeline.simulate import Times
from tbjax.pipeline.stages import cut_for
from tbjax.planner import hlo
from tbjax.sharding import leaves
from tbjax.training import init_state, make_optimizer, make_step
from tests.pipeline.models import (
    DENSE,
    INSIDE,
    MODELS,
    abstract,
    assert_same_gradients,
    batch,
    born,
    distance,
    gradients,
    on,
)

# A schedule made for its times, in less memory than 1F1B's.
MEASURED = Automatic(Times(forward=3, backward_input=2, backward_weight=1), memory=3)

CASES = [
    ("dense", INSIDE, OneFOneB(), 4, "full"),
    ("dense", {"pp": 2, "dp": 2}, GPipe(), 4, "stage"),
    ("dense", {"pp": 4, "tp": 2}, ZBH2(), 4, "none"),
    ("tied", {"pp": 4, "fsdp": 2}, ZBH1(), 4, "full"),
    ("experts", {"pp": 2, "ep": 2, "tp": 2}, Interleaved1F1B(2), 4, "full"),
    # What else there is to go wrong.
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ("dense", {"pp": 4, "tp": 2}, ZBH2(), 2, "none"),  # fewer microbatches than stages
            ("dense", {"pp": 2, "tp": 2}, ZBV(), 4, "dots"),
            ("windows", {"pp": 2}, Interleaved1F1B(2), 4, "full"),
            ("odd heads", {"pp": 2, "tp": 2}, OneFOneB(), 4, "full"),
            ("experts", {"pp": 2, "ep": 2, "tp": 2}, ZBH1(), 4, "none"),
            ("dense", {"pp": 4, "tp": 2}, MEASURED, 8, "full"),
        )
    ),
]


def named(case):
    model, mesh, schedule, microbatches, remat = case
    return f"{model}-{'-'.join(f'{axis}{size}' for axis, size in mesh.items())}-{schedule.name}-m{microbatches}-{remat}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_loss_and_gradients_are_those_of_the_model_without_a_pipeline(case):
    assert_same_gradients(*case, padded=case[0] == "tied")  # padding is to be seen by every stage


@pytest.mark.parametrize(
    ("schedule", "laid"),
    [
        (ZBV(), cut_for(DENSE, ZBV(), 3, (1, 3, 1, 1, 1, 1))),  # born where it runs, so nothing is exchanged
        pytest.param(OneFOneB(), cut(8, 3, counts=(1, 5, 2)), marks=pytest.mark.slow),
        pytest.param(OneFOneB(), None, marks=pytest.mark.slow),  # 3, 3 and 2 layers, as the mesh has them by itself
        # Stored one way, run another.
        pytest.param(Interleaved1F1B(2), cut(8, 3, counts=(6, 1, 1)), marks=pytest.mark.slow),
    ],
    ids=["in-place", "asked-for", "plain", "exchanged"],
)
def test_stages_may_have_different_numbers_of_layers(schedule, laid):
    microbatches = 3 if schedule.name == "interleaved" else 4
    rows = 12 if schedule.name == "interleaved" else 16
    assert_same_gradients("dense", {"pp": 3}, schedule, microbatches, cut=laid, batch_rows=rows)


@pytest.mark.slow
# AdamW divides gradients by their size: what rounding makes of a small one, it makes large.
@pytest.mark.parametrize(("precision", "optimizer"), [("float32", "sgd"), ("mixed", "adamw")])
def test_steps_of_training_are_the_same_steps(precision, optimizer):
    losses, model = train(on(INSIDE), precision, optimizer)
    wanted_losses, wanted = train(on({"dp": 1}), precision, optimizer)
    tolerance = {"float32": 1e-5, "mixed": 2e-3}[precision]
    np.testing.assert_allclose(losses, wanted_losses, rtol=tolerance)
    assert wanted_losses[-1] < wanted_losses[0]  # it learns
    for leaf, a, b in zip(leaves(model), jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(model.sharding.parameter(leaf.dims, a.shape), a.ndim), leaf.path
        assert a.dtype == b.dtype == jnp.float32
        assert precision == "mixed" or distance(a, b) <= 1e-5, leaf.path


@pytest.mark.parametrize(
    ("name", "mesh", "schedule"),
    [
        pytest.param("dense", INSIDE, None, marks=pytest.mark.slow),
        ("experts", {"pp": 2, "ep": 2}, None),
        pytest.param("tied", {"pp": 4}, ForwardOnly(), marks=pytest.mark.slow),
    ],
)
def test_hidden_states_are_those_of_the_model_without_a_pipeline(name, mesh, schedule):
    run = jax.jit(lambda model, batch: pipelined_hidden(model, batch, schedule=schedule, microbatches=4))
    model = born(name, on(mesh))
    found, wanted = run(model, batch()), born(name, on({"dp": 1})).hidden(batch().tokens)
    assert distance(found.states, wanted.states) <= 1e-5
    if name == "experts":
        np.testing.assert_allclose(found.auxiliary_loss, wanted.auxiliary_loss, rtol=1e-5)
    assert distance(jax.jit(Decoder.logits)(model, found.states), born(name, on({"dp": 1}))(batch().tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "mesh", "schedule", "layers"),
    [
        ("dense", INSIDE, ZBV(), 4),  # pieces of one layer
        pytest.param("dense", INSIDE, OneFOneB(), 8, marks=pytest.mark.slow),
        pytest.param("dense", INSIDE, ZBH1(), 8, marks=pytest.mark.slow),
        pytest.param("experts", {"pp": 2, "ep": 2, "tp": 2}, OneFOneB(), 8, marks=pytest.mark.slow),
        pytest.param("odd heads", {"pp": 2, "tp": 2}, OneFOneB(), 8, marks=pytest.mark.slow),
    ],
)
def test_in_a_tick_there_are_permutes_between_stages_and_what_the_task_takes(name, mesh, schedule, layers):
    sharding = dataclasses.replace(on(mesh), cut=cut(layers, mesh["pp"], schedule))
    compiled = gradients(4, schedule, "full").lower(born(name, sharding, layers), batch()).compile()
    text = str(compiled.as_text())
    found = hlo.read(text, {axis: sharding.mesh.shape[axis] for axis in sharding.mesh.axis_names})
    between = [c for c in found.collectives if "pp" in c.axes]
    assert {c.kind for c in between} == {"collective-permute", "all-reduce"}
    assert all(c.axes == ("pp",) for c in between)
    # Of the ends' gradients and the loss, after the loop: they are not many, nor more than the ends are large.
    [total] = [c for c in between if c.kind == "all-reduce"]
    ends = 4 * (2 * 256 * 64 + 64) + 4
    assert total.bytes <= ends
    # A permute within a stage would make other stages wait, which do something else.
    [permutes] = [c for c in found.collectives if c.kind == "collective-permute"]
    assert permutes.axes == ("pp",)
    # Outside of the tasks' own loops a tick computes nothing: that would be done whether there is such a task or not.
    tick = body_of_the_ticks(text)
    assert "while(" in tick
    assert "dot(" not in tick
    # There are as many ticks as the schedule has.
    assert permutes.count == tick.count(" collective-permute(") * lay_out(schedule, mesh["pp"], 4, saves=True).ticks


def body_of_the_ticks(text):
    """The instructions of the loop that sends to neighbours, with those of its fusions."""
    parts = {part.split(" ", 1)[0]: part for part in re.findall(r"^%?(\S+ \(.*?^\})", text, re.DOTALL | re.MULTILINE)}
    [tick] = [part for part in parts.values() if "collective-permute(" in part]
    return tick + "".join(parts[name] for name in re.findall(r"calls=%?([\w.\-]+)", tick))


def test_what_cannot_be_cut_is_refused_with_what_would_do():
    def run(mesh, schedule, microbatches=4, remat="full", name="dense", layers=8):
        jax.eval_shape(gradients(microbatches, schedule, remat), abstract(name, on(mesh), layers), batch())

    with pytest.raises(ValueError, match="'layers' of size 4 does not divide over pp=8"):
        run({"pp": 8}, OneFOneB(), layers=4)
    with pytest.raises(ValueError, match="pp=2 with 8 chunks a stage makes 16 pieces, but there are 8 to share out"):
        run({"pp": 2}, Interleaved1F1B(8))
    with pytest.raises(ValueError, match="pp=2: the 8 layers of this model follow no single pattern, but 2 one after"):
        run({"pp": 2}, OneFOneB(), name="mixed")
    with pytest.raises(ValueError, match="schedule='forward' only runs forward"):
        run({"pp": 2}, ForwardOnly())
    with pytest.raises(ValueError, match="microbatches=2 is not a multiple of stages=4; 4 would do"):
        run({"pp": 4}, Interleaved1F1B(2), 2)
    with pytest.raises(ValueError, match="does not divide over dp\\*fsdp\\*ep=2 devices in 3 microbatches"):
        run({"pp": 2, "dp": 2}, OneFOneB(), 3)
    with pytest.raises(ValueError, match="remat='stage' keeps the input of a pipeline stage"):
        run({"dp": 1}, None, remat="stage")
    with pytest.raises(ValueError, match="remat='some' is unknown"):
        run({"pp": 2}, OneFOneB(), remat="some")
    with pytest.raises(ValueError, match="repeats a pattern of 2 layers, which no piece may break"):
        cut_for(MODELS["windows"], OneFOneB(), 2, counts=(3, 5))
    with pytest.raises(TypeError, match="schedule=2 is no schedule: give one of the names gpipe, 1f1b"):
        run({"pp": 2}, 2)
    with pytest.raises(ValueError, match="schedule 'fast' is unknown: tbjax knows gpipe, 1f1b"):
        run({"pp": 2}, "fast")


@pytest.mark.parametrize(
    ("schedule", "counts", "says"),
    [
        (OneFOneB(), (4, 3), r"\[4, 3\]: this model has 8 layers.* here are 2 that add up to 7"),
        (OneFOneB(), (9, -1), r"2 pieces of one layer at least .* here are 2 that add up to 8"),
        ("interleaved", (4, 4), r"4 pieces of one layer at least \(a piece for each stage and chunk\)"),
        (None, 8, r"stage_layers=8: give the number of layers of each of the 2 pieces"),
        (None, "44", r"stage_layers='44': give the number"),
        (None, (4.0, 4.0), r"give the number of layers of each of the 2 pieces, as \(4, 4\)"),
        (ZBV, None, r"schedule=<class .*ZBV.*> is no schedule"),
    ],
)
def test_layers_that_cannot_be_shared_out_so_are_refused(schedule, counts, says):
    with pytest.raises((TypeError, ValueError), match=says):
        cut_for(DENSE, schedule, 2, counts)


def train(sharding, precision, optimizer):
    """The losses of three steps, and the model after them."""
    # The state takes the model's memory, so it gets a model of its own.
    model = jax.tree.map(jnp.copy, born("dense", sharding))
    rule = make_optimizer(optimizer, model, learning_rate={"sgd": 0.5, "adamw": 1e-2}[optimizer])
    step = make_step(rule, precision=precision, microbatches=4)
    state, losses = init_state(model, rule), []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    return losses, state.model
