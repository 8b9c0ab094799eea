"""A family's table, spelled out: everything is bound once, and a checkpoint that differs is refused by name."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interop.bindings import Binding, bindings, check_checkpoint, rectangles, source_shapes
from interop.families import Weight
from interop.readers.base import CheckpointError
from interop.readers.memory import MemoryCheckpoint
from tbjax.api import abstract
from tests import by_table, tiny

LLAMA, MIXTRAL, PHI3, FALCON = (tiny.BY_NAME[name] for name in ("llama", "mixtral", "phi3", "falcon"))
QUERY = "model.layers.{layer}.self_attn.q_proj.weight"


def bound(case, family=None):
    config = tiny.our_config(case)
    return bindings(abstract(config, (1, 1, -1)), config, family or case.family)


def with_rows(case, change):
    """The case's family with its table changed."""
    return dataclasses.replace(case.family, weights=lambda config: change(list(case.family.weights(config))))


def shards(shape, cuts):
    """The bounds of each shard of an array cut so many times along each dimension."""
    edges = [np.linspace(0, size, cut + 1).astype(int).tolist() for size, cut in zip(shape, cuts, strict=True)]
    return itertools.product(*(list(itertools.pairwise(edge)) for edge in edges))


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_every_tensor_of_a_checkpoint_is_bound_with_its_shape(case):
    assert source_shapes(bound(case)) == {name: value.shape for name, value in tiny.tensors(case).items()}


@pytest.mark.parametrize("case", tiny.PLAIN, ids=str)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_however_a_parameter_is_cut_its_shards_take_each_element_of_the_sources_once(case, data):
    config = tiny.our_config(case)
    table = bound(case)
    taken = {name: np.zeros(shape, int) for name, shape in source_shapes(table).items()}
    for path, shape in by_table.shapes(config).items():
        cuts = data.draw(st.tuples(*(st.integers(1, min(size, 3)) for size in shape)))
        for bounds in shards(shape, cuts):
            filled = np.zeros([stop - start for start, stop in bounds], int)
            for binding in table:
                if binding.path == path:
                    for source, target in rectangles(binding, bounds):
                        taken[binding.source][source] += 1
                        filled[target] += 1
            vocabulary = "embedding" in path or path.startswith("head")
            real = max(0, min(bounds[0][1], config.vocab_size) - bounds[0][0]) if vocabulary else len(filled)
            assert (filled[:real] == 1).all()
            assert (filled[real:] == 0).all()
    assert all((count == 1).all() for count in taken.values())


def test_a_rectangle_is_the_runs_of_a_fused_tensor_seen_through_a_shard():
    # Two groups of one query head (rows 0-2, 4-6) and one key head (rows 2-4, 6-8); the shard has the key's rows 1-3.
    key = Binding("qkv", "key", (1,), (4, 6), ((2, 4), (6, 8)), transpose=False, fused=True)
    assert rectangles(key, ((0, 2), (1, 3), (3, 6))) == [
        ((slice(3, 4), slice(3, 6)), (1, slice(0, 1), slice(0, 3))),
        ((slice(6, 7), slice(3, 6)), (1, slice(1, 2), slice(0, 3))),
    ]
    assert rectangles(key, ((0, 1), (1, 3), (3, 6))) == []  # another layer


def test_a_transposed_rectangle_swaps_its_dimensions():
    down = Binding("w2", "down", (0, 3), (4, 6), ((0, 6),), transpose=True, fused=False)
    assert rectangles(down, ((0, 1), (2, 4), (0, 2), (3, 6))) == [
        ((slice(3, 6), slice(0, 2)), (0, 1, slice(0, 2), slice(0, 3)))
    ]


# --- Wrong tables -----------------------------------------------------------------------------------------------------


def drop(target):
    return lambda table: [row for row in table if row.target != target]


def add(*rows):
    return lambda table: [*table, *rows]


def change(target, **fields):
    return lambda table: [dataclasses.replace(row, **fields) if row.target == target else row for row in table]


