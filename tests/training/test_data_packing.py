"""Packing: every token once, each followed by what follows it, and documents that can be told apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.training import IGNORED
from tbjax.training.data.corpus import Corpus, Document, Shard, gather
from tbjax.training.data.packing import best_fit, pack, split

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SIZES = st.integers(1, 17)
SEEDS = st.none() | st.integers(0, 5)


def corpus_of(lengths, learn=None) -> Corpus:
    """Documents in which every token of all is another, from 1 on: a token found is a place found."""
    ids = np.arange(1, sum(lengths) + 1)
    flags = None if learn is None else np.resize(np.array(learn, np.uint8), len(ids))
    return Corpus([Shard("test", ids, flags)], np.array(lengths))


def rows_of(corpus, size, packing, *, separate=True, seed=None):
    return pack(corpus, np.arange(len(corpus.lengths)), size, packing, separate=separate, seed=seed)


@settings(deadline=None)
@given(LENGTHS, SIZES, st.sampled_from(["fit", "concat", None]), SEEDS, st.none() | st.lists(st.booleans(), min_size=1))
def test_every_token_stands_once_before_the_one_that_follows_it(lengths, size, packing, seed, learn):
    corpus = corpus_of(lengths, learn)
    last = set(np.cumsum(lengths).tolist())
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    found = []
    rows = rows_of(corpus, size, packing, seed=seed)
    for batch in (rows[row] for row in range(len(rows))):
        assert all(array.shape == (size,) and array.dtype == np.int32 for array in batch if array is not None)
        real = batch.segments > 0
        assert real.any()
        assert (batch.tokens[real] > 0).all()
        assert (batch.targets[~real] == IGNORED).all()
        segments = batch.segments[real]
        # Numbered from 1 on, each in one piece, and of one document.
        assert set(np.diff(segments, prepend=0).tolist()) <= {0, 1}
        for segment in range(1, segments.max(initial=0) + 1):
            tokens = batch.tokens[batch.segments == segment]
            assert (np.diff(tokens) == 1).all()
            assert len(set(document_of[tokens - 1])) == 1
        for token, target in zip(batch.tokens[real].tolist(), batch.targets[real].tolist(), strict=True):
            taught = token not in last and (learn is None or learn[token % len(learn)])
            assert target == (token + 1 if taught else IGNORED)
        found += batch.tokens[real].tolist()
    assert sorted(found) == list(range(1, sum(lengths) + 1))
    assert rows.efficiency == pytest.approx(sum(lengths) / (len(rows) * size))


@settings(deadline=None)
@given(LENGTHS, SIZES, SEEDS)
def test_joined_rows_are_full_and_teach_every_token_but_the_first_once(lengths, size, seed):
    corpus = corpus_of(lengths)
    if sum(lengths) <= size:
        with pytest.raises(ValueError, match=f"only {sum(lengths)} tokens in all"):
            rows_of(corpus, size, "concat", separate=False, seed=seed)
        return
    rows = rows_of(corpus, size, "concat", separate=False, seed=seed)
    batches = [rows[row] for row in range(len(rows))]
    assert all(batch.segments is None and batch.mask is None for batch in batches)
    taught = np.concatenate([batch.targets[batch.targets != IGNORED] for batch in batches])
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    starts = np.cumsum([0, *lengths])
    stream = np.concatenate([np.arange(starts[d], starts[d + 1]) + 1 for d in order])
    np.testing.assert_array_equal(taught, stream[1:])
    following = dict(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    for batch in batches:
        np.testing.assert_array_equal(batch.tokens[1:], [following[token] for token in batch.tokens[:-1].tolist()])
        assert all(
            t in (IGNORED, following[s]) for s, t in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
        )


@given(LENGTHS, SIZES)
def test_pieces_are_whole_but_for_the_last_of_each_document(lengths, size):
    lengths = np.array(lengths)
    pieces = split(np.cumsum(lengths) - lengths, lengths, size)
    assert pieces.lengths.sum() == lengths.sum()
    assert (pieces.lengths[~pieces.ends] == size).all()
    assert pieces.ends.sum() == len(lengths)
    np.testing.assert_array_equal(pieces.starts, np.cumsum(pieces.lengths) - pieces.lengths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_best_fit_overfills_no_row_and_begins_none_without_need(lengths):
    size, lengths = 12, np.array(lengths)
    rows = best_fit(lengths, size)
    filled = np.bincount(rows, weights=lengths)
    assert (filled <= size).all()
    assert (filled > 0).all()
    # Rows are numbered by the first piece in each.
    assert list(dict.fromkeys(rows.tolist())) == list(range(len(filled)))
    # A row is begun only for what fits into none, so no two rows would fit into one.
    assert np.count_nonzero(filled <= size / 2) <= 1


def test_rows_of_many_documents_are_nearly_full():
    lengths = np.random.default_rng(0).geometric(1 / 200, 2000)
    assert rows_of(corpus_of(lengths), 512, "fit").efficiency > 0.99
    assert rows_of(corpus_of(lengths), 512, "concat").efficiency > 0.99
    assert rows_of(corpus_of(lengths), 512, None).efficiency < 0.5


def test_a_seed_mixes_documents_and_no_seed_keeps_their_order():
    corpus = corpus_of([3] * 40)
    first = rows_of(corpus, 6, "fit")
    np.testing.assert_array_equal(np.concatenate([first[row].tokens for row in range(20)]), np.arange(1, 121))
    mixed = [rows_of(corpus, 6, "fit", seed=seed)[0].tokens.tolist() for seed in (0, 0, 1)]
    assert mixed[0] == mixed[1] != mixed[2]


@pytest.mark.parametrize(
    ("packing", "separate", "message"),
    [("first-fit", True, "packing='first-fit' is unknown"), ("fit", False, "packing='concat', not 'fit'")],
)
def test_a_packing_that_is_none_is_refused(packing, separate, message):
    with pytest.raises(ValueError, match=message):
        rows_of(corpus_of([5]), 4, packing, separate=separate)


def test_a_corpus_in_several_arrays_is_one():
    arrays = [np.arange(1, 6, dtype=np.uint16), np.arange(6, 20, dtype=np.int64)]
    corpus = Corpus([Shard(str(array.dtype), array) for array in arrays], np.array([2, 3, 14]))
    whole = corpus_of([2, 3, 14])
    assert corpus.fingerprint == whole.fingerprint
    for packing in ("fit", "concat"):
        ours, theirs = (rows_of(c, 4, packing) for c in (corpus, whole))
        for row in range(len(theirs)):
            np.testing.assert_array_equal(ours[row].tokens, theirs[row].tokens)
            np.testing.assert_array_equal(ours[row].targets, theirs[row].targets)


def test_a_fingerprint_tells_documents_apart():
    ids = np.arange(1000)
    one = gather([Document(ids)], "a", 2000).fingerprint
    assert one == gather([Document(ids)], "b", 3000).fingerprint
    others = [
        gather([Document(ids[:500]), Document(ids[500:])], "a", 2000),
        gather([Document(ids[::-1])], "a", 2000),
        gather([Document(ids, ids > 10)], "a", 2000),
    ]
    assert len({one, *(other.fingerprint for other in others)}) == 4
