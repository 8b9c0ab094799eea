"""A plan: the best layout of a model's work on a cluster, what it costs, and why it is not another.

    found = plan(config, Workload(global_batch=512, seq_len=4096), cluster("h100:8x8"))
    found.layout, found.memory.total, found.time.total

`plan` searches; a `Plan` is what it found, and knows how to show itself, to be kept as JSON, to be checked by the
compiler (`verify`), and to be run (`tbjax.load(..., mesh=plan)`). Where nothing fits, the plan is the closest miss:
what is missing, and the smallest cluster of the same devices on which something would.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tbjax.config import ModelConfig
from tbjax.plain import plain, restore
from tbjax.planner import cost, growth, words
from tbjax.planner.cost import Time
from tbjax.planner.hardware import Cluster
from tbjax.planner.legal import Rejection, Space
from tbjax.planner.memory import Memory, memory
from tbjax.planner.search import KEPT, Candidate, Objective, anything_fits, missing
from tbjax.planner.search import search as find
from tbjax.planner.verify import CompilationError, Verification, verify
from tbjax.planner.workload import Layout, Workload

Search: TypeAlias = Literal["analytic", "verified"]

# Raised when a reader of today would misread the files of then.
FORMAT = 1

# Columns of a printed plan where no terminal says how many it has.
WIDTH = 120

# How many of the best a verified search compiles.
COMPILED = 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The best layout that was found, with its price, its runners-up and the reasons against the others."""

    model: str = ""  # what the user called it
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
    verification: Verification | None = None  # the compiler's verdict, where the search asked for it

    @property
    def mesh(self) -> Mapping[str, int]:
        """The size of each mesh axis, outermost first."""
        return self.layout.mesh

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster: trained on, or generated."""
        return cost.tokens_per_second(self.time, self.workload)

    @property
    def mfu(self) -> float:
        """The share of the devices' peak that the model's own FLOPs take: recomputation does not count."""
        return cost.mfu(self.time, self.config, self.workload, self.cluster)

    @property
    def remedy(self) -> list[str]:
        """Where nothing fits: a sentence on what is missing, and one on what would do."""
        if self.fits:
            return []
        title = self.cluster.hardware.title
        return [
            f"Nothing fits: the layout that misses least needs {words.gib(self.missing)} more on each device.",
            f"The fewest {title} on which something fits are {self.smallest.devices:,}: {self.smallest}."
            if self.smallest
            else f"Nor would anything fit on up to {growth.MOST_DEVICES:,} {title}, with this batch.",
        ]

    def explain(self) -> str:
        """The plan in sentences: what lies where, what limits it, what the others lack."""
        return "\n".join([words.verdict(self), *words.summary(self), *self._against_runner_up(), *self.remedy])

    def verify(self, compiler: str = "auto", **options: Any) -> Verification:
        """What the target's own compiler makes of this plan. Needs no device; `tbjax[verify]` brings the compilers.

        Options are those of `planner.verify.verify`: `timeout`, `depths`, `progress`.
        """
        return verify(self.config, self.workload, self.layout, self.cluster, compiler=compiler, **options)

    def with_verification(self, verification: Verification) -> "Plan":
        """The same plan with the compiler's verdict beside it, shown wherever the plan is."""
        return dataclasses.replace(self, verification=verification)

    # Keeping.

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole plan as JSON, also written to `path` if one is given."""
        text = json.dumps({"format": FORMAT} | plain(self), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "Plan":
        """The plan that `to_json` wrote: its text, or the path of the file."""
        text, where = str(source), "the plan"
        if isinstance(source, Path) or not text.lstrip().startswith(("{", "[")):
            if not Path(source).is_file():
                raise FileNotFoundError(f"{source}: there is no such file; `tbjax plan ... --out {source}` writes one.")
            text, where = Path(source).read_text(encoding="utf-8"), str(source)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found is None:
            raise ValueError(f"{where} is no plan: `Plan.to_json` and `tbjax plan ... --out FILE` write them.")
        if found != FORMAT:
            raise ValueError(f"{where}: format {found!r} is not {FORMAT}: it needs the release of tbjax that wrote it.")
        return restore(cls, data, where)

    def to_html(self, path: str | Path, verification: Verification | None = None) -> None:
        """One file with everything in it: pictures, tables, and what the compiler said if it was asked."""
        from tbjax.planner.page import page

        Path(path).write_text(page(self, verification or self.verification), encoding="utf-8")

    # Showing.

    def __repr__(self) -> str:
        mesh = f"{words.mesh(self.layout)}, {words.options(self.layout)}"
        return f"<Plan: {words.heading(self)}: {mesh}: {words.seconds(self.time.total)}. {words.verdict(self)}>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=WIDTH, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def __rich__(self) -> Any:
        from tbjax.planner.report import report

        return report(self)

    def _repr_html_(self) -> str:
        from tbjax.planner.page import fragment

        return fragment(self)

    # A plan is a value, and its hash is that of what was asked: its prices are mappings, which have none.

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


def plan(
    config: ModelConfig,
    workload: Workload,
    cluster: Cluster,
    *,
    fixed: Mapping[str, Any] | None = None,
    objective: Objective = "throughput",
    search: Search = "analytic",
    model: str = "",
) -> Plan:
    """The best layout of `workload` on `cluster`.

    `fixed` holds what is not to be chosen: sizes of mesh axes and other fields of `Layout`, by name. Offloading is the
    last resort, for work that does not fit otherwise, unless `fixed` says "any": then it is chosen wherever it is
    quicker on paper, where a host's memory and its links are never busy with anything else. A "verified" search
    compiles the best few that it found, and believes the compiler about what fits.
    """
    if search not in get_args(Search):
        raise ValueError(f"search={search!r} is unknown: tbjax knows {', '.join(map(repr, get_args(Search)))}.")
    fixed = {name: value for name, value in (fixed or {}).items() if value is not None}
    offload = fixed.pop("offload", None)
    space = Space(config, workload, cluster, fixed if offload in (None, "any") else {**fixed, "offload": offload})
    if offload is None and workload.training:
        found = find(dataclasses.replace(space, fixed={**fixed, "offload": ()}), objective, keep=1 + KEPT)
        found = found if found.fits else find(space, objective, keep=1 + KEPT)
    else:
        found = find(space, objective, keep=1 + KEPT)
    best, *others = found.best
    about = {
        "model": model,
        "config": config,
        "workload": workload,
        "cluster": cluster,
        "objective": objective,
        "layout": best.layout,
        "memory": best.memory,
        "time": best.time,
        "candidates": tuple(others),
        "rejected": found.rejected,
    }
    if not found.fits:
        lacking = best.memory.total - cluster.hardware.usable
        return Plan(**about, fits=False, missing=lacking, smallest=smallest_cluster(space))
    batch = None if workload.training else maximum_batch(space, best.layout)
    made = Plan(**about, fits=True, maximum_batch=batch)
    return verified(made) if search == "verified" else made


def smallest_cluster(space: Space) -> Cluster | None:
    """The fewest devices, of the same kind and more than there are, on which something fits; None where none do."""
    for cluster in growth.larger(space.cluster):
        try:
            larger = dataclasses.replace(space, cluster=cluster)
        except ValueError:  # what the user fixed does not divide so many devices
            continue
        if anything_fits(larger):
            return cluster
    return None


def maximum_batch(space: Space, layout: Layout) -> int:
    """The most sequences that `layout` can serve at once: what it holds grows with each, so halving finds it."""
    step = layout.batch_ways * layout.microbatches

    def fits(batches: int) -> bool:
        workload = dataclasses.replace(space.workload, global_batch=batches * step)
        return not missing(space, memory(space.config, workload, layout, space.cluster.hardware))

    most = 1
    while fits(2 * most):
        most *= 2
    low, high = most, 2 * most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def verified(plan: Plan) -> Plan:
    """The plan as the compiler sees it, who looks at the best few, and further until one of them fits.

    What it says does not fit, or refuses, is rejected. The others are ranked by its own estimate of cycles where it
    gives one (TPU), by the bytes that it counted where memory is the objective, and otherwise as they were. Where it
    lets none fit, its closest miss is the plan.
    """
    contenders = [Candidate(layout=plan.layout, memory=plan.memory, time=plan.time), *plan.candidates]
    fitting: list[tuple[Candidate, Verification]] = []
    missed: list[tuple[Candidate, Verification]] = []
    refused: list[Rejection] = []
    left = list(contenders)
    while left and (len(contenders) - len(left) < COMPILED or not fitting):
        candidate = left.pop(0)
        try:
            said = verify(plan.config, plan.workload, candidate.layout, plan.cluster)
        except CompilationError as error:
            if not left and not fitting and not missed:
                raise
            reason = f"the compiler refuses: {' '.join(str(error).split())}"
            refused.append(Rejection(reason=reason, count=1, example=candidate.layout.mesh))
            continue
        (fitting if said.fits else missed).append((candidate, said))
    if not fitting:
        missed.sort(key=lambda pair: -pair[1].margin)
        fitting.append(missed.pop(0))
    elif plan.objective == "memory":
        fitting.sort(key=lambda pair: pair[1].compiled.total)
    elif plan.workload.training and all(said.cycles for _, said in fitting):
        fitting.sort(key=lambda pair: pair[1].cycles)
    (best, said), *others = fitting
    refused += [
        Rejection(
            reason=f"the compiler needs {words.gib(-verdict.margin)} more than a device has",
            count=1,
            example=candidate.layout.mesh,
        )
        for candidate, verdict in missed
    ]
    return dataclasses.replace(
        plan,
        layout=best.layout,
        memory=best.memory,
        time=best.time,
        verification=said,
        fits=said.fits,
        missing=max(-said.margin, 0),
        candidates=(*(candidate for candidate, _ in others), *left),
        rejected=(*refused, *plan.rejected),
    )
