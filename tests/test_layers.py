"""The layers alone, on a mesh of the user's own: the same numbers as the plain formula, cut as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tbjax.layers import ColumnParallelLinear, RowParallelLinear, TensorParallelEmbedding
from tbjax.layers.attention import HeadLayout
from tbjax.mesh import make_mesh
from tbjax.sharding import Sharding

X = jax.random.normal(jax.random.key(7), (4, 6, 16))


@pytest.fixture(params=["tp=8", "dp=2 tp=4", "none"])
def mesh(request):
    if request.param == "none":
        return None
    shape, names = {"tp=8": ((8,), ("tp",)), "dp=2 tp=4": ((2, 4), ("dp", "tp"))}[request.param]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def tp(mesh) -> int:
    return 1 if mesh is None else mesh.shape["tp"]


def test_column_then_row_is_the_plain_formula(mesh):
    up = ColumnParallelLinear(16, 32, mesh, use_bias=True, gather_output=False, key=jax.random.key(1))
    down = RowParallelLinear(32, 16, mesh, use_bias=True, input_is_parallel=True, key=jax.random.key(2))
    up.bias[...] = jax.device_put(jnp.arange(32.0), up.bias[...].sharding)
    down.bias[...] = jnp.arange(16.0)
    y = jax.jit(lambda up, down, x: down(jax.nn.silu(up(x))))(up, down, X)
    wu, wd = np.asarray(up.weight[...]), np.asarray(down.weight[...])
    hidden = np.asarray(X) @ wu.T + np.arange(32.0)
    expected = (hidden / (1 + np.exp(-hidden))) @ wd.T + np.arange(16.0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_each_device_is_born_with_its_part_of_the_weights(mesh):
    column = ColumnParallelLinear(16, 32, mesh, use_bias=True)
    row = RowParallelLinear(32, 16, mesh)
    for array, shape in (
        (column.weight[...], (32 // tp(mesh), 16)),
        (column.bias[...], (32 // tp(mesh),)),
        (row.weight[...], (16, 32 // tp(mesh))),
    ):
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}


def test_gather_output_says_where_the_result_lies(mesh):
    for gather in (True, False):
        layer = ColumnParallelLinear(16, 32, mesh, gather_output=gather)
        y = jax.jit(lambda layer, x: layer(x))(layer, X)
        features = 32 if gather else 32 // tp(mesh)
        assert {shard.data.shape[-1] for shard in y.addressable_shards} == {features}


@pytest.mark.parametrize("split", ["vocab", "embedding"])
def test_an_embedding_of_an_odd_vocabulary_looks_up_and_scores_its_rows(mesh, split):
    layer = TensorParallelEmbedding(257, 16, mesh, split=split)
    table = np.asarray(layer.weight[...])
    assert not table[257:].any()
    tokens = jnp.array([[0, 1, 256], [3, 100, 255]])
    np.testing.assert_array_equal(jax.jit(lambda layer, t: layer(t))(layer, tokens), table[np.asarray(tokens)])
    scores = jax.jit(lambda layer, x: layer.logits(x))(layer, X)
    assert scores.shape == (4, 6, 257)
    np.testing.assert_allclose(scores, np.asarray(X) @ table[:257].T, rtol=1e-5, atol=1e-6)
    cut = {shard.data.shape for shard in layer.weight[...].addressable_shards}
    assert cut == {(384 // tp(mesh), 16) if split == "vocab" else (257, 16 // tp(mesh))}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'rows'"):
        TensorParallelEmbedding(8, 8, split="rows")  # pyright: ignore[reportArgumentType]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_head_layouts_give_every_device_whole_heads_and_are_undone(kv_heads, queries, tp):
    layout = HeadLayout.fit(kv_heads * queries, kv_heads, tp)
    assert layout.total % tp == 0
    if kv_heads % tp == 0:
        assert (layout.repeat, layout.padding) == (1, 0)
    q = jnp.arange(kv_heads * queries * 2.0).reshape(1, 1, -1, 2)
    k = jnp.arange(kv_heads * 2.0).reshape(1, 1, -1, 2)
    spread, keys = layout.spread_queries(q), layout.spread_keys(k)
    assert spread.shape[2] == keys.shape[2] == layout.total
    np.testing.assert_array_equal(layout.collect(spread), q)
    # Every query is still grouped with the key-value head that it reads.
    owner = jnp.repeat(jnp.arange(kv_heads) + 1, queries)[None, None, :, None]
    owners = layout.spread_queries(owner)[0, 0, :, :, 0]
    heads = layout.spread_keys(jnp.arange(kv_heads)[None, None, :, None] + 1)[0, 0, :, 0]
    assert bool(jnp.all((owners == 0) | (owners == heads[:, None])))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "per_device"),
    [
        (64, 8, 8, (1, 8)),  # divides
        (64, 8, 16, (1, 4)),  # each key-value head twice
        (71, 1, 8, (1, 9)),  # Falcon 7B
        (9, 3, 2, (2, 6)),  # SmolLM2: one head of padding
        (9, 3, 8, (1, 2)),  # SmolLM2: each key-value head twice, two of padding
    ],
)
def test_the_layout_is_the_cheapest(heads, kv_heads, tp, per_device):
    layout = HeadLayout.fit(heads, kv_heads, tp)
    assert (layout.total // tp, layout.total // tp * layout.group) == per_device


@pytest.mark.parametrize("rows", [4, 512])
def test_whichever_is_smaller_moves_the_tokens_or_the_weights(rows):
    sharding = Sharding(make_mesh((1, 4, 2)))
    layer = ColumnParallelLinear(128, 256, sharding, gather_output=False)
    x = jax.device_put(jax.random.normal(jax.random.key(3), (rows, 1, 128)), NamedSharding(sharding.mesh, P("fsdp")))
    apply = jax.jit(lambda layer, x: layer(x))
    np.testing.assert_allclose(apply(layer, x), np.asarray(x) @ np.asarray(layer.weight[...]).T, rtol=1e-4, atol=1e-5)
    program = apply.lower(layer, x).compile().as_text()
    gathers_weights = "f32[128,128]{1,0} all-gather" in program or "f32[128,128]{0,1} all-gather" in program
    assert gathers_weights == (rows == 512), program
