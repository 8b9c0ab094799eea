"""Copying rectangles: any layout, any dtype, in blocks that together are the whole."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interop.copying import SQUARE, Move, aligned, blocks, copy, fill
from interop.readers.base import CheckpointError
from interop.readers.memory import ArrayTensor
from tbjax.dtypes import narrows

DTYPES = [np.dtype(kind) for kind in ("f8", "f4", "f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)]


@given(
    rows=st.integers(0, 2 * SQUARE + 3),
    columns=st.integers(0, 2 * SQUARE + 3),
    turned=st.booleans(),
    stride=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_a_copy_is_the_assignment_whatever_the_layout(rows, columns, turned, stride, dtype):
    source = np.random.default_rng(0).standard_normal((stride * rows, columns)).astype(dtype)[::stride]
    target = np.zeros((columns, rows), dtype).T if turned else np.zeros((rows, columns), dtype)
    copy(target, source)
    np.testing.assert_array_equal(target.astype(float), source.astype(float))


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_a_copy_converts_as_a_cast_does(of, to):
    source = np.linspace(-4, 4, 400).astype(of)
    target = np.zeros(400, to)
    copy(target, source)
    np.testing.assert_array_equal(target.view(np.uint8), source.astype(to).view(np.uint8))


def test_equal_dtypes_are_copied_bit_for_bit():
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)  # every bfloat16, signalling NaNs too
    target = np.zeros((256, 256), ml_dtypes.bfloat16)
    copy(target, bits.view(ml_dtypes.bfloat16).T)
    np.testing.assert_array_equal(target.view(np.uint16), bits.T)


NARROWER = [(of, to) for of, to in itertools.product(DTYPES, DTYPES) if narrows(of, to)]


@pytest.mark.parametrize(("of", "to"), NARROWER, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_the_target_cannot_hold_is_refused_by_name(of, to, sign):
    largest = ml_dtypes.finfo(of).max
    source = ArrayTensor("model.norm.weight", np.array([[1.0, 2.0], [3.0, sign * largest]], of))
    with pytest.raises(CheckpointError, match=rf"<memory>: tensor 'model.norm.weight' .* {to}: .* is beyond ±"):
        fill(source, [Move((slice(0, 2), slice(0, 2)), np.zeros((2, 2), to).T)])


def test_all_pairs_that_can_overflow_are_looked_at():
    # By their largest numbers: 1.8e308, 3.403e38, 3.390e38, 65504, 448.
    order = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"]
    assert {(of.name, to.name) for of, to in NARROWER} == set(itertools.combinations(order, 2))


@pytest.mark.parametrize(("of", "to"), [(np.float32, np.float16), (ml_dtypes.bfloat16, np.float16)], ids=str)
def test_infinity_stays_infinity(of, to):
    source = ArrayTensor("x", np.array([np.inf, -np.inf, np.nan, 65504 if of is np.float32 else 65280], of))
    target = np.zeros(4, to)
    fill(source, [Move((slice(0, 4),), target)])
    np.testing.assert_array_equal(target, source.read().astype(to))


@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    limit=st.integers(1, 400),
    columns=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_blocks_are_the_moves_again_and_no_larger_than_asked(cuts, limit, columns):
    edges = [0, *sorted(cut for cut in cuts if cut), 41]
    source = np.arange(41 * columns, dtype=np.int32).reshape(41, columns)
    target = np.full((41, columns), -1, np.int32)
    # Every run of rows goes to two places, as rows that are split between devices do.
    half = columns // 2
    moves = [
        Move((slice(a, b), slice(*part)), target[a:b, slice(*part)])
        for a, b in itertools.pairwise(edges)
        for part in ((0, half), (half, columns))
    ]
    for block in blocks(moves, source.itemsize, limit):
        first = min(move.source[0].start for move in block)
        last = max(move.source[0].stop for move in block)
        assert (last - first) * columns * 4 <= limit or last - first == 1
        for index, view in block:
            assert (view == -1).all()
            view[...] = source[index]
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_for_jax_is_aligned_and_can_be_zeroed(dtype):
    for shape in ((), (3,), (5, 7)):
        array = aligned(shape, dtype, zeroed=True)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert (array.reshape(-1).view(np.uint8) == 0).all()
