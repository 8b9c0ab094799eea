"""A plan in words: how its numbers and its parts are written, for the terminal and the page alike."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tbjax.config import ModelConfig
from tbjax.planner import floor
from tbjax.planner.hardware import Cluster
from tbjax.planner.parameters import active_parameters, parameters
from tbjax.planner.workload import Layout, Workload
from tbjax.sharding import ShardingStrategy

if TYPE_CHECKING:
    from tbjax.planner.plan import Plan
    from tbjax.planner.search import Candidate

TIMES = " \N{MULTIPLICATION SIGN} "

# Names that are not merely a word with its first letter raised.
_SPELLED = {"kv": "KV", "fsdp": "FSDP", "ddp": "DDP", "tp": "TP", "cp": "CP", "ep": "EP", "pp": "PP", "dp": "DP"}
_SPELLED |= {"moe": "MoE", "mlp": "MLP", "adamw": "AdamW", "sgd": "SGD", "hbm": "HBM", "dcn": "DCN", "ici": "ICI"}

_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved 1F1B"}
_SCHEDULES |= {"zb-h1": "ZB-H1", "zb-h2": "ZB-H2", "zb-v": "ZB-V"}

# Parts of a time that a word alone does not tell from parts of memory.
_TIMES = {
    "matmul": "Matmuls",
    "memory": "Memory-bound work",
    "launch": "Kernel launches",
    "tensor": "TP communication",
    "context": "CP communication",
    "expert": "EP communication",
    "fsdp": "FSDP communication",
    "data": "Summing gradients",
    "bubble": "Pipeline bubble",
    "optimizer": "Optimizer update",
}

_PRECISIONS = {
    "mixed": "mixed precision (float32 weights, bfloat16 matmuls)",
    "bfloat16": "bfloat16",
    "float32": "float32",
}
_SERVED_PRECISIONS = _PRECISIONS | {"mixed": "bfloat16"}

_REMAT = {
    "none": "all activations are kept for the backward pass",
    "dots": "the results of matmuls are kept for the backward pass and the rest recomputed",
    "full": "activations are recomputed in the backward pass",
    "stage": "each stage keeps its input alone and is run again before the backward pass",
}


# Numbers.


def gib(count: float) -> str:
    """Bytes as GiB, or in a smaller unit where they are less than one."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, scale in units.items() if count >= 0.9995 * scale), "KiB" if count else "GiB")
    size = count / units[unit]
    return f"{size:,.0f} {unit}" if size >= 99.95 else f"{size:.1f} {unit}"


def seconds(time: float) -> str:
    """A time to three digits, in the unit that puts them about the point."""
    if time >= 999.5 or not time:
        return f"{time:,.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if time * scale >= 0.9995:
            return f"{_three_digits(time * scale)} {unit}"
    return f"{_three_digits(time * 1e9)} ns"


def share(part: float, whole: float) -> str:
    """A percentage, where there is a whole to take it of."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def count(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}"


def short_count(number: float) -> str:
    """`69.0B`: a number of parameters or of tokens, to three digits."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * scale:
            return f"{_three_digits(number / scale)}{suffix}"
    return f"{number:.0f}"


def _three_digits(number: float) -> str:
    return f"{number:#.3g}".rstrip(".")


# Names.


def title(key: str) -> str:
    """`saved_activations` as "Saved activations", with the field's abbreviations in their usual case."""
    if key == "optimizer":
        return "Optimizer state"
    words = [_SPELLED.get(word, word) for word in key.replace("_", " ").split()]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]]) if words else ""


def time_title(key: str) -> str:
    """A part of `Time`, said so that it stands without its neighbours."""
    return _TIMES.get(key, title(key))


def mesh(layout: Layout) -> str:
    """`fsdp 8 x tp 8`: the axes that have more than one device."""
    return spelled_sizes(layout.mesh)


def schedule(layout: Layout) -> str:
    """The pipeline's schedule, or what takes its place where there is no pipeline."""
    if layout.pp == 1:
        return "-"
    name = _SCHEDULES[layout.schedule]
    return f"{name}, {layout.chunks} chunks" if layout.chunks > 1 else name


def options(layout: Layout) -> str:
    """What goes with the mesh, in a few words."""
    said = [f"remat {layout.remat}"] if layout.remat != "none" else []
    if layout.microbatches > 1:
        said.append(f"{layout.microbatches} microbatches")
    if layout.pp > 1:
        said.append(schedule(layout))
    if layout.strategy != ShardingStrategy.FULL_SHARD:
        said.append(str(layout.strategy))
    if layout.sequence_parallel:
        said.append("sequence parallel")
    if layout.offload:
        said.append(f"{' and '.join(layout.offload)} offloaded")
    return ", ".join(said) or "plain"


