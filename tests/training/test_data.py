"""Batches: the same for any number of processes, and after any interruption."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbjax.training import IGNORED, data
from tests import processes
from tests.training.vocabulary import byte_tokenizer

DOCUMENTS = [
    np.arange(100 * n + 1, 100 * n + 1 + length) for n, length in enumerate([5, 3, 21, 8, 1, 13, 9, 2, 30, 4] * 3)
]

OPTIONS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["fit", "concat", None]),
        "seed": st.integers(0, 3),
        "shuffle": st.booleans(),
        "seq_len": st.sampled_from([8, 11]),
    }
)


def dataset(batch_size=4, seq_len=8, **options):
    return data.tokens(DOCUMENTS, seq_len=seq_len, batch_size=batch_size, **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)


def joined(parts):
    """The global batches of what each process got."""
    return [
        type(b[0])(*(None if f[0] is None else np.concatenate(f) for f in zip(*b, strict=True)))
        for b in zip(*parts, strict=True)
    ]


@settings(deadline=None, max_examples=20)
@given(OPTIONS)
def test_the_global_batch_is_the_same_for_any_number_of_processes(options):
    alone = take(dataset(**options).share(0, 1), 9)
    for count in (2, 4):
        shares = [take(dataset(**options).share(index, count), 9) for index in range(count)]
        assert shares[0][0].tokens.shape == (4 // count, options["seq_len"])
        equal(joined(shares), alone)


@settings(deadline=None, max_examples=20)
@given(OPTIONS, st.integers(0, 30), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_run_goes_on_at_the_next_example_with_any_number_of_processes(options, done, before, after):
    # 30 batches of 4 rows are several epochs of these documents.
    whole = take(dataset(**options).share(0, 1), done + 5)
    first = [dataset(**options).share(index, before) for index in range(before)]
    parts = [take(part, done) for part in first]
    states = [json.loads(json.dumps(part.state())) for part in first]
    assert all(state == states[0] for state in states)
    second = [dataset(**options).share(index, after) for index in range(after)]
    for part in second:
        part.restore(states[0])
    rest = [take(part, 5) for part in second]
    equal(joined(parts) + joined(rest), whole)


@pytest.mark.parametrize("packing", ["fit", "concat", None])
def test_an_epoch_holds_every_token_once_and_the_next_is_in_another_order(packing):
    made = dataset(batch_size=1, packing=packing).share(0, 1)
    batches = take(made, 2 * len(made))
    epochs = [
        np.concatenate([b.tokens[b.segments > 0] for b in half])
        for half in (batches[: len(made)], batches[len(made) :])
    ]
    everything = sorted(np.concatenate(DOCUMENTS).tolist())
    assert [sorted(epoch.tolist()) for epoch in epochs] == [everything] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert made.epoch == 2


def test_the_batch_size_may_change_on_the_way():
    whole = take(dataset(batch_size=2).share(0, 1), 20)
    made = dataset(batch_size=8).share(0, 1)
    first = take(made, 2)
    other = dataset(batch_size=4).share(0, 1)
    other.restore(made.state())
    tokens = np.concatenate([b.tokens for b in [*first, *take(other, 6)]])
    np.testing.assert_array_equal(tokens, np.concatenate([b.tokens for b in whole]))


def test_iterating_goes_on_where_the_data_set_stands():
    whole = take(dataset().share(0, 1), 6)
    made = dataset().share(0, 1)
    batches = iter(made)
    start = made.state()
    got = take(batches, 2) + take(made, 1)  # a second iterator
    equal([*got, next(batches)], whole[:4])
    made.restore(start)
    equal(take(batches, 3), whole[:3])  # the iterator that was open follows


def test_a_state_of_other_data_is_refused_with_what_differs():
    state = dataset(seed=1).state()
    with pytest.raises(ValueError, match="seed 1, here 2"):
        dataset(seed=2).restore(state)
    with pytest.raises(ValueError, match="seq_len 8, here 9"):
        dataset(seed=1, seq_len=9).restore(state)
    other = data.tokens(DOCUMENTS[::-1], seq_len=8, batch_size=4, seed=1)
    with pytest.raises(ValueError, match="corpus '"):
        other.restore(state)
    with pytest.raises(ValueError, match="examples=None"):
        other.restore({})


def test_evaluation_goes_once_through_all_rows_and_begins_anew_each_time():
    made = dataset(batch_size=4)
    rows = len(made.rows)
    evaluation = made.share(0, 1).evaluation()
    first, second = list(evaluation), list(evaluation)
    equal(first, second)
    assert len(first) == len(evaluation) == -(-rows // 4)
    tokens = np.concatenate([batch.tokens[batch.segments > 0] for batch in first])
    assert sorted(tokens.tolist()) == sorted(np.concatenate(DOCUMENTS).tolist())
    assert rows % 4, "the last batch is to be filled"
    last = first[-1]
    assert (last.targets[rows % 4 :] == IGNORED).all()
    assert (last.segments[rows % 4 :] == 0).all()
    equal(joined([list(made.share(index, 2).evaluation(3)) for index in range(2)]), first[:3])
    assert made.state()["examples"] == 0


def test_joined_documents_are_evaluated_once_too():
    made = dataset(batch_size=4, packing="concat", separate=False).share(0, 1)
    targets = np.concatenate([batch.targets for batch in made.evaluation()])
    assert np.count_nonzero(targets != IGNORED) == sum(map(len, DOCUMENTS)) - 1


def test_held_out_documents_are_not_trained_on():
    training, held = dataset(batch_size=1).share(0, 1).hold_out(0.2)
    assert len(held.documents) == 6
    trained = np.concatenate([batch.tokens[batch.segments > 0] for batch in training.evaluation()])
    evaluated = np.concatenate([batch.tokens[batch.segments > 0] for batch in held.evaluation()])
    assert not set(trained.tolist()) & set(evaluated.tolist())
    assert sorted([*trained.tolist(), *evaluated.tolist()]) == sorted(np.concatenate(DOCUMENTS).tolist())
    again = dataset(batch_size=1).hold_out(0.2)[1]
    np.testing.assert_array_equal(again.documents, held.documents)
    assert [len(part.documents) for part in dataset().hold_out(0.001)] == [29, 1]
    for made, share in ((dataset(), 1.5), (data.tokens(DOCUMENTS[:1], seq_len=8, batch_size=1), 0.5)):
        with pytest.raises(ValueError, match="both parts need a document"):
            made.hold_out(share)


def test_what_cannot_be_made_into_batches_is_refused():
    with pytest.raises(ValueError, match="seq_len=0 must be"):
        dataset(seq_len=0)
    with pytest.raises(ValueError, match="seed=-1 must be"):
        dataset(seed=-1)
    with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3 processes"):
        dataset().share(0, 3)
    with pytest.raises(ValueError, match="index=2 is no process of 2"):
        dataset().share(2, 2)
    with pytest.raises(ValueError, match="evaluation\\(0\\)"):
        dataset().evaluation(0)


def test_without_being_told_jax_says_which_process_this_is():
    equal(take(dataset(), 2), take(dataset().share(0, 1), 2))


def test_real_processes_share_batches_and_one_goes_on_from_their_state():
    script = """
