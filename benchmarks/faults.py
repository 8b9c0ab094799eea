"""What a run loses when things go wrong, and what it pays so as not to.

    python -m benchmarks.faults                         all of it
    python -m benchmarks.faults kills --kills 500       one part: kills, damage, disk, price

kills    runs killed with SIGKILL at random moments (`benchmarks.kills`)
damage   a checkpoint in which one thing has changed, for every file of it: is that found before it is loaded?
disk     a run whose disk fills up, and gets room again
price    of a state of 500 MB: the time that saving takes from training, the speed of restoring beside that of reading
         the files, the memory that both take
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import tbjax
from benchmarks.kills import INTERVAL, Kill, kill_again_and_again
from benchmarks.memory import AnonymousMemory
from benchmarks.victims import Nursery, llama, mounts
from tbjax import checkpoint, manifest
from tbjax.mesh import make_mesh
from tbjax.training import Batch, init_state
from tbjax.training.config import TrainConfig
from tbjax.training.loop import SAVE_EVERY, make_train_step
from tbjax.training.saving import Saver, leeway, saved_steps


def kills(folder: Path, count: int, seed: int, console: Console) -> None:
    """Kill `count` runs."""
    told: list[Kill] = []

    def tell(kill: Kill) -> None:
        told.append(kill)
        shown.update(f"{len(told)} of {count}: step {kill.reached}, lost {kill.lost}, {kill.seconds:.1f} s to go on")

    with Nursery(folder) as nursery, console.status("killing") as shown:
        report = kill_again_and_again(nursery, folder, count, seed=seed, on_kill=tell)
    found = Table("killed after", "times", "steps lost: median", "most", title="SIGKILL at random moments")
    kinds = Counter(kill.when.split()[-1] for kill in report.kills)
    for kind, times in kinds.most_common():
        lost = [kill.lost for kill in report.kills if kill.when.endswith(kind)]
        found.add_row(kind, str(times), f"{statistics.median(lost):.0f}", str(max(lost)))
    console.print(found)
    seconds = [kill.seconds for kill in report.kills]
    console.print(
        f"kills survived / tried: {report.survived} / {len(report.kills)}; a checkpoint every {INTERVAL} steps, "
        f"{sum(kill.writing for kill in report.kills)} of the kills while one was being written. Lost were at most "
        f"{_most_lost(report.kills, background=True)} steps where the run went on meanwhile, and "
        f"{_most_lost(report.kills, background=False)} where it waited. Restarts took "
        f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f}) to their first step. Of {report.steps} steps "
        f"{len(report.differing)} had another loss than in a run that was not killed."
    )


def _most_lost(kills: Sequence[Kill], *, background: bool) -> int:
    return max((kill.lost for kill in kills if kill.background == background), default=0)


# --- Damage -----------------------------------------------------------------------------------------------------------

Change = Callable[[bytes, random.Random], bytes | None]


def _flip(at: Callable[[bytes, random.Random], int]) -> Change:
    def change(content: bytes, draw: random.Random) -> bytes:
        place = at(content, draw)
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]

    return change


def _zeros(content: bytes, draw: random.Random) -> bytes:
    """A block that was never written, as a crash leaves it."""
    start = draw.randrange(len(content))
    end = min(len(content), start + 512)
    blank = bytes(end - start)
    if content[start:end] == blank:  # it was zeros before
        blank = b"\1" + blank[1:]
    return content[:start] + blank + content[end:]


CHANGES: dict[str, Change] = {
    "first byte": _flip(lambda content, draw: 0),
    "last byte": _flip(lambda content, draw: len(content) - 1),
    "any byte": _flip(lambda content, draw: draw.randrange(len(content))),
    "zeros within": _zeros,
    "cut short": lambda content, draw: content[: draw.randrange(len(content))],
    "empty": lambda content, draw: b"",
    "longer": lambda content, draw: content + b"\0",
    "missing": lambda content, draw: None,
}


def _kind(name: str) -> str:
    if name == manifest.NAME:
        return "manifest"
    if "/d/" in name:
        return "data"
    return "index" if name.endswith(".ocdbt") else "metadata"


def damage(folder: Path, times: int, seed: int, console: Console) -> None:
    """Change every file of a checkpoint in every way, and see whether it is loaded."""
    draw = random.Random(seed)
    model, state, _ = _made({}, make_mesh((1, 2, 1), jax.devices()[:2]))
    with Saver(folder / "run") as saver:
        saver.save(state, 1, data=None, config=None)
    path = folder / "run" / "1"
    shapes = jax.tree.map(_struct, model)
    tried: Counter[tuple[str, str]] = Counter()
    found: Counter[tuple[str, str]] = Counter()
    for name in (*sorted(manifest.read(path)), manifest.NAME):
        content = (path / name).read_bytes()
        for way, change in CHANGES.items():
            for _ in range(times if way == "any byte" else 1):
                changed = change(content, draw)
                (path / name).unlink() if changed is None else (path / name).write_bytes(changed)
                tried[_kind(name), way] += 1
                found[_kind(name), way] += _is_refused(path, shapes, name)
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(content)
    kinds = ("data", "index", "metadata", "manifest")
    shown = Table("change", *kinds, title="Changed afterwards: found / tried")
    for way in CHANGES:
        shown.add_row(way, *(f"{found[kind, way]} / {tried[kind, way]}" for kind in kinds))
    console.print(shown)
    console.print(f"corruptions detected / tried: {found.total()} / {tried.total()}")


def _is_refused(path: Path, shapes: Any, name: str) -> bool:
    """Whether a run skips a checkpoint whose file `name` has changed and, if a model needs it, none is loaded."""
    try:
        manifest.check(path)
    except manifest.Damaged:
        pass
    else:
        return False
    if name.startswith(("training/", "progress/")):
        return True
    try:
        checkpoint.restore(shapes, path)
    except manifest.Damaged:
        return True
    return False


# --- A full disk ------------------------------------------------------------------------------------------------------


def disk(folder: Path, console: Console) -> None:
    """A file system of 8 MB that fills up under a run."""
    if not mounts():
        console.print("full disk: not tried, as this user may not mount a file system in a namespace of its own.")
        return
    with Nursery(folder, disk="8m") as nursery:
        run = nursery.disk / "run"
        victim = nursery.start(Path(nursery.mounted) / "run", save_every=INTERVAL)
        victim.wait_for(lambda: bool(saved_steps(run)))
        ballast = nursery.disk / "ballast"
        fill(ballast)
        victim.wait_for(lambda: "could not be written" in victim.text)
        before = max(victim.steps)
        whole = saved_steps(run)
        victim.wait_for(lambda: max(victim.steps) > before + INTERVAL)
        kept = saved_steps(run)
        ballast.unlink()
        freed = max(victim.steps)
        victim.wait_for(lambda: max(saved_steps(run)) > freed)
        newest = max(saved_steps(run))
        victim.kill()
    said = next(line for line in victim.text.splitlines() if "could not be written" in line)
    console.print(f"full disk: the run said: {said[:160]}...")
    console.print(
        f"full disk: checkpoints {whole} stayed ({kept}) while it went on; there was room at step {freed}, and step "
        f"{newest} was saved."
    )


def fill(path: Path) -> None:
    """Write until the disk is full."""
    try:
        with path.open("wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
    except OSError:
        return


# --- The price --------------------------------------------------------------------------------------------------------

# 42 million parameters: a state of 504 MB in float32 with AdamW.
LARGE = {"vocab_size": 16384, "embed": 512, "mlp": 2048, "heads": 8, "kv_heads": 8, "head_dim": 64, "layers": 8}


def _made(sizes: dict[str, int], mesh: Any) -> tuple[Any, Any, TrainConfig]:
    """A model of these sizes, its first state, and how it is trained."""
    model = tbjax.from_config(llama(**sizes), mesh, dtype="float32")
    training = TrainConfig(steps=1000, schedule="constant", precision="float32").with_plan(None)
    state = init_state(model, training.make_optimizer(model), precision="float32")
    return model, state, training


def _struct(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _abstract(state: Any) -> Any:
    return jax.tree.map(_struct, state)


def price(folder: Path, rounds: int, console: Console) -> None:
    """What saving and restoring a state of 500 MB cost."""
    model, state, training = _made(LARGE, make_mesh((1, 2, 1), jax.devices()[:2]))
    size = sum(array.nbytes for array in jax.tree.leaves(state))
    shown = Table("", "", title=f"A state of {size / 1e6:.0f} MB, {rounds} rounds: median, least and most")
    step = make_train_step(model, None, training.make_optimizer(model), precision="float32", on_nonfinite="keep")
    state = _saving(step, state, folder, rounds, shown)
    like = _abstract(state)
    for array in jax.tree.leaves(state):
        array.delete()
    _restoring(like, size, folder / "run", rounds, shown)
    console.print(shown)


def _saving(step: Any, state: Any, folder: Path, rounds: int, shown: Table) -> Any:
    """Save in the background of a run, again and again; the state after it."""
    tokens = np.random.default_rng(0).integers(0, LARGE["vocab_size"], (2, 65)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])

    def one(state: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - began

    for _ in range(3):  # the first ones compile
        state, _ = one(state)
    found: dict[str, list[float]] = {name: [] for name in ("step", "blocked", "stolen", "written", "memory", "steps")}
    with Saver(folder / "run", keep=1) as saver:
        for number in range(1, rounds + 1):
            steady = []
            for _ in range(6):
                state, seconds = one(state)
                steady.append(seconds)
            usual = statistics.median(steady)
            with AnonymousMemory() as held:
                began = time.perf_counter()
                saver.save(state, number, data=None, config=None)
                blocked = stolen = time.perf_counter() - began
                steps = 0
                while saver.writing:
                    state, seconds = one(state)
                    stolen += seconds - usual
                    steps += 1
                written = time.perf_counter() - began
            saver.wait()
            figures = (usual, blocked, stolen, written, held.peak - held.before, steps)
            for name, value in zip(found, figures, strict=True):
                found[name].append(value)
    usual, stolen = (statistics.median(found[name]) for name in ("step", "stolen"))
    shown.add_row("a step, with nothing else to do", _spread(found["step"], "s"))
    shown.add_row("save: until training goes on", _spread(found["blocked"], "s"))
    shown.add_row("save: until it is in its place (to the end of a step)", _spread(found["written"], "s"))
    shown.add_row(
        f"  steps meanwhile, at most; training would wait after {leeway(SAVE_EVERY)}", str(int(max(found["steps"])))
    )
    shown.add_row("save: taken from training in all", _spread(found["stolen"], "s"))
    shown.add_row(f"  of every step at the default interval of {SAVE_EVERY}", f"{stolen / SAVE_EVERY / usual:.2%}")
    shown.add_row(
        "save: memory beyond the state, at most, the steps' own included", f"{max(found['memory']) / 1e6:.0f} MB"
    )
    with AnonymousMemory() as held, Saver(folder / "waiting", keep=1, background=False) as saver:
        saver.save(state, 1, data=None, config=None)
        saver.wait()
    shown.add_row("save, not in the background: memory beyond the state", f"{(held.peak - held.before) / 1e6:.0f} MB")
    return state


def _restoring(like: Any, size: int, run: Path, rounds: int, shown: Table) -> None:
    """Restore again and again, beside reading the files."""
    path = run / str(saved_steps(run)[-1])
    ways: dict[str, Callable[[], Any]] = {
        "the files, read into memory": lambda: _raw(path),
        "restore, every byte checked": lambda: _restored(run, like, "full"),
        "restore, not checked": lambda: _restored(run, like, "none"),
        "check alone": lambda: manifest.check(path),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    memory = []
    for number in range(rounds):
        # By turns first: each finds the memory that the one before it gave up.
        names = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
        for name, act in ((name, ways[name]) for name in names):
            with AnonymousMemory() as held:
                began = time.perf_counter()
                kept = act()
                speeds[name].append(size / 1e9 / (time.perf_counter() - began))
            del kept
            if name.startswith("restore"):
                memory.append(held.peak - held.before - size)
    for name, values in speeds.items():
        shown.add_row(name, _spread(values, "GB/s"))
    raw, checked = (
        statistics.median(speeds[name]) for name in ("the files, read into memory", "restore, every byte checked")
    )
    shown.add_row("restore, every byte checked: of reading the files", f"{checked / raw:.0%}")
    shown.add_row("restore: memory beyond the state, at most", f"{max(memory) / 1e6:.0f} MB")


def _raw(path: Path) -> list[bytes]:
    files = [file for file in path.rglob("*") if file.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(Path.read_bytes, files))


def _restored(run: Path, like: Any, verify: manifest.Verify) -> Any:
    with Saver(run, verify=verify) as saver:
        return jax.block_until_ready(saver.restore(like))


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}) {unit}"


PARTS = ("damage", "price", "disk", "kills")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=10, help="bytes flipped at random in each file")
    parser.add_argument("--rounds", type=int, default=5, help="of saving and restoring")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix=f"tbjax-{part}-") as name:
            folder = Path(name)
            if part == "kills":
                kills(folder, options.kills, options.seed, console)
            elif part == "damage":
                damage(folder, options.flips, options.seed, console)
            elif part == "disk":
                disk(folder, console)
            else:
                price(folder, options.rounds, console)


if __name__ == "__main__":
    main()
