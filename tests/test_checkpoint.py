"""Orbax checkpoints: the same arrays on any mesh, whole or not there."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tbjax
from tbjax import api, checkpoint, manifest, stored
from tbjax.layers.norm import RMSNorm
from tbjax.mesh import make_mesh
from tbjax.sharding import Sharding, leaves
from tests import processes, tiny


def equal(left, right):
    """Whether two models have the same parameters with the same values, wherever they lie."""
    assert [leaf.path for leaf in leaves(left)] == [leaf.path for leaf in leaves(right)]
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.fixture(scope="module")
def model():
    return tbjax.from_config(tiny.our_config(tiny.BY_NAME["llama"]), (2, 2, 2))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "final"
    checkpoint.save(model, path, companions={"note.txt": "for the reader"})
    return path


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 8), (8, 1, 1)])
def test_what_was_saved_on_one_mesh_is_restored_on_another(model, saved, mesh):
    abstract = api.abstract(model.config, mesh)
    restored = checkpoint.restore(abstract, saved)
    assert equal(restored, model)
    for array, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert array.sharding == wanted.sharding


def test_restoring_converts_to_the_dtype_of_the_model_it_fills(model, saved):
    restored = checkpoint.restore(api.abstract(model.config, (1, 8, 1), dtype=jnp.bfloat16), saved)
    assert equal(restored, jax.tree.map(lambda array: array.astype(jnp.bfloat16), model))


def test_a_number_that_the_wanted_dtype_cannot_hold_is_refused(model, tmp_path):
    checkpoint.save(jax.tree.map(lambda array: 1e6 * array, model), tmp_path / "x")
    with pytest.raises(ValueError, match=r"x: embedding\.weight has values beyond the range of float16"):
        checkpoint.restore(api.abstract(model.config, (1, 8, 1), dtype="float16"), tmp_path / "x")


def test_about_says_what_is_there_without_reading_it(model, saved):
    about = checkpoint.read_about(saved)
    assert about.config == model.config
    assert about.companions == {"note.txt": "for the reader"}
    assert about.parameters["embedding.weight"] == jax.ShapeDtypeStruct(model.embedding.weight.shape, jnp.float32)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_moe-every-other", "gemma3", "falcon-rw", "phi3-longrope", "llama-yarn"]
)
def test_every_kind_of_config_survives_json(name, tmp_path):
    config = tiny.our_config(tiny.BY_NAME[name])
    anything = RMSNorm(8, Sharding(make_mesh((8, 1, 1))), epsilon=1e-5, dtype=jnp.float32, key=jax.random.key(0))
    anything.config = config
    checkpoint.save(anything, tmp_path / "x")
    assert checkpoint.read_about(tmp_path / "x").config == config


def test_a_folder_that_stands_is_kept_unless_told(model, saved):
    with pytest.raises(FileExistsError, match=r"final exists already.*overwrite"):
        checkpoint.save(model, saved)
    checkpoint.save(model, saved, companions={"note.txt": "for the reader"}, overwrite=True)
    assert equal(checkpoint.restore(api.abstract(model.config, (2, 2, 2)), saved), model)


def test_overwriting_removes_nothing_but_checkpoints(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"does not look like a checkpoint.*lacks about/metadata"):
        checkpoint.save(model, tmp_path, overwrite=True)
    for folder in ("about", "parameters"):
        (tmp_path / folder).mkdir()
    with pytest.raises(FileExistsError, match=r"does not look like a checkpoint.*lacks about/metadata"):
        checkpoint.save(model, tmp_path, overwrite=True)
    for file in ("about/metadata", "parameters/_METADATA"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(FileExistsError, match=r"does not look like a checkpoint.*holds thesis\.tex"):
        checkpoint.save(model, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_is_used_and_a_link_stays_a_link(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    checkpoint.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.is_checkpoint(tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(model, saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(model, saved, overwrite=True)
    assert equal(checkpoint.restore(api.abstract(model.config, (2, 2, 2)), saved), model)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_what_a_killed_process_left_beside_it_is_removed(model, tmp_path):
    (tmp_path / ".x.partial" / "parameters").mkdir(parents=True)
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.read_about(tmp_path / "x")
    checkpoint.save(model, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_one_that_was_being_replaced_when_its_process_was_killed_is_named_and_then_removed(model, tmp_path):
    left = tmp_path / ".x.replaced-123"
    checkpoint.save(model, left)
    with pytest.raises(ValueError, match=r"x does not exist: .* Rename .*\.x\.replaced-123 to it"):
        checkpoint.read_about(tmp_path / "x")
    checkpoint.save(model, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_another_models_checkpoint_is_refused_by_name(model, saved):
    tied = dataclasses.replace(model.config, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"unexpected \['head.weight'\]"):
        checkpoint.restore(api.abstract(tied, (2, 2, 2)), saved)
    wider = dataclasses.replace(model.config, mlp=2 * model.config.mlp)
    with pytest.raises(ValueError, match=r"mlp\.down\.weight has shape \[2, 32, 48\], the model's has \[2, 32, 96\]"):
        checkpoint.restore(api.abstract(wider, (2, 2, 2)), saved)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        checkpoint.read_about(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a tbjax checkpoint"):
        checkpoint.read_about(tmp_path)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_whatever_byte_has_changed_it_is_not_loaded(model, saved, tmp_path):
    """In every file: one byte flipped, the last one missing, the file missing."""
    abstract = api.abstract(model.config, (2, 2, 2))
    copy = shutil.copytree(saved, tmp_path / "copy")
    names = files_of(copy)
    assert {"manifest", "about/metadata", "parameters/_METADATA", "parameters/manifest.ocdbt"} < set(names)
    assert any("/d/" in name for name in names)
    for name in names:
        content = (copy / name).read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damage in (changed, content[:-1], None):
            (copy / name).unlink() if damage is None else (copy / name).write_bytes(damage)
            with pytest.raises(manifest.Damaged, match="copy"):
                checkpoint.restore(abstract, copy)
            (copy / name).write_bytes(content)
    assert equal(checkpoint.restore(abstract, copy), model)


def test_how_closely_files_are_checked_can_be_chosen(model, saved, tmp_path):
    abstract = api.abstract(model.config, (2, 2, 2))
    copy = shutil.copytree(saved, tmp_path / "copy")
    data = max((copy / name for name in files_of(copy)), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(manifest.Damaged, match=f"{data.name} is not as it was written"):
        checkpoint.restore(abstract, copy)
    assert not equal(checkpoint.restore(abstract, copy, verify="sizes"), model)
    (copy / "manifest").unlink()
    with pytest.raises(manifest.Damaged, match=r"copy has no manifest.*verify='none'"):
        checkpoint.restore(abstract, copy, verify="sizes")
    assert not equal(checkpoint.restore(abstract, copy, verify="none"), model)
    assert not equal(tbjax.load(copy, (2, 2, 2), verify="none"), model)
    with pytest.raises(manifest.Damaged, match="has no manifest"):
        tbjax.load(copy, (2, 2, 2))
    with pytest.raises(ValueError, match="verify='thoroughly' is unknown: 'full', 'sizes', 'none'"):
        checkpoint.restore(abstract, copy, verify="thoroughly")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("about/metadata", "{", r"about/metadata cannot be read: Expecting property name"),
        ("about/metadata", "[1]", r"about/metadata cannot be read: list indices"),
        ("about/metadata", "{}", r"about/metadata cannot be read: KeyError: 'format'"),
        ("about/metadata", '{"format": 9}', r"about/metadata cannot be read: format 9 is not 1"),
        ("about/metadata", '{"format": 1, "config": {}}', r"about/metadata cannot be read: KeyError: 'layer_kinds'"),
        ("parameters/_METADATA", "{", r"parameters/_METADATA cannot be read: Expecting property name"),
        ("parameters/_METADATA", "{}", r"parameters/_METADATA cannot be read: KeyError: 'tree_metadata'"),
    ],
)
def test_what_was_written_wrongly_is_named(saved, tmp_path, file, text, message):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / file).write_text(text)
    with pytest.raises(manifest.Damaged, match=r"has \d+ bytes of the \d+ that were written"):
        checkpoint.read_about(copy)
    with pytest.raises(ValueError, match=message):
        checkpoint.read_about(copy, verify="none")


def test_a_field_that_this_release_does_not_know_is_named(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    about = json.loads((copy / "about/metadata").read_text())
    about["config"]["novelty"] = 1
    (copy / "about/metadata").write_text(json.dumps(about))
    manifest.seal(copy, manifest.take(copy, 0))
    with pytest.raises(ValueError, match=r"about/metadata cannot be read: .*'novelty'.*newer tbjax"):
        checkpoint.read_about(copy)


def test_a_home_folder_is_found(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert checkpoint.is_checkpoint(f"~/{saved.name}")


NUMBERS = """
from benchmarks.victims import llama
from tbjax import api, checkpoint, manifest
import numpy as np

