"""What a checkpoint's files are to contain, so that nothing else is ever taken for weights.

A checkpoint is whole when it has a `manifest`: two lines, the second of which is the digest of the first.

    {"format": 1, "files": {"about/metadata": [1374, "5f1d9c3a07b2e846"], ...}}
    a91be6f32c05d874

Every file stands in it with its size and its digest, data, metadata and indices alike. Orbax checks some of its
indices, and none of the numbers between them: a byte that has changed on the disk would be a weight that has changed.

The digest is XXH3 of 64 bits: on one core it goes through 9 GB/s where zlib.crc32 goes through 1.2 and SHA-256 through
0.5, so that checking costs what reading costs. It finds accidents; it is no protection from who forges files.

Each process takes the digests of the files that it wrote, and checks its share of those that are read: no process has
to go through all of a checkpoint.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import xxhash

NAME = "manifest"

# Raised when a reader of today would misread the manifests of then.
FORMAT = 1

# How much is checked of what is read: every byte; that files have their sizes; nothing.
Verify: TypeAlias = Literal["full", "sizes", "none"]

# Large enough that a disk reads at its full rate, small beside the memory that loading may take.
BUFFER_BYTES = 4 << 20

# Files are few and large; more threads than this no disk keeps busy.
THREADS = 8

# Orbax has each process write into files and folders of its own, named so.
_OF_PROCESS = re.compile(r"(?:^|[./])process_(\d+)(?:/|$)")


class Damaged(ValueError):
    """A checkpoint's files are not those that were written."""


class Entry(NamedTuple):
    """What a file is to contain."""

    size: int
    digest: str


Entries: TypeAlias = dict[str, Entry]


def take(folder: Path, process: int) -> Entries:
    """The entries of those files in `folder` that process `process` wrote; the first wrote what bears no number.

    They, and the folders that they are in, are on the disk when this returns: a manifest must not outlive what it
    vouches for when the power fails.
    """
    names = [name for name in _files(folder) if name != NAME and owner(name) == process]
    entries = _entries(folder, names, sync=True)
    for parent in sorted({above for name in names for above in Path(name).parents}):
        sync_folder(folder / parent)
    return entries


def owner(name: str) -> int:
    """The process that wrote a file, by its path in the checkpoint."""
    found = _OF_PROCESS.search(name)
    return int(found[1]) if found else 0


def seal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest, the last file of a checkpoint, and see that it is on the disk."""
    line = json.dumps({"format": FORMAT, "files": dict(sorted(entries.items()))}).encode()
    with (folder / NAME).open("wb") as file:
        file.write(line + b"\n" + xxhash.xxh3_64_hexdigest(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> Entries:
    """The manifest of a checkpoint. Raises `Damaged` if it has none, or not the one that was written."""
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Damaged(
            f"{folder} has no {NAME}: it was copied in part, or written before checkpoints had one (verify='none' "
            "reads it as it is)."
        ) from None
    line, _, rest = content.partition(b"\n")
    if rest != xxhash.xxh3_64_hexdigest(line).encode() + b"\n":
        raise Damaged(f"{path} is not as it was written.")
    values = json.loads(line)
    if values["format"] != FORMAT:
        raise ValueError(f"{path}: format {values['format']!r} is not {FORMAT}: a newer tbjax wrote it.")
    return {name: Entry(*entry) for name, entry in values["files"].items()}


def check(
    folder: Path, within: Iterable[str] = ("",), verify: Verify = "full", *, share: tuple[int, int] = (0, 1)
) -> None:
    """Raise `Damaged`, naming the file, unless what lies `within` these paths of a checkpoint is as it was written.

    Of `share = (index, count)` processes this one checks its part.
    """
    if verify not in get_args(Verify):
        raise ValueError(f"verify={verify!r} is unknown: {', '.join(map(repr, get_args(Verify)))} are to choose from.")
    if verify == "none":
        return
    inside = tuple(within)
    entries = {name: entry for name, entry in read(folder).items() if name.startswith(inside)}
    for name, entry in entries.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{folder / name} is missing.") from None
        if size != entry.size:
            raise Damaged(f"{folder / name} has {size} bytes of the {entry.size} that were written.")
    if verify == "full":
        mine = _share(entries, *share)
        for name, found in _entries(folder, mine).items():
            if found != entries[name]:
                raise Damaged(f"{folder / name} is not as it was written: its digest is {found.digest}, not "
                              f"{entries[name].digest}.")  # fmt: skip


def _share(entries: Mapping[str, Entry], index: int, count: int) -> list[str]:
    """The files that process `index` of `count` reads: the largest first, each to whoever has least so far."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(entries, key=lambda name: (-entries[name].size, name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += entries[name].size
    return shares[index]


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _entries(folder: Path, names: Iterable[str], *, sync: bool = False) -> Entries:
    listed = list(names)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "digests") as pool:
        return dict(zip(listed, pool.map(lambda name: _entry(folder / name, sync), listed), strict=True))


def _entry(path: Path, sync: bool) -> Entry:
    digest, size, buffer = xxhash.xxh3_64(), 0, memoryview(bytearray(BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
        if sync:
            os.fsync(file.fileno())
    return Entry(size, digest.hexdigest())