@pytest.mark.parametrize(
    ("case", "table", "message"),
    [
        (LLAMA, drop("block.attention.query.weight"), "no tensor is bound to stacks.0.0.attention.query.weight"),
        (LLAMA, drop("final_norm.weight"), "no tensor is bound to final_norm.weight"),
        (LLAMA, add(Weight("other", "final_norm.weight")), r"final_norm.weight\[\] is bound 2 times, to .*other"),
        (LLAMA, add(Weight(QUERY, "block.attention.query.weight")), r"query.weight\[0\] is bound 2 times"),
        (LLAMA, add(Weight("other", "final_norm.bias")), "final_norm.bias, which the model does not have"),
        (LLAMA, add(Weight("x.{layer}", "block.attention.querry.weight")), "querry.weight, which no layer has"),
        (LLAMA, change("final_norm.weight", rows=((0, 31),)), "gives 31 rows to final_norm.weight, which has 32"),
        (LLAMA, change("final_norm.weight", transpose=True), "has 1 dimensions per tensor, not 2"),
        (MIXTRAL, change("block.mlp.gate", source="w.{layer}"), "has 3 dimensions per tensor, not 2"),
    ],
    ids=["block", "end", "twice", "twice-in-block", "unknown", "misspelt", "rows", "transpose", "expert"],
)
def test_a_wrong_table_is_refused(case, table, message):
    with pytest.raises(ValueError, match=message) as error:
        bound(case, with_rows(case, table))
    assert case.model_type in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((0, 32), (0, 16)), "rows 0 to 16 are used twice"),
        (((0, 48),), "gate_up_proj.weight: rows 0 to 48 are used twice"),
        (((47, 95),), "rows 47 to 48 are used twice"),
        (((49, 97),), "rows 48 to 49 are in no parameter"),
    ],
)
def test_fused_rows_that_do_not_tile_their_tensor_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        source_shapes(bound(PHI3, with_rows(PHI3, change("block.mlp.up.weight", rows=rows))))


# --- Checkpoints that differ ------------------------------------------------------------------------------------------


def check(case, tensors):
    config = tiny.our_config(case)
    return check_checkpoint(source_shapes(bound(case)), MemoryCheckpoint(tensors), config, case.family)


def test_a_missing_tensor_is_named():
    tensors = tiny.tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"<memory>: 1 tensor \(model.layers.1.mlp.up_proj.weight\) .* missing"):
        check(LLAMA, tensors)


def test_many_missing_tensors_are_counted():
    tensors = {name: value for name, value in tiny.tensors(LLAMA).items() if "layers.1" not in name}
    with pytest.raises(CheckpointError, match=r"9 tensors \(.*, and 4 more\) of this llama model are missing"):
        check(LLAMA, tensors)


def test_a_checkpoint_without_tensors_is_refused():
    with pytest.raises(CheckpointError, match=r"no file: 21 tensors .* missing"):
        check(LLAMA, {})


def test_an_unexpected_tensor_is_named():
    tensors = {**tiny.tensors(LLAMA), "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
    with pytest.raises(CheckpointError, match=r"1 tensor \(model.layers.0.self_attn.q_proj.bias\) is not part"):
        check(LLAMA, tensors)


def test_a_wrong_shape_is_named_with_both_shapes():
    tensors = {**tiny.tensors(LLAMA), "model.norm.weight": np.zeros(31, np.float32)}
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \[31\], config.json asks for \[32\]"):
        check(LLAMA, tensors)


def test_integers_are_not_weights():
    tensors = {**tiny.tensors(LLAMA), "model.norm.weight": np.zeros(32, np.int8)}
    with pytest.raises(CheckpointError, match=r"model.norm.weight\) is int8: weights are floating-point numbers"):
        check(LLAMA, tensors)


def test_buffers_that_carry_nothing_are_passed_over():
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    assert check(LLAMA, {**tiny.tensors(LLAMA), **buffer}) == ()


def test_the_second_copy_of_a_tied_embedding_is_returned_for_comparison():
    tied = tiny.BY_NAME["llama-tied"]
    tensors = tiny.tensors(tied)
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert check(tied, tensors) == ()
    assert check(tied, both) == (("lm_head.weight", "model.embed_tokens.weight"),)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[3, 32\]"):
        check(tied, {**tensors, "lm_head.weight": np.zeros((3, 32), np.float32)})
