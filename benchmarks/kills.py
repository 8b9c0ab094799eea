"""Runs that are killed at any moment, and what they lose.

Each time a run is started, let go until something has been seen of it (a step, so many bytes or files of a checkpoint
that is being written, a checkpoint in its place, or nothing but time), and killed with SIGKILL. What must hold:

- the next run goes on from the newest checkpoint that was visible: whatever is visible is whole;
- it repeats no more steps than lie between two checkpoints and, if one was being written meanwhile, the few for which
  training may go on then (`tbjax.training.saving.leeway`); every third run waits for its checkpoints, and has none;
- every loss that any of the runs reports is, to the last bit, that of a run that was never killed.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.victims import Nursery, Victim
from tbjax.training.saving import leeway, saved_steps

INTERVAL = 20  # steps between checkpoints


@dataclasses.dataclass(frozen=True)
class Kill:
    """A run that was killed, and the one after it."""

    when: str
    reached: int  # the last step that was reported
    background: bool  # whether it went on while checkpoints were written
    writing: bool  # whether one was being written
    visible: int  # the newest checkpoint; 0: none
    resumed: int  # the step from which the next run went on
    seconds: float  # from the start of the next run to its first step

    @property
    def lost(self) -> int:
        return self.reached - self.resumed

    @property
    def allowed(self) -> int:
        """The steps that it may have lost."""
        return INTERVAL + (leeway(INTERVAL) if self.background and self.writing else 0)

    @property
    def survived(self) -> bool:
        return self.resumed == self.visible and self.lost <= self.allowed


@dataclasses.dataclass(frozen=True)
class Report:
    kills: list[Kill]
    steps: int  # how far the runs came together
    differing: list[int]  # steps whose losses were not those of a run that was never killed

    @property
    def survived(self) -> int:
        return 0 if self.differing else sum(kill.survived for kill in self.kills)


def kill_again_and_again(
    nursery: Nursery, folder: Path, count: int, *, seed: int = 0, on_kill: Callable[[Kill], None] = lambda kill: None
) -> Report:
    """`count` runs in `folder`, all of them killed."""
    draw = random.Random(seed)
    run, kills, losses = folder / "run", [], {}
    differing: set[int] = set()
    pending = None

    def note(victim: Victim) -> None:
        for step, loss in victim.steps.items():
            if losses.setdefault(step, loss) != loss:
                differing.add(step)

    for number in range(count + 1):
        background = number % 3 != 2
        began = time.monotonic()
        victim = nursery.start(run, save_every=INTERVAL, async_save=background)
        if pending is not None:
            _require(victim.wait_for(lambda victim=victim: bool(victim.steps)), victim)
            kills.append(Kill(**pending, resumed=victim.began, seconds=time.monotonic() - began))
            on_kill(kills[-1])
        if len(kills) == count:
            victim.kill()
            note(victim)
            break
        when, condition = _moment(draw, run, victim)
        _require(victim.wait_for(condition), victim)
        victim.kill()
        note(victim)
        pending = {
            "when": when,
            "reached": max(victim.steps, default=victim.began),
            "background": background,
            "writing": any(run.glob(".*.partial")),
            "visible": max(saved_steps(run), default=0),
        }
    whole = nursery.start(folder / "whole")
    last = max(losses)
    _require(whole.wait_for(lambda: last in whole.steps), whole)
    whole.kill()
    undisturbed = whole.steps
    differing |= {step for step, loss in losses.items() if undisturbed[step] != loss}
    return Report(kills, last, sorted(differing))


def _moment(draw: random.Random, run: Path, victim: Victim) -> tuple[str, Callable[[], bool]]:
    """When to kill: in words, and as a condition."""
    kind = draw.choice(["time", "steps", "steps", "bytes", "bytes", "files", "place"])
    if kind == "time":
        end = time.monotonic() + draw.uniform(0, 5)
        return f"{kind}", lambda: time.monotonic() > end
    if kind == "steps":
        count = draw.randint(1, 3 * INTERVAL)
        return f"{count} steps", lambda: len(victim.steps) >= count
    if kind == "place":
        count = draw.randint(1, 3)
        seen: set[int] = set()

        def placed() -> bool:
            seen.update(saved_steps(run))
            return len([step for step in seen if step > victim.began]) >= count and bool(victim.steps)

        return f"{count} checkpoints", placed
    least = draw.randint(1, 600_000 if kind == "bytes" else 40)
    return f"{least} {kind}", lambda: bool(victim.steps) and _written(run)[kind] >= min(least, _most(kind, run))


def _written(run: Path) -> dict[str, int]:
    """What lies in the checkpoint that is being written, which may be renamed at any moment."""
    sizes = []
    for partial in run.glob(".*.partial"):
        for parent, _, names in os.walk(partial):  # it passes over what is gone
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return {"bytes": sum(sizes), "files": len(sizes)}


def _most(kind: str, run: Path) -> int:
    """What a checkpoint in its place has: no more is to be waited for."""
    for step in reversed(saved_steps(run)):
        try:
            sizes = [path.stat().st_size for path in (run / str(step)).rglob("*") if path.is_file()]
            found = {"bytes": sum(sizes), "files": len(sizes)}
        except FileNotFoundError:
            continue
        return max(1, int(0.95 * found[kind]))
    return 1


def _require(reached: bool, victim: Victim) -> None:
    if not reached:
        raise RuntimeError(f"a run ended by itself, with status {victim.wait()}:\n{victim.text[-4000:]}")
