"""The map of a model's shardings: what it says is where JAX puts things."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.api import abstract
from tbjax.mesh import AXES, make_mesh
from tbjax.pages.shardings import holders
from tbjax.placement import placements
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return abstract(tiny.our_config(tiny.BY_NAME["mixtral"]), {"dp": 2, "ep": 2, "tp": 2})


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "ep": 2, "tp": 2}, {"dp": 2, "fsdp": 4}, {"pp": 2, "fsdp": 2, "tp": 2}])
def test_the_holders_of_a_piece_are_those_that_jax_gives_it_to(sizes):
    mesh = make_mesh(sizes)
    numbers = {device: number for number, device in enumerate(mesh.devices.flat)}
    used = [axis for axis in AXES if mesh.shape[axis] > 1]
    for first, second in itertools.permutations([(), *((axis,) for axis in used), tuple(used[:2])], 2):
        if set(first) & set(second):
            continue
        where = NamedSharding(mesh, PartitionSpec(first or None, second or None)).devices_indices_map((8, 8))
        pieces = {}
        for device, index in where.items():
            pieces.setdefault(tuple(part.start or 0 for part in index), []).append(numbers[device])
        in_order = sorted(holders((first, second), dict(mesh.shape)).items())
        assert [held for _, held in in_order] == [sorted(held) for _, held in sorted(pieces.items())]


def test_the_map_says_in_the_terminal_what_lies_where(model):
    text = str(model.show_sharding())
    assert text.startswith("Mixtral")
    assert "dp 2 x ep 2 x tp 2" in text
    assert all(row.path in text for row in placements(model))


def test_the_page_draws_every_way_of_cutting_once_and_names_every_tensor(model, tmp_path):
    page = model.show_sharding().to_html(tmp_path / "map.html")
    assert (tmp_path / "map.html").read_text(encoding="utf-8") == page
    rows = list(placements(model))
    cut = {row.layout for row in rows if row.nbytes_per_device < row.nbytes}
    assert page.count("<svg") == len(cut)
    assert all(row.path in page and row.layout in page for row in rows)
    assert "http" not in page.replace("http-equiv", "")


def test_a_notebook_shows_the_drawings(model):
    fragment = model.show_sharding()._repr_html_()
    assert fragment.count("<svg")
    assert "devices 0, 4" in fragment  # both data-parallel copies of the first piece


def test_one_device_holds_everything():
    shown = abstract(
        tiny.our_config(tiny.BY_NAME["llama"]), jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * 6), AXES)
    )
    assert "one device" in str(shown.show_sharding())
    assert shown.show_sharding().nbytes == shown.show_sharding().nbytes_per_device
    assert "<svg" not in shown.show_sharding().to_html()


def test_a_model_on_one_device_is_not_drawn_as_if_it_were_cut():
    whole = abstract(tiny.our_config(tiny.BY_NAME["llama"]), make_mesh({"dp": 1}, jax.devices()[:1]))
    page = whole.show_sharding().to_html()
    assert "one device holds them all" in page
    assert "How they are cut" not in page
    assert "Every tensor" in page