import itertools, json
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tests.training.test_data import dataset
made = dataset()
where = NamedSharding(jax.make_mesh((2,), ("dp",)), PartitionSpec("dp"))
batches = [jax.make_array_from_process_local_data(where, b.tokens, (4, 8)) for b in itertools.islice(made, 3)]
whole = np.concatenate([multihost_utils.process_allgather(b, tiled=True) for b in batches])
print(json.dumps([whole.tolist(), made.state()]))
"""
    (first, state), other = (json.loads(out.splitlines()[-1]) for out in processes.run(script, devices=1))
    assert other == [first, state]
    alone = dataset().share(0, 1)
    np.testing.assert_array_equal(first, np.concatenate([batch.tokens for batch in take(alone, 3)]))
    later = dataset().share(0, 1)
    later.restore(state)
    equal(take(later, 3), take(alone, 3))


def test_fewer_rows_than_a_batch_are_repeated():
    made = data.tokens(np.arange(1, 7), seq_len=8, batch_size=4).share(0, 1)
    assert len(made.rows) == 1
    (batch,) = take(made, 1)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 4, 5, 6, 0, 0]] * 4)
    np.testing.assert_array_equal(batch.targets, [[2, 3, 4, 5, 6, *[IGNORED] * 3]] * 4)
    np.testing.assert_array_equal(batch.segments, [[1] * 6 + [0] * 2] * 4)


def test_neither_grain_nor_datasets_is_imported_before_it_is_needed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    script = f"""
import sys
import tbjax
from tbjax.training import data
assert not {{"grain", "datasets", "pyarrow"}} & set(sys.modules)
import transformers
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
made = [data.load({str(tmp_path)!r} + name, tokenizer, seq_len=8, batch_size=1) for name in ("/a.jsonl", "/a.txt")]
assert not {{"grain", "datasets", "pyarrow"}} & set(sys.modules)
sys.modules["datasets"] = None
for dataset in made:
    next(iter(dataset))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=os.environ)