def numbers(like):
    return np.random.default_rng(like.size).standard_normal(like.shape).astype(like.dtype)
"""

SAVING = """
model = jax.tree.map(
    lambda like: jax.make_array_from_callback(like.shape, like.sharding, numbers(like).__getitem__),
    api.abstract(llama(embed=64), (1, 4, 2)),
)
checkpoint.save(model, sys.argv[4])
try:
    checkpoint.save(model, sys.argv[4])
except OSError as error:
    assert "exists already" in str(error), error
else:
    raise SystemExit("what is there was not refused")
checkpoint.save(model, sys.argv[4], overwrite=True)
owners = {manifest.owner(name) for name in manifest.read(checkpoint.local(sys.argv[4]))}
assert owners == set(range(4)), owners
"""

RESTORING = """
model = checkpoint.restore(api.abstract(llama(embed=64), (1, 2, 4)), sys.argv[4])
for array in jax.tree.leaves(model):
    for shard in array.addressable_shards:
        assert np.array_equal(shard.data, numbers(array)[shard.index])
"""


def test_four_processes_save_together_and_two_restore_on_another_mesh(tmp_path):
    processes.run(NUMBERS + SAVING, tmp_path / "x", count=4, devices=2)
    processes.run(NUMBERS + RESTORING, tmp_path / "x", count=2, devices=4)
