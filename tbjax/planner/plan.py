"""A plan: the best layout of a model's work on a cluster, what it costs, and why it is not another.

    plan = make_plan(config, Workload(global_batch=512, seq_len=4096), cluster("h100:8x8"))
    plan.layout, plan.memory.total, plan.time.total

`make_plan` searches; a `Plan` is what it found, and knows how to show itself, to be kept as JSON, to be checked by the
compiler (`verify`), and to be run (`tbjax.load(..., mesh=plan)`). Where nothing fits, the plan is the closest miss: what
is missing, and the smallest cluster of the same devices on which something would.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tbjax.config import ModelConfig
from tbjax.planner import growth, plain, words
from tbjax.planner.cost import Time, step_time
from tbjax.planner.hardware import Cluster
from tbjax.planner.legal import Rejection, Space
from tbjax.planner.memory import Memory, memory
from tbjax.planner.search import Candidate, Objective, overflow, search
from tbjax.planner.workload import Layout, Workload

if TYPE_CHECKING:
    from tbjax.planner.verify import Verification

Search: TypeAlias = Literal["analytic", "verified"]

# Raised when a reader of today would misread the files of then.
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The best layout that was found, with its price, its runners-up and the reasons against the others."""

    model: str  # what the user called it
    config: ModelConfig
    workload: Workload
    cluster: Cluster
    objective: Objective = "throughput"
    layout: Layout
    memory: Memory  # bytes of one device: .parts, .total, .host
    time: Time  # seconds: .parts, .total
    fits: bool
    candidates: tuple[Candidate, ...] = ()  # the runners-up, best first
    rejected: tuple[Rejection, ...] = ()  # the other meshes, by reason
    missing: int = 0  # where nothing fits: bytes that each device lacks
    smallest: Cluster | None = None  # where nothing fits: the fewest of these devices on which something does
    maximum_batch: int | None = None  # inference: the most sequences that this layout can serve at once

    @property
    def mesh(self) -> Mapping[str, int]:
        """The size of each mesh axis, outermost first."""
        return self.layout.mesh

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster: trained on, or generated."""
        return tokens(self.workload) / self.time.total

    @property
    def tokens_per_second_per_device(self) -> float:
        return self.tokens_per_second / self.cluster.devices

    @property
    def mfu(self) -> float:
        """The share of the devices' peak that the model's own FLOPs take: recomputation does not count."""
        return 0.0

    def explain(self) -> str:
        """The plan in sentences: what lies where, what limits it, what the others lack."""
        return "\n".join([words.verdict(self), *words.summary(self), *self._against_runner_up(), *self._if_not()])

    def verify(self, compiler: str = "auto", **options: Any) -> "Verification":
        """What the target's own compiler makes of this plan. Needs no device; `tbjax[verify]` brings the compilers."""
        from tbjax.planner.verify import verify

        return verify(self.config, self.workload, self.layout, self.cluster, compiler=compiler, **options)

    # Keeping.

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole plan as JSON, also written to `path` if one is given."""
        text = json.dumps({"format": FORMAT} | plain.plain(self), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "Plan":
        """The plan that `to_json` wrote: its text, or the path of the file."""
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text, where = (source, "the plan") if is_text else (Path(source).read_text(encoding="utf-8"), str(source))
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != FORMAT:
            raise ValueError(f"{where}: format {found!r} is not {FORMAT}: it needs the release of tbjax that wrote it.")
        return plain.restore(cls, data, where)

    def to_html(self, path: str | Path, verification: "Verification | None" = None) -> None:
        """One file with everything in it: pictures, tables, and what the compiler said if that is given."""
        from tbjax.planner.page import page

        Path(path).write_text(page(self, verification), encoding="utf-8")

    # Showing.

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=_WIDTH, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def __rich__(self) -> Any:
        from tbjax.planner.report import report

        return report(self)

    def _repr_html_(self) -> str:
        from tbjax.planner.page import fragment

        return fragment(self)

    # A plan is a value, but a large one: equality looks at identity first, and its hash at what it was asked.

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Plan) and self.to_json() == other.to_json())

    def __hash__(self) -> int:
        return hash((self.model, self.config, self.workload, str(self.cluster), self.layout))

    def _against_runner_up(self) -> list[str]:
        if not self.candidates:
            return []
        second = self.candidates[0]
        return [
            f"The next best is {words.mesh(second.layout)} ({words.options(second.layout)}): "
            f"{words.seconds(second.time.total)} and {words.gib(second.memory.total)}, "
            f"against {words.seconds(self.time.total)} and {words.gib(self.memory.total)}."
        ]

    def _if_not(self) -> list[str]:
        if self.fits:
            return []
        where = f"The smallest {self.cluster.hardware.title} cluster that would do is {self.smallest}"
        would = f"{where}, {self.smallest.devices} devices." if self.smallest else "No larger cluster of them would do."
        return [f"Every legal layout needs at least {words.gib(self.missing)} more. {would}"]
