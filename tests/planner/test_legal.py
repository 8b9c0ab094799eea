"""What is legal is what the decoder accepts, and every mesh that is not is counted under a reason."""

import itertools
import math
from typing import get_args

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.cut import cut
from tbjax.mesh import AXES
from tbjax.model import Decoder
from tbjax.pipeline.schedule import named
from tbjax.planner.hardware import cluster
from tbjax.planner.legal import Space, divisors, fast_domain, ordered_factorizations
from tbjax.planner.parameters import stage_layers
from tbjax.planner.workload import Optimizer, Workload
from tbjax.remat import Remat
from tbjax.sharding import Sharding
from tbjax.training.optimizer import make_optimizer
from tbjax.training.update import check_offload


def model(**changes):
    sizes = {"vocab_size": 256, "embed": 64, "mlp": 96, "heads": 8, "kv_heads": 2, "head_dim": 8, "max_positions": 128}
    return ModelConfig(**{"family": "test", "layer_kinds": (LayerKind(),) * 4, **sizes, **changes})


def sparse(experts):
    moe = MoE(experts=experts, experts_per_token=2, mlp=64)
    return model(moe=moe, layer_kinds=(LayerKind(sparse=True),) * 4)


def alternating(layers):
    """Layers of two kinds in turn, as in Gemma 2; where their number is odd, the last follows another pattern."""
    return model(layer_kinds=tuple(LayerKind(window=None if i % 2 else 16) for i in range(layers)))


def space(config, spec, batch=16, length=128, optimizer: Optimizer = "adamw", **fixed):
    return Space(config, Workload(global_batch=batch, seq_len=length, optimizer=optimizer), cluster(spec), fixed)


def reasons(meshes):
    return [rejection.reason for rejection in meshes[1]]


# --- Meshes -----------------------------------------------------------------------------------------------------------


