"""The planner's arithmetic over parameters against the decoder that is really built, and against published ones."""

import dataclasses
import math
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from tbjax.config import LayerKind, ModelConfig, MoE
from tbjax.model import Decoder
from tbjax.planner.parameters import active_parameters, elements_per_device, parameters, shards, tensors
from tbjax.planner.workload import Layout
from tbjax.sharding import Sharding, ShardingStrategy, leaves
from tests import tiny


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_tensors_are_the_leaves_of_the_decoder(case: tiny.Case) -> None:
    config = tiny.our_config(case)
    built = leaves(nnx.eval_shape(lambda: Decoder(config)))
    expected = {leaf.path: (leaf.dims, tuple(leaf.variable.shape)) for leaf in built}
    assert {tensor.path: (tensor.dims, tensor.shape) for tensor in tensors(config)} == expected


MESHES = ({"tp": 4}, {"fsdp": 4}, {"ep": 2, "tp": 2}, {"fsdp": 2, "ep": 2, "tp": 8}, {"dp": 2, "cp": 2, "fsdp": 2})


@pytest.mark.parametrize("strategy", list(ShardingStrategy))
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["llama-one-kv-head", "mixtral", "falcon", "gemma2", "qwen3_moe-dense-between"])
def test_a_device_holds_what_sharding_places_on_it(name: str, sizes: dict, strategy: ShardingStrategy) -> None:
    config = tiny.our_config(tiny.BY_NAME[name])
    layout = dataclasses.replace(Layout(strategy=strategy), **sizes)
    sharding = Sharding(AbstractMesh(tuple(layout.mesh.values()), tuple(layout.mesh)), layout.strategy)
    placed = sharding.place(nnx.eval_shape(lambda: Decoder(config)))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(placed))
    assert elements_per_device(config, layout) == held


def test_few_kv_heads_are_held_by_every_device() -> None:
    config = dataclasses.replace(tiny.our_config(tiny.BY_NAME["llama-three-kv-heads"]), mlp=64, heads=12)
    layout = Layout(tp=32)  # 3 heads of 16 do not divide over 32 devices
    counts = {tensor.path: tensor.count for tensor in tensors(config)}
    whole = [shard.local for shard in shards(config, layout) if shard.axes == () and shard.matrix]
    assert whole == [sum(counts[f"stacks.0.0.attention.{name}.weight"] for name in ("key", "value"))]


def test_a_dimension_that_does_not_divide_is_named() -> None:
    config = tiny.our_config(tiny.BY_NAME["llama"])
    with pytest.raises(ValueError, match=r"embedding.weight: dimension 'embed' of size 32 .* fsdp=5"):
        shards(config, Layout(fsdp=5))


def test_a_stage_holds_its_layers_and_the_ends() -> None:
    config = tiny.our_config(tiny.BY_NAME["llama"])
    ends = sum(tensor.count for tensor in tensors(config) if not tensor.stacked)
    layers = sum(tensor.count for tensor in tensors(config) if tensor.stacked)
    assert elements_per_device(config, Layout(pp=2)) == ends + layers // 2


ANY: dict[str, Any] = {"family": "llama", "max_positions": 4096}
PUBLISHED = {
    # Parameters and active parameters in billions, as the models' own papers and cards give them.
    "Llama-2-7B": (
        ModelConfig(**ANY, vocab_size=32000, embed=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128,
                    layer_kinds=(LayerKind(),) * 32), 6.738, 6.738),
    "Llama-2-70B": (
        ModelConfig(**ANY, vocab_size=32000, embed=8192, mlp=28672, heads=64, kv_heads=8, head_dim=128,
                    layer_kinds=(LayerKind(),) * 80), 68.98, 68.98),
    "Mixtral-8x7B": (
        ModelConfig(**ANY, vocab_size=32000, embed=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128,
                    moe=MoE(experts=8, experts_per_token=2, mlp=14336),
                    layer_kinds=(LayerKind(sparse=True),) * 32), 46.70, 12.88),
    "Falcon-180B": (
        ModelConfig(**ANY, vocab_size=65024, embed=14848, mlp=59392, heads=232, kv_heads=8, head_dim=64,
                    norm="layer", block="parallel", gated_mlp=False, layer_kinds=(LayerKind(),) * 80), 179.52, 179.52),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name: str) -> None:
    config, total, active = PUBLISHED[name]
    assert parameters(config) / 1e9 == pytest.approx(total, rel=1e-3)
    assert active_parameters(config) / 1e9 == pytest.approx(active, rel=1e-3)


def test_the_padding_of_a_vocabulary_is_held_but_not_counted() -> None:
    config = tiny.our_config(tiny.BY_NAME["llama-odd-vocabulary"])
    assert elements_per_device(config, Layout()) - parameters(config) == 2 * (384 - 257) * config.embed