def model(config: ModelConfig) -> str:
    """The model, as far as its configuration says which one it is."""
    total, active = parameters(config), active_parameters(config)
    size = short_count(total) + (f" ({short_count(active)} active)" if active != total else "")
    return f"{config.family.capitalize()} {size}"


def machine(cluster: Cluster) -> str:
    """The devices: how many, of what kind."""
    return f"{count(cluster.devices)}{TIMES}{cluster.hardware.title}"


def device(cluster: Cluster, number: int = 1) -> str:
    """What one device is called here."""
    name = {"google": "chip", "nvidia": "GPU"}.get(cluster.hardware.vendor, "device")
    if cluster.hardware.devices_per_chip > 1:
        name = "device"
    return name if number == 1 else f"{name}s"


def spelled_sizes(sizes: Mapping[str, int]) -> str:
    """`pp 2 x tp 16`: the axes of a mesh that have more than one device."""
    return TIMES.join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


# Figures: what stands at the top of a page, and in the first lines of a table.


def heading(plan: "Plan") -> str:
    """What the plan is for."""
    return f"{plan.model} on {machine(plan.cluster)}"


def verdict(plan: "Plan") -> str:
    """Whether it fits, with the margin."""
    held, limit = plan.memory.total, plan.cluster.hardware.usable
    one = device(plan.cluster)
    if plan.fits:
        return f"✓ Fits: each {one} holds {gib(held)} of the {gib(limit)} it can, {gib(limit - held)} to spare."
    if held > limit:
        return (
            f"✗ Does not fit: each {one} needs {gib(held)} and can hold {gib(limit)}, {gib(held - limit)} too little."
        )
    return f"✗ Does not fit: the host has no room for {gib(plan.memory.host)} for each {one}."


def figures(plan: "Plan") -> list[tuple[str, str, str]]:
    """The figures that matter most: name, value, a note on it."""
    time, limit = plan.time, plan.cluster.hardware.usable
    result = [("Mesh", mesh(plan.layout), options(plan.layout))]
    if plan.workload.training:
        result.append(("Step", seconds(time.total), f"{short_count(plan.workload.tokens)} tokens"))
    else:
        result.append(("First token", seconds(time.prefill), f"then {seconds(time.decode)} each"))
    result.append(("Tokens/s", count(plan.tokens_per_second), per_device(plan)))
    result.append(("MFU", share(plan.mfu, 1.0), "of the peak FLOP/s"))
    result.append(("Memory", gib(plan.memory.total), f"of {gib(limit)} on each {device(plan.cluster)}"))
    return result


def contenders(plan: "Plan", most: int = 8) -> list[tuple[str, "Plan | Candidate"]]:
    """The plan and its runners-up, by what they are called here."""
    return [("This plan", plan), *((f"No. {place}", other) for place, other in enumerate(plan.candidates[:most], 2))]


def per_device(plan: "Plan") -> str:
    """Throughput of one device."""
    return f"{count(plan.tokens_per_second / plan.cluster.devices)} on each {device(plan.cluster)}"


def summary(plan: "Plan") -> list[str]:
    """The plan in a few sentences."""
    return [
        work(plan.workload, plan.config),
        laid_out(plan.layout, plan.workload, plan.cluster),
        " ".join([largest_memory(plan), largest_time(plan)]),
        *([f"It can serve {count(plan.maximum_batch)} sequences at once, no more."] if plan.maximum_batch else []),
        *([chosen_from(plan)] if plan.rejected else []),
    ]


def largest_memory(plan: "Plan") -> str:
    part, size = max(plan.memory.parts.items(), key=lambda item: item[1])
    return (
        f"Most of the {gib(plan.memory.total)} on a {device(plan.cluster)} is {_within(title(part))}: {gib(size)}, "
        f"{share(size, plan.memory.total)}."
    )


def largest_time(plan: "Plan") -> str:
    parts = sorted(plan.time.parts.items(), key=lambda item: -item[1])
    spent = sum(plan.time.parts.values())
    named = [f"{_within(time_title(part))} {share(size, spent)}" for part, size in parts[:3] if size > 0]
    return f"Time goes to {_listed(named)}."


