"""The mesh: every spelling gives the same six axes, and a size that cannot be says what would do."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tbjax.mesh import AXES, axis_sizes, make_mesh, steps_over_slices


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ((2, 2, 2), {"dp": 2, "fsdp": 2, "tp": 2}),
        ([1, -1, 2], {"fsdp": 4, "tp": 2}),
        ({"tp": 4, "pp": 2}, {"pp": 2, "tp": 4}),
        ({"ep": -1, "tp": 2}, {"ep": 4, "tp": 2}),
        ("auto", {"fsdp": 8}),
        (None, {"fsdp": 8}),
        ({"tp": np.int64(8)}, {"tp": 8}),
        (np.array([2, 2, 2]), {"dp": 2, "fsdp": 2, "tp": 2}),
    ],
)
def test_every_spelling_names_the_same_axes(spec, expected):
    mesh = make_mesh(spec)
    assert mesh.axis_names == AXES
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == expected
    assert mesh.size == 8


def test_a_mesh_of_the_users_own_keeps_its_devices_and_becomes_automatic():
    theirs = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    ours = make_mesh(theirs)
    assert (ours.devices.squeeze() == theirs.devices).all()
    assert ours.axis_types == (AxisType.Auto,) * 6
    assert axis_sizes(ours, 8)["dp"] == 4
    assert set(ours.axis_names) == set(AXES)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ((2, 2, 4), ["16", "8", "would do: (1, 2, 4)"]),
        ((1, 3, 1), ["needs 3 devices", "8"]),
        ((3, -1, 1), ["multiple of 3", "8"]),
        ((-1, -1, 1), ["only one"]),
        ((0, 8, 1), ["'dp'", "0"]),
        ((True, 8, 1), ["'dp'", "True"]),
        ((2, 4), ["is not a mesh", "(dp, fsdp, tp)"]),
        ("tp=2", ["is not a mesh"]),
        ({"model": 8}, ["'model'", "tp"]),
    ],
)
def test_a_mesh_that_cannot_be_says_why(spec, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        make_mesh(spec)
    for word in words:
        assert word in str(error.value)


def test_the_suggested_mesh_would_do():
    with pytest.raises(ValueError, match="would do") as error:
        make_mesh({"dp": 3, "ep": 4, "tp": 4})
    suggestion = str(error.value).split("would do: ")[1].rstrip(".")
    assert make_mesh(eval(suggestion)).size == 8  # noqa: S307 (our own words)


def test_a_users_axis_that_is_unknown_is_named():
    with pytest.raises(ValueError, match="'model'"):
        make_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,)))


class OfSlice:
    """What laying a mesh asks of a device in a slice."""

    platform = "test"
    device_kind = "test"
    process_index = 0

    def __init__(self, index, slice_index):
        self.id, self.slice_index = index, slice_index

    def __repr__(self):
        return f"{self.slice_index}/{self.id}"


def test_slices_are_crossed_by_the_outermost_axes():
    devices = [OfSlice(i, i // 4) for i in range(8)]
    crossed = np.vectorize(lambda device: device.slice_index)(make_mesh((2, 2, 2), devices).devices)
    assert (crossed == np.arange(2).reshape(1, 2, 1, 1, 1, 1)).all()  # dp, and nothing else
    crossed = np.vectorize(lambda device: device.slice_index)(make_mesh((1, 4, 2), devices).devices)
    assert (crossed == np.repeat(np.arange(2), 2).reshape(1, 1, 4, 1, 1, 1)).all()


def test_a_mesh_that_cannot_be_laid_over_slices_says_so():
    with pytest.raises(ValueError, match="cannot be laid over 2 slices"):
        steps_over_slices({"dp": 1, "fsdp": 3, "tp": 1}, 2)


def test_several_cpu_devices_and_stored_programs_are_warned_of_once(tmp_path, caplog):
    before = {name: getattr(jax.config, name) for name in ("jax_enable_compilation_cache", "jax_compilation_cache_dir")}
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        for enabled, devices, warnings in ((False, 8, 0), (True, 1, 0), (True, 8, 1), (True, 8, 1)):
            jax.config.update("jax_enable_compilation_cache", enabled)
            make_mesh({"fsdp": devices}, jax.devices()[:devices])
            assert caplog.text.count("may hang") == warnings
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
