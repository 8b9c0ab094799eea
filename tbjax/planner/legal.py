"""Which layouts are legal, and in words why the others are not.

A `Space` is everything that a plan may choose from: the meshes that a model, a batch and a cluster allow, and on each
mesh the settings that go with it. Meshes are grown axis by axis, innermost first, so that a size that cannot be is
refused once, together with all the meshes that would have had it. What the user fixed is not varied.

Divisibility is what the decoder asks of its parameters (`tbjax/sharding.py`), read from the parameters themselves; the
rest follows from what a degree means: tp speaks at every layer and stays inside the fast domain, a pipeline has for
every stage a repeat of the model's pattern of layers, a batch is cut into whole sequences.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tbjax.config import ModelConfig
from tbjax.mesh import AXES, spell
from tbjax.planner.hardware import Cluster
from tbjax.planner.parameters import tensors
from tbjax.planner.workload import Layout, Offloaded, Optimizer, Remat, Schedule, Workload
from tbjax.sharding import PARAMETER_AXES, ShardingStrategy

# Axes in the order in which a mesh is grown: those with the fewest legal sizes first, so that much is refused at once;
# dp last, because it takes what is left.
_GROWTH = ("tp", "ep", "cp", "pp", "fsdp", "dp")

# What a plan chooses besides the mesh, by the names of `Layout`'s fields.
SETTINGS = ("strategy", "sequence_parallel", "microbatches", "remat", "schedule", "chunks", "offload")

_STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.OPTIMIZER)
_OFFLOADS: tuple[tuple[Offloaded, ...], ...] = ((), ("optimizer",), ("activations",), ("optimizer", "activations"))
_REMATS: tuple[Remat, ...] = ("none", "dots", "full", "stage")

# Under which activations are not offloaded, and why (`tbjax.remat.Remat.offloading`).
_NAMELESS: Mapping[Remat, str] = {
    "none": "keeps too much to name, and what is offloaded must have a name",
    "stage": "is for pipelines, whose activations are not offloaded",
}

# Optimizers that cannot have their state in the host's memory, since it comes to the device layer by layer
# (`tbjax.training.optimizer.Layerwise`).
_NOT_LAYERWISE: tuple[Optimizer, ...] = ("adafactor",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejection:
    """Meshes that were turned down for one reason."""

    reason: str
    count: int  # of meshes
    example: Mapping[str, int]


class Refusal(NamedTuple):
    """One size of one axis that cannot be."""

    rule: str  # the same for every size that the rule refuses
    reason: str


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that a plan for `workload` on `cluster` may choose from; `fixed` holds what the user chose."""

    config: ModelConfig
    workload: Workload
    cluster: Cluster
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.fixed if name not in (*AXES, *SETTINGS)]
        if unknown:
            raise ValueError(f"{unknown} cannot be fixed: a plan has {', '.join((*AXES, *SETTINGS))}.")
        object.__setattr__(self, "fixed", {name: value for name, value in self.fixed.items() if value is not None})
        self._check_fixed()

    # Meshes.

    def meshes(self) -> tuple[list[Layout], list[Rejection]]:
        """Every legal mesh, as a layout without settings, and the others by reason."""
        legal: list[Layout] = []
        refused: dict[str, Rejection] = {}
        for sizes, refusal in self._grow({}, self.cluster.devices, _GROWTH):
            if refusal is None:
                legal.append(Layout(**sizes))
                continue
            count = self._completions(sizes)
            known = refused.get(refusal.rule)
            # The first to be refused has the smallest size: the clearest example.
            refused[refusal.rule] = (
                Rejection(reason=refusal.reason, count=count, example=self._completed(sizes))
                if known is None
                else dataclasses.replace(known, count=known.count + count)
            )
        return legal, sorted(refused.values(), key=lambda rejection: -rejection.count)

    def _grow(
        self, sizes: dict[str, Any], left: int, axes: Sequence[str]
    ) -> Iterator[tuple[dict[str, Any], Refusal | None]]:
        """Meshes that continue `sizes` over `left` devices: whole ones, and beginnings that are refused."""
        if not axes:
            yield sizes, None
            return
        axis, rest = axes[0], axes[1:]
        for size in self._choices(axis, left, rest):
            longer = {**sizes, axis: size}
            refusal = self._refusal(axis, longer)
            if refusal:
                yield longer, refusal
            else:
                yield from self._grow(longer, left // size, rest)

    def _choices(self, axis: str, left: int, rest: Sequence[str]) -> Sequence[int]:
        """The sizes that `axis` may have, so that the axes after it can still take what is left."""
        settled = self._settled
        committed = math.prod(settled.get(other, 1) for other in rest)
        if left % committed:
            return ()
        free = left // committed
        if axis in settled:
            return (settled[axis],) if free % settled[axis] == 0 else ()
        if all(other in settled for other in rest):
            return (free,)
        return divisors(free)

    def _completions(self, sizes: Mapping[str, int]) -> int:
        """How many meshes begin with `sizes`."""
        free = [axis for axis in _GROWTH[len(sizes) :] if axis not in self._settled]
        committed = math.prod(self._settled.get(axis, 1) for axis in _GROWTH[len(sizes) :])
        return ordered_factorizations(self.cluster.devices // math.prod(sizes.values()) // committed, len(free))

    def _completed(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """A whole mesh that begins with `sizes`: what is left goes to the last free axis that takes it best."""
        mesh = {axis: sizes.get(axis, self._settled.get(axis, 1)) for axis in AXES}
        left = self.cluster.devices // math.prod(mesh.values())
        free = [axis for axis in ("fsdp", "dp", "pp", "cp", "ep") if axis not in sizes and axis not in self._settled]
        if free:
            mesh[free[0]] *= left
        return mesh

    def _refusal(self, axis: str, sizes: Mapping[str, int]) -> Refusal | None:
        """Why `axis` cannot have its size, given those of the axes before it."""
        if sizes[axis] == 1 and axis not in ("fsdp", "dp", "pp"):
            return None
        return _RULES[axis](self, sizes) if axis in _RULES else None

    def _refuse_tp(self, sizes: Mapping[str, int]) -> Refusal | None:
        tp, (domain, name) = sizes["tp"], fast_domain(self.cluster)
        if domain % tp and "tp" not in self.fixed:  # whoever asks for it by name shall have its price
            verb = "crosses" if tp > domain else "does not divide"
            return Refusal(f"tp {verb}", f"tp={tp} {verb} the {name}")
        return self._refuse_uneven("tp", tp, "tp")

    def _refuse_ep(self, sizes: Mapping[str, int]) -> Refusal | None:
        if self.config.moe is None:
            return Refusal("ep dense", f"ep={sizes['ep']}: the model has no experts")
        return self._refuse_uneven("ep", sizes["ep"], "ep")

    def _refuse_cp(self, sizes: Mapping[str, int]) -> Refusal | None:
        # Every device has a chunk from the front of the sequence and one from the back (`tbjax.layers.context`).
        length, ways = self.workload.prompt_len or self.workload.seq_len, 2 * sizes["cp"]
        if length % ways:
            return Refusal("cp", f"a sequence of {length} does not divide into the {ways} chunks of cp={sizes['cp']}")
        return None

    def _refuse_pp(self, sizes: Mapping[str, int]) -> Refusal | None:
        pp = sizes["pp"]
        if pp == 1:
            if self.fixed.get("remat") == "stage":
                return Refusal("pp stage", "remat='stage' keeps the input of a pipeline stage, and pp=1 has none")
            return None
        if self._patterns > 1:
            # Serving may run even so: it gathers every layer on every device, which saves neither time nor cache.
            return Refusal(
                "pp pattern",
                f"pp={pp}: the {self.config.layers} layers follow no single pattern, but {self._patterns} one after "
                "the other, and a pipeline cuts one stack of repeats",
            )
        if pp > self._repeats:
            return Refusal("pp", f"{self._spoken_repeats} < pp {pp}: a stage would have none")
        if self.workload.training and "activations" in self.fixed.get("offload", ()):
            return Refusal("pp offload", f"pp={pp}: activations are not offloaded from the stages of a pipeline")
        schedule, chunks = self.fixed.get("schedule"), self.fixed.get("chunks")
        # With so many microbatches there is every schedule that cuts evenly.
        if self.workload.training and not _schedules(self._repeats, pp, 2 * pp, schedule, chunks):
            fixed = {"schedule": schedule, "chunks": chunks}
            said = " and ".join(f"{name}={value!r}" for name, value in fixed.items() if value is not None)
            return Refusal("pp pieces", f"{said} does not share {self._spoken_repeats} out evenly over pp={pp}")
        return None

    def _refuse_fsdp(self, sizes: Mapping[str, int]) -> Refusal | None:
        degree = sizes["fsdp"] * sizes["ep"]
        name = "fsdp" if sizes["ep"] == 1 else "fsdp*ep"
        return self._refuse_uneven("fsdp", degree, name) or self._refuse_batch(degree, name)

    def _refuse_dp(self, sizes: Mapping[str, int]) -> Refusal | None:
        ways = [axis for axis in ("dp", "fsdp", "ep") if sizes[axis] > 1] or ["dp"]
        return self._refuse_batch(math.prod(sizes[axis] for axis in ways), "*".join(ways))

    def _refuse_uneven(self, axis: str, degree: int, name: str) -> Refusal | None:
        """A dimension of the parameters that does not divide. (Few key-value heads are held by every tp device.)"""
        for dim, size in self._cut_by[axis]:
            if size % degree:
                what = _SPOKEN.get(dim, dim).format(size=size, config=self.config)
                return Refusal(f"{axis} {dim}", f"{what} cannot be cut evenly over {name}={degree}")
        return None

    def _refuse_batch(self, degree: int, name: str) -> Refusal | None:
        rows = self.workload.global_batch // self.fixed.get("microbatches", 1)
        if rows % degree:
            return Refusal("batch", f"a batch of {rows} sequences does not divide over {name}={degree}")
        return None

    # Looked up tens of thousands of times.

    @functools.cached_property
    def _unused_schedule(self) -> tuple[tuple[Schedule, int], ...]:
        """What stands in a layout that has no pipeline: it changes nothing."""
        return ((self.fixed.get("schedule", "1f1b"), self.fixed.get("chunks", 1)),)

    @functools.cached_property
    def _served(self) -> bool:
        return not self.workload.training

    @functools.cached_property
    def _patterns(self) -> int:
        return len(self.config.groups)

    @functools.cached_property
    def _repeats(self) -> int:
        """What a pipeline shares out."""
        return self.config.groups[0].repeats

    @functools.cached_property
    def _spoken_repeats(self) -> str:
        width = len(self.config.groups[0].pattern)
        return f"{self._repeats} layers" if width == 1 else f"{self._repeats} repeats of {width} layers"

    @functools.cached_property
    def _offloads(self) -> Mapping[bool, tuple[tuple[Offloaded, ...], ...]]:
        """What may be offloaded, by whether activations may be."""
        optimizer = self.workload.training and self.workload.optimizer not in _NOT_LAYERWISE
        without = tuple(each for each in _OFFLOADS if optimizer or "optimizer" not in each)
        return {
            True: without if self.workload.training else _OFFLOADS[:1],
            False: tuple(each for each in without if "activations" not in each),
        }

    @functools.cached_property
    def _settled(self) -> Mapping[str, int]:
        """The axes over which there is nothing to choose. A model without experts does not ask for ep."""
        dense = {} if self.config.moe else {"ep": 1}
        return dense | {axis: self.fixed[axis] for axis in AXES if axis in self.fixed}

    @functools.cached_property
    def _cut_by(self) -> Mapping[str, list[tuple[str, int]]]:
        """The dimensions that each axis cuts first, with the sizes that parameters have there."""
        sizes = {
            (dim, size)
            for tensor in tensors(self.config)
            for dim, size in zip(tensor.dims, tensor.shape, strict=True)
            if dim is not None
        }
        return {
            axis: sorted((dim, size) for dim, size in sizes if dim != "kv_heads" and _first_axis(dim) == axis)
            for axis in AXES
        }

    # Settings on a mesh.

    def layouts(self, mesh: Layout) -> Iterator[Layout]:
        """Every legal way to use a mesh."""
        for strategy, parallel, remat, microbatches in itertools.product(
            self.strategies(mesh),
            self.sequence_parallel(mesh),
            self.remats(mesh),
            self.microbatches(mesh),
        ):
            offloads, schedules = self.offloads(mesh, remat), self.schedules(mesh, microbatches)
            for offload, (schedule, chunks) in itertools.product(offloads, schedules):
                yield dataclasses.replace(
                    mesh,
                    strategy=strategy,
                    sequence_parallel=parallel,
                    remat=remat,
                    microbatches=microbatches,
                    offload=offload,
                    schedule=schedule,
                    chunks=chunks,
                )

    def strategies(self, mesh: Layout) -> Sequence[ShardingStrategy]:
        """What data-parallel devices share out. Where they share nothing (fsdp and ep are 1) the name does not matter,
        and serving has only parameters to share."""
        if "strategy" in self.fixed:
            return (ShardingStrategy(self.fixed["strategy"]),)
        return _STRATEGIES if self.workload.training and mesh.fsdp * mesh.ep > 1 else _STRATEGIES[:1]

    def sequence_parallel(self, mesh: Layout) -> Sequence[bool]:
        """Norms and residuals cut over tp: worth a choice where there is tp and a sequence to cut."""
        if "sequence_parallel" in self.fixed:
            return (self.fixed["sequence_parallel"],)
        cuttable = self.workload.training and mesh.tp > 1 and self.workload.seq_len % (mesh.cp * mesh.tp) == 0
        return (True, False) if cuttable else (False,)

    def microbatches(self, mesh: Layout) -> tuple[int, ...]:
        """Into how many parts a device's batch may be cut. Serving without a pipeline gains nothing from parts."""
        counts = divisors(self.workload.global_batch // (mesh.dp * mesh.fsdp * mesh.ep))
        if "microbatches" in self.fixed:
            counts = tuple(count for count in counts if count == self.fixed["microbatches"])
        elif not self.workload.training and mesh.pp == 1:
            counts = (1,)
        if "schedule" in self.fixed or "chunks" in self.fixed:
            counts = tuple(count for count in counts if self.schedules(mesh, count))
        return counts

    def remats(self, mesh: Layout) -> tuple[Remat, ...]:
        """Ascending in what is computed again; the last is of pipelines alone."""
        if "remat" in self.fixed:
            return (self.fixed["remat"],)
        if not self.workload.training:
            return _REMATS[:1]
        if "activations" in self.fixed.get("offload", ()):
            return tuple(remat for remat in _REMATS if remat not in _NAMELESS)
        return _REMATS if mesh.pp > 1 else _REMATS[:-1]

    def offloads(self, mesh: Layout, remat: Remat) -> tuple[tuple[Offloaded, ...], ...]:
        """What may lie in the host's memory: nothing first, all that may last."""
        if "offload" in self.fixed:
            return (tuple(self.fixed["offload"]),)
        return self._offloads[mesh.pp == 1 and remat not in _NAMELESS]

    def schedules(self, mesh: Layout, microbatches: int) -> tuple[tuple[Schedule, int], ...]:
        """Schedules with their chunks per stage, 1F1B first: the one whose activations are least.

        All others need microbatches enough to fill the pipeline, or they gain nothing. GPipe never gains: it is 1F1B
        with more memory, and considered where it is asked for.
        """
        if mesh.pp == 1 or self._served:
            return self._unused_schedule
        return _schedules(self._repeats, mesh.pp, microbatches, self.fixed.get("schedule"), self.fixed.get("chunks"))

    # What the user fixed.

    def _check_fixed(self) -> None:
        for axis in AXES:
            size = self.fixed.get(axis, 1)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"mesh axis {axis!r} has size {size!r}: sizes are positive integers, or -1 to choose.")
        settings: dict[str, Any] = {name: value for name, value in self.fixed.items() if name != "strategy"}
        if settings.get("remat") == "stage":  # only a pipeline has it, and pp may yet be chosen
            settings.setdefault("pp", 2)
        Layout(**settings)  # raises, naming the one that is wrong
        self._check_offload()
        if self.workload.global_batch % self.fixed.get("microbatches", 1):
            microbatches, batch = self.fixed["microbatches"], self.workload.global_batch
            raise ValueError(
                f"global_batch={batch} does not divide into microbatches={microbatches}: "
                f"{-(-batch // microbatches) * microbatches} would, or {_nearest_divisor(batch, microbatches)} "
                "microbatches."
            )
        if "strategy" in self.fixed:
            names = ", ".join(ShardingStrategy)
            if self.fixed["strategy"] not in list(ShardingStrategy):
                raise ValueError(f"sharding={self.fixed['strategy']!r} is not a strategy: tbjax knows {names}.")
        sizes = {axis: self.fixed[axis] for axis in AXES if axis in self.fixed}
        asked, devices = math.prod(sizes.values()), self.cluster.devices
        whole = len(sizes) == len(AXES)
        if (asked != devices) if whole else devices % asked:
            nearest = {axis: math.gcd(size, devices) for axis, size in sizes.items()}
            left = devices
            for axis in reversed(AXES):
                nearest[axis] = math.gcd(sizes.get(axis, 1), left)
                left //= nearest[axis]
            nearest["fsdp"] *= left
            raise ValueError(
                f"mesh {spell(sizes)} needs {'' if whole else 'a multiple of '}{asked} devices, but {self.cluster} has "
                f"{devices}. A mesh that would do: {spell(nearest)}."
            )

    def _check_offload(self) -> None:
        offload, remat = self.fixed.get("offload", ()), self.fixed.get("remat", "full")
        if not self.workload.training:
            return
        if "activations" in offload and remat in _NAMELESS:
            raise ValueError(
                f"offload={tuple(offload)}: remat={remat!r} {_NAMELESS[remat]}. remat='dots' and 'full' would do."
            )
        if "optimizer" in offload and self.workload.optimizer in _NOT_LAYERWISE:
            raise ValueError(
                f"offload={tuple(offload)}: what lies in the host's memory is updated layer by layer, and "
                f"{self.workload.optimizer} does not treat layers apart. adamw, lion, sgd and muon do."
            )


def fast_domain(cluster: Cluster) -> tuple[int, str]:
    """The devices among which tensor parallelism is worth its talk, and what to call them.

    Without a fabric that outruns PCIe that is the host: the network is slower still.
    """
    size, kind = cluster.fast_domain, cluster.hardware
    if kind.torus:
        return size, f"{size}-chip slice"
    if kind.vendor == "nvidia" and size > 1 and kind.link_bandwidth > kind.host_link:
        return size, f"{size}-GPU NVLink domain"
    unit = "GPU" if kind.vendor == "nvidia" else "device"
    return cluster.devices_per_host, f"{cluster.devices_per_host}-{unit} host"


_RULES: Mapping[str, Callable[[Space, Mapping[str, int]], Refusal | None]] = {
    "tp": Space._refuse_tp,
    "ep": Space._refuse_ep,
    "cp": Space._refuse_cp,
    "pp": Space._refuse_pp,
    "fsdp": Space._refuse_fsdp,
    "dp": Space._refuse_dp,
}

_SPOKEN = {
    "heads": "{config.heads} heads of {config.head_dim}",
    "vocab": "a vocabulary of {size}",
    "mlp": "an MLP {size} wide",
    "experts": "{size} experts",
    "embed": "an embedding {size} wide",
}


@functools.lru_cache(maxsize=4096)
def _schedules(
    repeats: int, stages: int, microbatches: int, schedule: Schedule | None, chunks: int | None
) -> tuple[tuple[Schedule, int], ...]:
    """What `Space.schedules` gives, where `schedule` and `chunks` are what the user fixed."""
    enough: Mapping[Schedule, int] = {
        "1f1b": 1,
        "gpipe": 1,
        "zb-h1": stages,
        "zb-h2": 2 * stages - 1,
        "zb-v": 2 * stages - 1,
    }
    found: list[tuple[Schedule, int]] = [
        (name, 1)
        for name, needed in enough.items()
        if microbatches >= needed
        and (name != "gpipe" or schedule == "gpipe")
        and (name != "zb-v" or repeats % (2 * stages) == 0)  # two chunks on each stage
    ]
    if repeats % stages == 0 and microbatches % stages == 0:  # equal chunks, and microbatches in whole rounds
        found.extend(("interleaved", count) for count in divisors(repeats // stages)[1:])
    return tuple((s, c) for s, c in found if schedule in (None, s) and chunks in (None, c))


def _first_axis(dim: str) -> str | None:
    return next(iter(PARAMETER_AXES.get(dim, ())), None)


@functools.lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def _nearest_divisor(number: int, wanted: int) -> int:
    return min(divisors(number), key=lambda divisor: (abs(divisor - wanted), divisor))


@functools.lru_cache(maxsize=4096)
def ordered_factorizations(number: int, parts: int) -> int:
    """In how many ways `number` is a product of `parts` factors, their order counted."""
    if parts == 0:
        return 1  # the axes that are fixed have taken it
    count, prime = 1, 2
    while number > 1:
        exponent = 0
        while number % prime == 0:
            number, exponent = number // prime, exponent + 1
        count *= math.comb(exponent + parts - 1, parts - 1)
        prime = prime + 1 if prime * prime <= number else max(number, prime + 1)
    return count
