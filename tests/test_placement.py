"""The table of where parameters lie."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from tbjax import placement
from tbjax.api import abstract
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return abstract(tiny.our_config(tiny.BY_NAME["llama"]), (2, 2, 2), dtype=jnp.bfloat16)


def test_a_placement_says_what_cuts_each_dimension_and_what_a_device_holds(model):
    rows = {row.path: row for row in placement.placements(model)}
    query = rows["stacks.0.0.attention.query.weight"]
    assert query.layout == "layers, heads/tp, embed/fsdp"
    config = model.config
    assert query.shape == (config.layers, config.heads * config.head_dim, config.embed)
    assert query.nbytes == math.prod(query.shape) * 2
    assert query.nbytes_per_device == query.nbytes // 4


def test_a_dimension_cut_by_two_axes_names_both():
    config = tiny.our_config(tiny.BY_NAME["mixtral"])
    rows = {row.path: row for row in placement.placements(abstract(config, {"fsdp": 2, "ep": 2, "tp": 2}))}
    assert rows["embedding.weight"].layout == "vocab/tp, embed/fsdp/ep"


def test_the_bytes_of_the_table_are_those_that_the_devices_hold(model):
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), model)
    expected = sum(row.nbytes_per_device for row in placement.placements(model))
    assert placement.bytes_held(arrays) == dict.fromkeys(jax.devices(), expected)


def test_the_table_names_every_parameter_and_ends_with_the_sums(model):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(placement.table(model))
    text = console.export_text()
    rows = list(placement.placements(model))
    assert all(row.path in text for row in rows)
    assert f"bfloat16[{model.config.padded_vocab},{model.config.embed}]" in text
    assert placement.readable(sum(row.nbytes for row in rows)) in text.splitlines()[-2]


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (538_091_520, "538.1 MB"), (2.5e15, "2500.0 TB")]
)
def test_bytes_are_readable(nbytes, text):
    assert placement.readable(nbytes) == text


def test_placements_are_values(model):
    row = next(placement.placements(model))
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.path = "another"
