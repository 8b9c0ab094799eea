"""`tbjax.plan`: from a model's name and a machine's to the layout that suits them best.

Nothing is needed but the model's config: no weights, no devices, and for the models that people name no network. The
names are turned into a `ModelConfig` and a `Cluster` here; the planning itself is `tbjax.planner.plan`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tbjax.config import ModelConfig
from tbjax.elsewhere import told_by_name
from tbjax.mesh import MeshSpec, fixed_sizes
from tbjax.planner import models
from tbjax.planner.hardware import Cluster
from tbjax.planner.hardware import cluster as cluster_of
from tbjax.planner.plan import Plan, Search
from tbjax.planner.plan import plan as best_plan
from tbjax.planner.search import Objective
from tbjax.planner.workload import Offloaded, Optimizer, Precision, Quantization, Remat, Schedule, Task, Workload
from tbjax.quantize import RULES, Recipe, recipe
from tbjax.sharding import ShardingStrategy

# A plan looks at sequences of this length unless told otherwise: the context that most models are pretrained with.
USUAL_LENGTH = 4096

# Of a sequence that is served, the part that is answer unless told otherwise.
USUAL_ANSWER = 512


@told_by_name
def plan(
    model: Any,
    hardware: str | Cluster,
    *,
    task: Task = "train",
    global_batch: int | None = None,
    seq_len: int | None = None,
    new_tokens: int | None = None,
    mesh: MeshSpec = None,
    optimizer: Optimizer = "adamw",
    precision: Precision = "mixed",
    quantization: Quantization | None = None,
    sharding: ShardingStrategy | str | None = None,
    sequence_parallel: bool | None = None,
    microbatches: int | None = None,
    remat: Remat | None = None,
    schedule: Schedule | None = None,
    chunks: int | None = None,
    offload: Sequence[Offloaded] | Literal["any"] | None = None,
    objective: Objective = "throughput",
    search: Search = "analytic",
    revision: str | None = None,
) -> Plan:
    """The best way to lay `model` out over `hardware`.

    `model` is a hub id, one of the built-in descriptions by name, a folder, a config.json, a config (a dict,
    `transformers`' or a `ModelConfig`) or a loaded model. `hardware` is written "h100:16x8" (hosts x GPUs),
    "v5p:4x4x8" (a TPU slice), "v5p:2*4x4x4" (two of them), "cpu:8", or "auto": the machine at hand.

    `global_batch` counts the sequences of a training step (default: one for each device) or those served at once
    (default: 1); `seq_len` the tokens of each (default: the model's longest, up to 4096), of which `new_tokens` are
    generated in inference (default: an eighth, up to 512). `quantization` is of the weights in inference (default: as
    the model that is given has them already).

    What is None is chosen. `mesh` fixes axes: a dict those that it names, a tuple (dp, fsdp, tp) all, with -1 for
    those to choose. Offloading is the last resort unless `offload` names what to offload, or is "any": wherever it
    helps on paper.

    `objective` is "throughput", "latency" or "memory". With `search="verified"` the target's compiler compiles the best
    few.
    """
    config, name = model_config(model, revision=revision)
    where = cluster_of(hardware)
    seq_len = min(config.max_positions, USUAL_LENGTH) if seq_len is None else seq_len
    serving = task == "inference"
    if global_batch is None:
        global_batch = 1 if serving else where.devices
    workload = Workload(
        task=task,
        global_batch=global_batch,
        seq_len=seq_len,
        new_tokens=(min(seq_len // 8, USUAL_ANSWER) if serving else 0) if new_tokens is None else new_tokens,
        precision=precision,
        optimizer=optimizer,
        quantization=_held(model) if serving and quantization is None else quantization,
    )
    fixed = {
        **fixed_sizes(mesh),
        "strategy": sharding,
        "sequence_parallel": sequence_parallel,
        "microbatches": microbatches,
        "remat": remat,
        "schedule": schedule,
        "chunks": chunks,
        "offload": offload if offload is None or isinstance(offload, str) else tuple(offload),
    }
    return best_plan(config, workload, where, fixed=fixed, objective=objective, search=search, model=name)


def model_config(model: Any, *, revision: str | None = None) -> tuple[ModelConfig, str]:
    """The architecture that `model` stands for, and what to call it. Reads configs, never weights.

    A path comes before a built-in description, and that before the hub. What is none of them raises: it is never taken
    for something else.
    """
    from interop.families import Fields, family

    if isinstance(model, ModelConfig):
        return model, model.family
    if isinstance(getattr(model, "config", None), ModelConfig):  # a Decoder
        return model.config, model.config.family
    if isinstance(model, str | Path):
        values, where = _described(model, revision)
        if isinstance(values, ModelConfig):
            return values, str(model)
        return family(values["model_type"]).config(Fields(values, where)), str(model)
    from interop.source import normalize_config

    if isinstance(model, Mapping):
        values = normalize_config(dict(model), where="the config")
    elif hasattr(model, "to_dict"):
        values = model.to_dict()  # of transformers: its defaults are filled in
    else:
        raise TypeError(
            f"model is a {type(model).__name__}: a name, a path, a config (a dict, transformers' or a ModelConfig) or "
            "a loaded model is needed."
        )
    config = family(values.get("model_type", "")).config(Fields(values))
    return config, config.family


def _held(model: Any) -> Any:
    """By which of the planner's rules the weights of a loaded model, or of a checkpoint of ours, are quantised."""
    from tbjax import checkpoint

    rules = getattr(model, "quantization", None)
    if isinstance(model, str | Path) and checkpoint.is_checkpoint(model):
        rules = checkpoint.read_about(model, verify="none").quantization
    if isinstance(rules, Recipe) and rules.name is None:
        raise ValueError(
            f"the weights of {model if isinstance(model, str | Path) else 'this model'} are quantised by rules of its "
            f"own, {rules}, and plans know {', '.join(map(repr, RULES))}: name the nearest (quantization=...)."
        )
    return rules.name if isinstance(rules, Recipe) else None


def _described(name: str | Path, revision: str | None) -> tuple[Mapping[str, Any] | ModelConfig, str]:
    """What describes the model of that name, and where it stands."""
    from interop.source import CONFIG, EMBEDDED, normalize_config, read_config, resolve
    from tbjax import checkpoint

    path = Path(name).expanduser()
    if path.exists():
        if checkpoint.is_checkpoint(path):
            return checkpoint.read_about(path).config, str(path)
        if path.suffix == ".json" or (path / CONFIG).exists():
            return normalize_config(read_config(path), where=str(path)), str(path)
        return resolve(path).config, str(path)  # a GGUF, or a folder with one, speaks for itself
    if isinstance(name, Path) or name.startswith(("/", ".", "~")) or path.suffix == ".json":
        raise FileNotFoundError(f"{name}: there is no such file or folder.")
    if models.known(name) and revision is None:
        return models.describe(name), name
    try:
        file = _from_hub(name, revision)
    except models.UnknownModel:
        if name not in EMBEDDED:
            raise
        return resolve(name, revision=revision).config, name  # inside an installed package, where the hub is not
    return normalize_config(read_config(file), where=f"{name}: {CONFIG}"), name


def _from_hub(name: str, revision: str | None) -> Path:
    """The config.json of a hub repository, in the local cache."""
    if "/" not in name:  # no model that tbjax knows has an id without an owner
        models.describe(name)  # raises, with the closest names
    import huggingface_hub
    import huggingface_hub.errors as hub

    from interop.source import CONFIG

    try:
        with contextlib.suppress(hub.LocalEntryNotFoundError):
            return Path(huggingface_hub.hf_hub_download(name, CONFIG, revision=revision, local_files_only=True))
        # Where there is no network this says so at once; a download would try for half a minute first.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT)
        return Path(huggingface_hub.hf_hub_download(name, CONFIG, revision=revision))
    # All that the hub raises is one of these: no id at all, not reached, refused, not there, not cached.
    except (hub.HFValidationError, OSError, hub.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        at, reason = f" at revision {revision}" if revision else "", " ".join(str(error).split()).rstrip(".")
        hint = "" if models.known(name) else f" It has no built-in description either. {models.closest(name)}"
        raise models.UnknownModel(
            f"{name}: there is no such file or folder, and the Hugging Face hub did not give its {CONFIG}{at}: "
            f"{reason}.{hint} The path of a {CONFIG} would do."
        ) from error


def settings_of(
    plan: Plan, config: ModelConfig, sharding: ShardingStrategy | str | None, sequence_parallel: bool | None
) -> tuple[ShardingStrategy, bool]:
    """The sharding strategy and sequence parallelism that a plan asks for, of a model that is `config`.

    Raises where the plan is for another model, or was overruled: a plan is run as it is.
    """
    names = ("vocab_size", "embed", "mlp", "heads", "kv_heads", "head_dim", "layers", "moe", "tie_embeddings")
    shapes = [(name, getattr(plan.config, name), getattr(config, name)) for name in names]
    different = [f"{name} is {planned} there and {mine} here" for name, planned, mine in shapes if planned != mine]
    if different:
        raise ValueError(f"the plan is for another model, {plan.model or plan.config.family}: {', '.join(different)}.")
    layout = plan.layout
    if sharding is not None and ShardingStrategy(sharding) != layout.strategy:
        raise ValueError(f"sharding={sharding}, but the plan says {layout.strategy}: plan with sharding={sharding!r}.")
    if sequence_parallel not in (None, layout.sequence_parallel):
        raise ValueError(
            f"sequence_parallel={sequence_parallel}, but the plan says {layout.sequence_parallel}: plan with "
            f"sequence_parallel={sequence_parallel}."
        )
    return layout.strategy, layout.sequence_parallel


def quantization_of(plan: Plan, quantization: Any) -> Any:
    """The quantization that a plan asks for. Raises where it was overruled: a plan is run as it is."""
    planned = plan.workload.quantization
    if recipe(quantization) not in (None, recipe(planned)):
        asked = str(quantization) if isinstance(quantization, Recipe) else quantization
        raise ValueError(
            f"quantization={asked!r}, but the plan has {planned!r}: plan with it "
            "(task='inference', quantization='int8' or 'int4'), or give the plan's mesh alone (mesh=plan.mesh)."
        )
    return planned