def chosen_from(plan: "Plan") -> str:
    """How many others were turned down, and why most of them."""
    most = max(plan.rejected, key=lambda rejection: rejection.count)
    total = sum(rejection.count for rejection in plan.rejected)
    return f"{count(total)} other meshes were turned down, most often ({count(most.count)}) because: {most.reason}."


def _within(name: str) -> str:
    """A title within a sentence."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


# Sentences.


def work(workload: Workload, config: ModelConfig) -> str:
    """What is to be done."""
    layers, size = config.layers, model(config)
    if workload.training:
        return (
            f"Training {size}, a decoder of {layers} layers, on {count(workload.global_batch)} sequences of "
            f"{count(workload.seq_len)} tokens a step, in {_PRECISIONS[workload.precision]}, with "
            f"{title(workload.optimizer)}."
        )
    weights = f", its weights in {workload.quantization}" if workload.quantization else ""
    return (
        f"Serving {size}, a decoder of {layers} layers, to {count(workload.global_batch)} sequences at once, each of "
        f"{count(workload.prompt_len)} prompt tokens and {count(workload.new_tokens)} new ones, in "
        f"{_SERVED_PRECISIONS[workload.precision]}{weights}."
    )


def laid_out(layout: Layout, workload: Workload, cluster: Cluster) -> str:
    """The mesh, and what each device then does."""
    places = [f"{axis} {lies(axis, layout, cluster)}" for axis, size in layout.mesh.items() if size > 1]
    said = [f"The mesh is {mesh(layout)}{': ' if places else ''}{', '.join(places)}."]
    rows = workload.global_batch / (layout.batch_ways * layout.microbatches)
    rows_text = f"{rows:,.0f}" if rows == int(rows) else f"{rows:.3g}"
    noun = "sequence" if rows == 1 else "sequences"
    if layout.microbatches > 1:
        said.append(
            f"Each {device(cluster)} runs {count(layout.microbatches)} microbatches of {rows_text} {noun}"
            + (f" through {layout.pp} stages in the {schedule(layout)} schedule." if layout.pp > 1 else " in turn.")
        )
    else:
        said.append(f"Each {device(cluster)} has {rows_text} {noun}.")
    if workload.training:
        said.append(f"{_REMAT[layout.remat].capitalize()}.")
    if layout.offload:
        said.append(f"In the host's memory: {' and '.join(layout.offload)}.")
    return " ".join(said)


def lies(axis: str, layout: Layout, cluster: Cluster) -> str:
    """Where an axis lies, in words."""
    inside, across = floor.reach(axis, layout.mesh, cluster)
    if cluster.topology:
        sizes = {name: size for name, size in floor.dimensions(cluster).items() if name not in ("slice", "core")}
        folded = floor.fold(layout.mesh, cluster)[axis]
        whole = [name for name, size in sizes.items() if folded[name] == size > 1]
        along = whole + [f"part of {name}" for name, size in sizes.items() if 1 < folded[name] < size]
        places = [f"along {_listed(along)} of the torus"] if along else []
        places += ["over the two devices of a chip"] if folded["core"] > 1 else []
        return _both(inside, across, " and ".join(places), "slices")
    if cluster.fast_domain > cluster.devices_per_host:
        place = f"inside a fast domain of {cluster.fast_domain} {device(cluster, cluster.fast_domain)}"
        return _both(inside, across, place, "domains")
    if cluster.hosts * cluster.slices == 1 and across > 1:
        return f"inside the node, {inside if inside > 1 else 'none'} of it on a fast link"
    return _both(inside, across, "inside a node", "nodes")


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _both(inside: int, across: int, place: str, groups: str) -> str:
    if across == 1:
        return place
    return f"across {groups}" if inside == 1 else f"{inside} {place}, {across} ways across {groups}"


def cuts(axis: str, layout: Layout) -> str:
    """What an axis cuts."""
    if axis == "fsdp":
        what = {
            ShardingStrategy.NO_SHARD: "the batch",
            ShardingStrategy.OPTIMIZER: "the batch and the optimizer state",
            ShardingStrategy.SHARD_GRAD_OP: "the batch, gradients and optimizer state",
        }
        return what.get(layout.strategy, "the batch, weights, gradients and optimizer state")
    return {
        "pp": "the layers, into stages",
        "dp": "the batch",
        "ep": "the experts, and the batch outside them",
        "cp": "the sequence",
        "tp": "attention heads, MLP width, vocabulary" + (", norms" if layout.sequence_parallel else ""),
    }[axis]
