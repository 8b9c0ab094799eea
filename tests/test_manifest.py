"""What a manifest finds, and who looks."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbjax import manifest
from tbjax.manifest import Damaged, Entry

FILES = {
    "about/metadata": b'{"a": 1}',
    "parameters/d/0": bytes(range(256)) * 5,
    "parameters/ocdbt.process_0/d/1": b"zero",
    "parameters/ocdbt.process_1/d/2": b"one" * 100,
    "parameters/array_metadatas/process_12": b"twelve",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_every_process_takes_what_it_wrote_and_the_first_the_rest(folder):
    taken = {process: set(manifest.take(folder, process)) for process in (0, 1, 2, 12)}
    assert taken[1] == {"parameters/ocdbt.process_1/d/2"}
    assert taken[12] == {"parameters/array_metadatas/process_12"}
    assert taken[2] == set()
    assert set.union(*taken.values()) == set(FILES)


def test_what_is_vouched_for_is_on_the_disk_and_so_are_the_folders_that_it_is_in(folder, monkeypatch):
    synced = set()
    monkeypatch.setattr(manifest.os, "fsync", lambda handle: synced.add(os.readlink(f"/proc/self/fd/{handle}")))
    sealed(folder)
    paths = [folder / name for name in (*FILES, manifest.NAME)]
    within = {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)}
    assert synced == set(map(str, {*paths, *within}))


def sealed(folder):
    manifest.seal(folder, manifest.take(folder, 0) | manifest.take(folder, 1) | manifest.take(folder, 12))


def test_no_byte_of_the_manifest_can_change_or_go_unseen(folder):
    sealed(folder)
    manifest.check(folder)
    content = (folder / manifest.NAME).read_bytes()
    for place in range(len(content)):
        for changed in (content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :], content[:place]):
            (folder / manifest.NAME).write_bytes(changed)
            with pytest.raises(Damaged, match="manifest is not as it was written"):
                manifest.check(folder, verify="sizes")


def test_files_beside_what_is_read_are_not_looked_at(folder):
    sealed(folder)
    (folder / "parameters/d/0").unlink()
    manifest.check(folder, ("about/",))
    with pytest.raises(Damaged, match="parameters/d/0 is missing"):
        manifest.check(folder, ("parameters/",))


@given(st.lists(st.integers(0, 1000)), st.integers(1, 9))
def test_processes_share_the_reading_evenly_and_leave_nothing_out(sizes, count):
    entries = {f"f{number}": Entry(size, "") for number, size in enumerate(sizes)}
    shares = [manifest._share(entries, index, count) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(entries)
    loads = [sum(entries[name].size for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
