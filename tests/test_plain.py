"""Values come back from plain data as they were, and what is no such data says where it is wrong."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax.plain import plain, restore
from tbjax.sharding import ShardingStrategy


class Pair(NamedTuple):
    left: int
    right: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    pairs: tuple[Pair, ...]
    sizes: Mapping[str, int]
    exact: tuple[int, float]
    share: float = 1.0
    kind: Literal["a", "b"] = "a"
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    inner: "Record | None" = None
    mixed: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)


pairs = st.builds(Pair, st.integers(), st.none() | st.text())
numbers = st.floats(allow_nan=False)
records = st.builds(
    Record,
    pairs=st.lists(pairs, max_size=3).map(tuple),
    sizes=st.dictionaries(st.text(), st.integers(), max_size=3),
    exact=st.tuples(st.integers(), numbers),
    share=numbers,
    kind=st.sampled_from(["a", "b"]),
    strategy=st.sampled_from(ShardingStrategy),
    mixed=st.dictionaries(st.text(), st.integers() | numbers | st.text(), max_size=3),
)
nested = st.builds(dataclasses.replace, records, inner=st.none() | records)


@given(nested)
def test_what_was_written_is_read(record):
    assert restore(Record, json.loads(json.dumps(plain(record)))) == record


def good(**changes: Any) -> dict[str, Any]:
    return plain(Record((Pair(1, "x"),), {"a": 1}, (1, 2.0))) | changes


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], ["Record", "an object"]),
        (good(colour=1), ["Record", "colour"]),
        ({"sizes": {}}, ["Record", "pairs", "exact"]),
        (good(pairs=3), ["Record.pairs", "a list", "3"]),
        (good(pairs=[{"left": "x"}]), ["Record.pairs[0].left", "int", "'x'"]),
        (good(exact=[1]), ["Record.exact", "2", "[1]"]),
        (good(sizes={"a": True}), ["Record.sizes.a", "int", "True"]),
        (good(sizes=[]), ["Record.sizes", "an object"]),
        (good(share="much"), ["Record.share", "a number", "'much'"]),
        (good(kind="c"), ["Record.kind", "'c'", "'a'"]),
        (good(strategy="ALL"), ["Record.strategy", "'ALL'", "FULL_SHARD"]),
        (good(inner={"pairs": []}), ["Record.inner", "sizes"]),
    ],
)
def test_what_is_wrong_is_named(data, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        restore(Record, data)
    for word in words:
        assert word in str(error.value)


def test_a_value_that_json_cannot_hold_is_named():
    with pytest.raises(TypeError, match="set"):
        plain({"a": {1, 2}})