def accepted(config, sizes):
    """Whether a decoder can be laid out on a mesh of those sizes; a pipeline's stages aside, which need not be even."""
    mesh = AbstractMesh((1, *sizes[1:]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    sharding = Sharding(mesh)
    try:
        sharding.place(jax.eval_shape(lambda: Decoder(config, sharding)))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "config",
    [
        model(),
        model(heads=3, kv_heads=1, head_dim=4),
        model(embed=36, mlp=100, layer_kinds=(LayerKind(),) * 3),
        model(tie_embeddings=True, vocab_size=130),
        sparse(4),
        sparse(6),
    ],
    ids=["usual", "three heads", "embed 36", "tied", "four experts", "six experts"],
)
def test_what_is_legal_is_what_the_decoder_accepts(config):
    found, _ = space(config, "h100:8", batch=8).meshes()
    expected = {
        sizes
        for sizes in itertools.product((1, 2, 4, 8), repeat=6)
        if math.prod(sizes) == 8
        and sizes[0] <= config.layers
        and (config.moe or sizes[AXES.index("ep")] == 1)
        and accepted(config, sizes)
    }
    assert {tuple(mesh.mesh.values()) for mesh in found} == expected


@given(
    st.sampled_from(["h100:8", "h100:6x8", "h100:5x4", "v5p:4x4x12", "cpu:7", "l4:3x8", "gb200:18x4"]),
    st.sampled_from([model(), sparse(6), model(layer_kinds=(LayerKind(),) * 30)]),
    st.integers(1, 200),
    st.dictionaries(st.sampled_from(AXES), st.sampled_from([1, 2, 3]), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_every_mesh_is_legal_or_counted_under_a_reason(spec, config, batch, fixed):
    devices = cluster(spec).devices
    if devices % math.prod(fixed.values()):
        return
    legal, rejected = space(config, spec, batch, **fixed).meshes()
    settled = fixed if config.moe else {"ep": 1, **fixed}
    free = ordered_factorizations(devices // math.prod(settled.values()), 6 - len(settled))
    assert len(legal) + sum(rejection.count for rejection in rejected) == free
    for mesh in [layout.mesh for layout in legal] + [rejection.example for rejection in rejected]:
        assert math.prod(mesh.values()) == devices
        assert all(mesh[axis] == size for axis, size in fixed.items())


@pytest.mark.parametrize(("number", "parts"), [(1, 3), (8, 2), (12, 3), (30, 4), (97, 2), (64, 5), (7, 0)])
def test_factorizations_are_counted_as_they_are_listed(number, parts):
    listed = [sizes for sizes in itertools.product(divisors(number), repeat=parts) if math.prod(sizes) == number]
    assert ordered_factorizations(number, parts) == (len(listed) if parts else 1)


@pytest.mark.parametrize(
    ("config", "spec", "batch", "fixed", "reason"),
    [
        (model(heads=64, embed=1024), "h100:2x8", 16, {}, "tp=16 crosses the 8-GPU NVLink domain"),
        (model(heads=64, embed=1024), "gb200:36x4", 144, {}, "tp=16 does not divide the 72-GPU NVLink domain"),
        (model(), "l4:2x8", 16, {}, "tp=16 crosses the 8-GPU host"),
        (model(heads=3, kv_heads=1, head_dim=6), "h100:4", 4, {}, "3 heads of 6 cannot be cut evenly over tp=4"),
        (model(mlp=90), "h100:4", 4, {}, "an MLP 90 wide cannot be cut evenly over tp=4"),
        (model(embed=36), "h100:8", 8, {}, "an embedding 36 wide cannot be cut evenly over fsdp=8"),
        (model(), "h100:8", 8, {}, "4 layers < pp 8: a stage would have none"),
        (alternating(6), "h100:8", 8, {}, "3 repeats of 2 layers < pp 4: a stage would have none"),
        (
            alternating(5),
            "h100:2",
            8,
            {},
            "pp=2: the 5 layers follow no single pattern, but 2 one after the other, and a pipeline cuts one stack of "
            "repeats",
        ),
        (
            alternating(6),
            "h100:2",
            8,
            {"schedule": "interleaved", "chunks": 3},
            "schedule='interleaved' and chunks=3 does not share 3 repeats of 2 layers out evenly over pp=2",
        ),
        (
            model(),
            "h100:2",
            8,
            {"offload": ("activations",)},
            "pp=2: activations are not offloaded from the stages of a pipeline",
        ),
        (model(), "h100:8", 12, {}, "a batch of 12 sequences does not divide over dp=8"),
        (model(), "v5p:4x4x12", 192, {}, "a sequence of 128 does not divide into the 6 chunks of cp=3"),
        (sparse(6), "h100:4", 4, {}, "6 experts cannot be cut evenly over ep=4"),
        (model(), "h100:4", 4, {"ep": 2}, "ep=2: the model has no experts"),
    ],
)
def test_a_mesh_is_rejected_in_words(config, spec, batch, fixed, reason):
    assert reason in reasons(space(config, spec, batch, **fixed).meshes())


def test_whoever_fixes_tp_across_the_domain_has_it():
    legal, _ = space(model(heads=64, embed=1024), "h100:2x8", tp=16).meshes()
    assert [mesh.tp for mesh in legal] == [16]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("h100:16x8", (8, "8-GPU NVLink domain")),
        ("gb200:18x4", (72, "72-GPU NVLink domain")),
        ("l4:2x8", (8, "8-GPU host")),
        ("v5p:4x4x8", (128, "128-chip slice")),
        ("cpu:8", (8, "8-device host")),
    ],
)
def test_the_domain_that_tp_stays_in_has_a_name(spec, expected):
    assert fast_domain(cluster(spec)) == expected


# --- Settings ---------------------------------------------------------------------------------------------------------


def only_mesh(found, **sizes):
    return next(mesh for mesh in found.meshes()[0] if mesh.mesh == dict.fromkeys(AXES, 1) | sizes)


def test_settings_are_all_combined():
    found = space(model(), "h100:2", batch=4)
    layouts = list(found.layouts(only_mesh(found, fsdp=2)))
    assert (
        len(layouts) == len(set(layouts)) == 3 * 2 * (2 + 4 + 4)
    )  # strategies, microbatches 1 and 2, offloads by remat


def test_a_pipeline_is_filled_before_a_schedule_better_than_1f1b_is_considered():
    found = space(model(layer_kinds=(LayerKind(),) * 8), "h100:4", batch=64)
    mesh = only_mesh(found, pp=4)
    assert found.schedules(mesh, 2) == (("1f1b", 1),)
    assert found.schedules(mesh, 4) == (("1f1b", 1), ("zb-h1", 1), ("interleaved", 2))
    assert {name for name, _ in found.schedules(mesh, 8)} == {"1f1b", "zb-h1", "zb-h2", "zb-v", "interleaved"}


@pytest.mark.parametrize("config", [model(layer_kinds=(LayerKind(),) * 12), alternating(12), alternating(14)])
def test_a_pipeline_can_be_cut_for_every_schedule(config):
    (group,) = config.groups
    found = space(config, "h100:8", batch=64)
    for mesh in found.meshes()[0]:
        if mesh.pp == 1:
            continue
        for schedule, chunks in found.schedules(mesh, 64):
            by = named(schedule, chunks)
            assert cut(group.repeats, mesh.pp, by).rows * len(group.pattern) == stage_layers(config, mesh.pp, by.chunks)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_what_is_offloaded_is_what_a_step_takes(optimizer):
    decoder = jax.eval_shape(lambda: Decoder(model(), Sharding(AbstractMesh((1,) * 6, AXES))))
    rule = make_optimizer(optimizer, decoder)

    def taken(pp, remat, offload):
        try:
            check_offload(offload, rule)
            if "activations" in offload:  # a pipeline's stages take the policies that are one word
                return Remat.parse(remat).offloading().word is not None or pp == 1
        except ValueError:
            return False
        return True

    found = space(model(), "h100:2", batch=4, optimizer=optimizer)
    for mesh in found.meshes()[0]:
        for remat in found.remats(mesh):
            every = ((), ("optimizer",), ("activations",), ("optimizer", "activations"))
            assert found.offloads(mesh, remat) == tuple(each for each in every if taken(mesh.pp, remat, each))


def test_offloaded_activations_have_a_name():
    found = space(model(), "h100:2", offload=("activations",))
    assert {layout.remat for mesh in found.meshes()[0] for layout in found.layouts(mesh)} == {"dots", "full"}


def test_gpipe_is_considered_where_it_is_asked_for():
    found = space(model(), "h100:4", schedule="gpipe", pp=4)
    assert {layout.schedule for layout in found.layouts(only_mesh(found, pp=4))} == {"gpipe"}


def test_serving_has_no_optimizer_to_share_nor_activations_to_recompute():
    workload = Workload(task="inference", global_batch=8, seq_len=64, new_tokens=8)
    found = Space(model(), workload, cluster("h100:8"), {})
    assert {(x.remat, x.strategy, x.offload) for x in found.layouts(only_mesh(found, fsdp=8))} == {
        ("none", "FULL_SHARD", ())
    }


def test_what_is_fixed_is_not_varied():
    fixed = {"remat": "dots", "microbatches": 2, "offload": ("optimizer",), "strategy": "OPTIMIZER", "tp": 2}
    found = space(model(), "h100:8", batch=32, sequence_parallel=True, **fixed)
    layouts = [layout for mesh in found.meshes()[0] for layout in found.layouts(mesh)]
    assert layouts
    assert all(getattr(layout, name) == value for layout in layouts for name, value in fixed.items())
    assert all(layout.sequence_parallel for layout in layouts)


# --- What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"dp": 1, "fsdp": 8, "tp": 4, "pp": 1, "ep": 1, "cp": 1}, ["(1, 8, 4)", "32", "8", "would do: (1, 2, 4)"]),
        ({"tp": 3}, ["multiple of 3", "h100:8", "would do: (1, 8, 1)"]),
        ({"tp": 0}, ["'tp'", "0", "-1"]),
        ({"tp": 1.5}, ["'tp'", "1.5"]),
        ({"tp": True}, ["'tp'", "True"]),
        ({"microbatches": 3}, ["global_batch=16", "microbatches=3", "18 would", "2 microbatches"]),
        ({"remat": "some"}, ["'some'", "'dots'"]),
        ({"strategy": "ZERO"}, ["'ZERO'", "FULL_SHARD"]),
        ({"offload": ("weights",)}, ["'weights'", "'optimizer'"]),
        ({"offload": ("activations",), "remat": "none"}, ["'none' keeps too much to name", "'dots'"]),
        ({"offload": ("activations",), "remat": "stage"}, ["'stage' is for pipelines", "'full'"]),
        ({"offload": ("optimizer",), "optimizer": "adafactor"}, ["layer by layer", "adafactor", "adamw"]),
        ({"colour": 3}, ["colour", "microbatches"]),
    ],
)
def test_what_cannot_be_fixed_says_what_would_do(fixed, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        space(model(), "h100:8", **fixed)
    for word in words:
        assert word in str(error.value)
