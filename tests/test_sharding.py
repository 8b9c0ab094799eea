"""Sharding: from the names of dimensions to the axes of the mesh, in one place, refusing what cannot be."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tbjax.config import LayerKind, ModelConfig
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.sharding import Sharding, ShardingStrategy, leaves


def layout(spec, **settings) -> Sharding:
    return Sharding(make_mesh(spec), **settings)


def config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 256, "embed": 32, "mlp": 64, "heads": 8, "kv_heads": 2, "head_dim": 8, "max_positions": 64}
    return ModelConfig(family="llama", layer_kinds=(LayerKind(),) * 2, **sizes | changes)


def abstract(config: ModelConfig, sharding: Sharding) -> Decoder:
    return sharding.place(jax.eval_shape(lambda: Decoder(config, sharding)))


def test_dimensions_lie_on_their_axes():
    sharding = layout((2, 2, 2))
    assert sharding.parameter(("mlp", "embed"), (64, 32)).spec == P("tp", "fsdp")
    assert sharding.parameter(("layers", "embed", "heads"), (2, 32, 64)).spec == P(None, "fsdp", "tp")
    assert sharding.parameter((None,), (32,)).spec == P(None)


def test_experts_hold_ep_and_other_weights_are_cut_by_it_as_by_fsdp():
    sharding = layout({"fsdp": 2, "ep": 2, "tp": 2})
    assert sharding.parameter(("experts", "embed", "mlp"), (4, 32, 64)).spec == P("ep", "fsdp", "tp")
    assert sharding.parameter(("mlp", "embed"), (64, 32)).spec == P("tp", ("fsdp", "ep"))


def test_two_dimensions_on_one_axis_are_a_mistake():
    with pytest.raises(ValueError, match=r"'heads' and 'mlp'.*'tp'"):
        layout((1, 1, 8)).parameter(("heads", "mlp"), (64, 64))


@pytest.mark.parametrize("strategy", ["NO_SHARD", "OPTIMIZER", "SHARD_GRAD_OP"])
def test_lesser_strategies_leave_parameters_whole_on_fsdp(strategy):
    sharding = layout((1, 4, 2), strategy=ShardingStrategy(strategy))
    assert sharding.parameter(("mlp", "embed"), (64, 32)).spec == P("tp", None)


def test_an_unknown_strategy_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'ZERO'.*FULL_SHARD"):
        layout((1, 4, 2), strategy="ZERO")


def test_activations_are_cut_as_far_as_they_divide():
    sharding = layout((2, 2, 2))
    assert sharding.activation(("batch", "sequence", "mlp"), (8, 5, 64)) == P(("dp", "fsdp"), None, "tp")
    assert sharding.activation(("batch", "sequence", "mlp"), (2, 5, 63)) == P("dp", None, None)
    assert sharding.activation(("batch", None), (1, 5)) == P(None, None)


def test_sequence_parallelism_cuts_the_residual_stream_over_tp():
    def place(sharding: Sharding) -> P:
        return jax.jit(sharding.residual)(jnp.zeros((4, 16, 32))).sharding.spec

    assert place(layout((2, 2, 2)))[1:] in ((), (None,), (None, None))
    assert place(layout((2, 2, 2), sequence_parallel=True))[1] == "tp"


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({"embed": 36}, (1, 8, 1), ["'embed'", "36", "fsdp=8", "would do: (2, 4, 1)"]),
        ({"mlp": 60}, (1, 1, 8), ["mlp.down.weight", "'mlp'", "60", "tp=8", "would do: (1, 2, 4)"]),
    ],
)
def test_a_size_that_does_not_divide_names_tensor_and_mesh_that_would(changes, spec, words):
    with pytest.raises(ValueError, match="does not divide") as error:
        abstract(config(**changes), layout(spec))
    for word in words:
        assert word in str(error.value), str(error.value)
    suggestion = str(error.value).split("would do: ")[1].rstrip(".")
    abstract(config(**changes), layout(eval(suggestion)))  # noqa: S307 (our own words)


def test_few_kv_heads_are_kept_by_every_device_and_notable_ones_are_named():
    sharding = layout((1, 1, 8))
    model = abstract(config(kv_heads=1, head_dim=6, heads=8, mlp=8, vocab_size=128), sharding)
    assert model.stacks[0][0].attention.key.weight.get_value().sharding.spec == P(None, None, None)
    uncut = sharding.uncut(model)
    assert "stacks.0.0.attention.key.weight" in uncut
    assert uncut["stacks.0.0.attention.key.weight"] == ("tp",)


def test_nothing_notable_is_left_whole_in_an_ordinary_model():
    for spec in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)):
        sharding = layout(spec)
        assert sharding.uncut(abstract(config(kv_heads=8), sharding)) == {}


def test_leaves_have_paths_and_a_layer_dimension_where_stacked():
    found = {leaf.path: leaf.dims for leaf in leaves(abstract(config(), layout((8, 1, 1))))}
    assert found["embedding.weight"] == ("vocab", "embed")
    assert found["stacks.0.0.mlp.down.weight"] == ("layers", "embed", "mlp")
    assert found["final_norm.weight"] == (None,)
