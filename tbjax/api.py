"""The face: a checkpoint in, a sharded model, a checkpoint out.

`load` ties the floors together: `interop.source` finds the files, a family translates the config, `sharding` lays out
an abstract model on the mesh, and `interop.load` fills each shard from the bytes that belong there. What comes back is
a `Decoder` that also knows where it came from: its tokenizer, its Hugging Face config, and so how to be written back.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import jax
import jax.core
import numpy as np

from interop import companions
from interop.families import Fields, family
from interop.load import DEFAULT_BUDGET, load_parameters
from interop.tokenizer import Tokenizer
from tbjax import checkpoint, generate, rows
from tbjax.config import ModelConfig
from tbjax.dtypes import float_dtype
from tbjax.elsewhere import METHODS, called_here, told_by_name
from tbjax.generate import front
from tbjax.generate.settings import known
from tbjax.layers.linear import shapes_only
from tbjax.manifest import Verify
from tbjax.mesh import MeshSpec, make_mesh
from tbjax.model import Decoder
from tbjax.pipeline import inference
from tbjax.pipeline.schedule import NAMED, Schedule, named
from tbjax.pipeline.stages import cut_for
from tbjax.planner import words
from tbjax.planner.plan import Plan
from tbjax.planning import plan as plan  # part of the face
from tbjax.planning import quantization_of, settings_of
from tbjax.prompts import Prompt
from tbjax.quantize import Recipe, convert, recipe
from tbjax.quantize.rules import Quantization
from tbjax.sharding import ContextMethod, Sharding, ShardingStrategy, by_path, with_arrays

if TYPE_CHECKING:
    from tbjax.pages.shardings import ShardingMap
    from tbjax.training.config import Defaults

log = logging.getLogger("tbjax")


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a model came from: what Hugging Face keeps beside the weights.

    It is a part of the model's tree structure, so two of the same content are equal: models that were loaded twice can
    be mapped together, and what was compiled for one serves the other.
    """

    config: Mapping[str, Any]  # config.json
    generation_config: Mapping[str, Any] | None = None
    tokenizer: Tokenizer | None = None

    @functools.cached_property
    def _content(self) -> tuple[str, Tokenizer | None]:
        return json.dumps([self.config, self.generation_config], sort_keys=True, default=str), self.tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        beside = "a tokenizer" if self.tokenizer else "no tokenizer"
        return f"<Origin: a config of {self.config.get('model_type')!r}, {beside}>"


class CausalLM(Decoder):
    """A `Decoder` with its tokenizer and its Hugging Face config: what `tbjax.load` gives.

    `plan` is the one that it was laid out by, if any; `training_defaults` may say how it is to be trained;
    `quantization` are the rules by which its weights are quantised (`tbjax.quantize`).
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Any = None,
        *,
        origin: Origin | None = None,
        plan: Plan | None = None,
        training_defaults: "Defaults | None" = None,
        quantization: Recipe | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config, mesh, **settings)
        self.origin = origin
        self.plan = plan
        self.training_defaults = training_defaults
        self.quantization = quantization

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """For what is not there alone: what PyTorch's models can be asked for is told by our names."""
            if hasattr(type(self), name):  # a property, that asked for something that is not there
                return object.__getattribute__(self, name)
            said = called_here(name, tables=(METHODS,)) or "dir(model) says what it has."
            raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}: {said}")

    @property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, made on first use; None where the checkpoint has none."""
        return self.origin.tokenizer.value if self.origin and self.origin.tokenizer else None

    @property
    def companions(self) -> dict[str, str]:
        """The files that Hugging Face keeps beside the weights, for a checkpoint that is not Hugging Face's."""
        origin = self.origin
        return companions.pack(origin.config, origin.generation_config, origin.tokenizer) if origin else {}

    def __call__(
        self, tokens: Any, attention_mask: Any = None, positions: Any = None, *, segments: Any = None
    ) -> jax.Array:
        """Logits [B, S, V] of the next token after each of `tokens` [B, S], compiled."""
        if isinstance(tokens, jax.core.Tracer):
            return _forward(self, tokens, attention_mask, positions, segments)
        arrays = (tokens, attention_mask, positions, segments)  # of any library, PyTorch's too
        tokens, attention_mask, positions, segments = (
            array if array is None or isinstance(array, jax.Array) else np.asarray(array) for array in arrays
        )
        if not isinstance(tokens, jax.Array) or tokens.is_fully_addressable:
            generate.check_tokens(np.asarray(tokens), self.config.vocab_size)
        with self._own_mesh():
            return _forward(self, tokens, attention_mask, positions, segments)

    def generate(
        self,
        prompt: Prompt,
        generation_config: Any = None,
        *,
        seed: int | Sequence[int] | None = None,
        stream: bool = False,
        **options: Unpack[generate.Options],
    ) -> Any:
        """What follows the prompt, up to an end token, a stop string or the budget.

        A text gives a text, a chat (`[{"role": "user", "content": ...}]`) the assistant's answer, a row of token ids
        a list of ids; a list of one of these gives a list, as does `num_return_sequences`. The prompt is not repeated.

        Options are the fields of transformers' `GenerationConfig` under its names. They come before
        `generation_config`, and that before the checkpoint's generation_config.json. A field that is not done here
        raises if it would change the answer. `return_dict_in_generate=True` gives each answer as a
        `tbjax.generate.Generation`, with log-probabilities and the reason of its end.

        With `do_sample=True` each row draws by a seed of its own, whatever stands beside it: `seed` has one for each
        prompt, or is the first's, which the others follow. None draws one.

        With `stream=True` it gives an iterator over pieces, in the form of the whole: texts that end between
        characters, or lists of new token ids.
        """
        said = self._generation_settings(), generation_config, options
        around = {"tokenizer": self._require_tokenizer, "within": self._own_mesh}
        return front.generate(self, prompt, *said, seed=seed, stream=stream, **around)

    def loglikelihood(self, prompts: Prompt, completions: str | Sequence[Any]) -> Any:
        """How likely each completion is after its prompt: a `tbjax.generate.Likelihood`, or a list of them.

        Prompts are as for `generate`, completions are texts where prompts are texts or chats, and else token ids. A
        text is cut into tokens by itself, so let it begin as it would go on, with a space say.
        """
        around = {"tokenizer": self._require_tokenizer, "within": self._own_mesh}
        return front.score(self, prompts, completions, **around)

    def moved(
        self, mesh: MeshSpec, *, sharding: ShardingStrategy | str | None = None, sequence_parallel: bool | None = None
    ) -> "CausalLM":
        """A copy of this model on another mesh, laid out as it is here unless a plan or the arguments say otherwise."""
        if not isinstance(mesh, Plan):
            sharding = self.sharding.strategy if sharding is None else sharding
            sequence_parallel = self.sharding.sequence_parallel if sequence_parallel is None else sequence_parallel
        layout = {"sharding": sharding, "sequence_parallel": sequence_parallel, "scan": self.scan}
        layout |= {"context": self.sharding.context, "quantization": self.quantization}
        there = abstract(self.config, mesh, dtype=self.dtype, origin=self.origin, **layout)
        copy = rows.filled(there, self)
        if not isinstance(mesh, Plan):
            copy.training_defaults = self.training_defaults
        return copy

    def dequantized(self, dtype: Any = None) -> "CausalLM":
        """A copy whose quantised weights are in full again, in `dtype` (default: that of the others).

        It can be trained and exported. What quantising has rounded off is not in it.
        """
        made = {"dtype": self.dtype if dtype is None else dtype, "origin": self.origin, "scan": self.scan}
        there = _laid_out(self.config, self.sharding, plan=None, training_defaults=self.training_defaults, **made)
        full = functools.partial(_in_full, dtype=there.dtype)
        arrays = jax.jit(full, out_shardings={path: a.sharding for path, a in by_path(there).items()})(self)
        return with_arrays(there, arrays)

    def show_sharding(self) -> "ShardingMap":
        """Where each parameter lies: print it, end a notebook's cell with it, or write it with `.to_html(path)`."""
        from tbjax.pages.shardings import sharding_map

        return sharding_map(self, words.model(self.config))

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write a Hugging Face checkpoint: safetensors, config.json, generation config, tokenizer.

        Options are those of `interop.export.export`: `dtype`, `max_shard_bytes`, `overwrite`.
        """
        from interop.export import export

        origin = self._require_origin()
        export(
            self,
            self.config,
            family(self.config.family),
            Path(path),
            config_json=origin.config,
            generation_config=origin.generation_config,
            tokenizer=origin.tokenizer,
            **options,
        )

    def _own_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Within it the model's mesh is the one that counts, where a user has set another with `jax.set_mesh`."""
        around = jax.sharding.get_abstract_mesh()
        return contextlib.nullcontext() if around.empty else jax.set_mesh(self.mesh)

    def _require_tokenizer(self) -> Any:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("this model came without a tokenizer: give token ids in place of text.")
        return tokenizer

    def _require_origin(self) -> Origin:
        if self.origin is None:
            raise ValueError(
                "this model was made from a bare ModelConfig, so there is no Hugging Face config to write: "
                'make it from one (tbjax.from_config(config_json)), or save it with format="orbax".'
            )
        return self.origin

    def _generation_settings(self) -> Mapping[str, Any]:
        if self.origin is None:
            return {}
        of_file = known(_present(self.origin.generation_config or {}))
        return {**_present(self.origin.config, "eos_token_id"), **of_file}


def _in_full(model: CausalLM, dtype: Any) -> dict[str, jax.Array]:
    return {path: array.astype(dtype) for path, array in by_path(convert.dequantized(model, dtype)).items()}


@jax.jit
def _forward(model: Decoder, tokens: jax.Array, attention_mask: Any, positions: Any, segments: Any) -> jax.Array:
    if inference.runs_in_stages(model):
        return inference.logits(model, tokens, attention_mask, positions, segments)
    return model.forward(tokens, attention_mask, positions, segments=segments).logits


@told_by_name
def load(
    name_or_path: str | Path,
    mesh: MeshSpec = None,
    *,
    dtype: Any = None,
    quantization: Quantization | None = None,
    revision: str | None = None,
    sharding: ShardingStrategy | str | None = None,
    sequence_parallel: bool | None = None,
    schedule: Schedule | str | None = None,
    stage_layers: Sequence[int] | None = None,
    scan: bool = True,
    trust_pickle: bool = False,
    budget: int = DEFAULT_BUDGET,
    verify: Verify = "full",
    progress: bool = True,
) -> CausalLM:
    """A checkpoint as a sharded model.

    `name_or_path` is a hub id, a folder, a .safetensors or .gguf file, or an Orbax checkpoint that tbjax wrote. `mesh`
    is `(dp, fsdp, tp)`, a dict of axes, a `jax.sharding.Mesh`, or None for all devices on fsdp; or a `Plan`, which
    says `sharding` (otherwise FULL_SHARD) and `sequence_parallel` (otherwise False) too. `dtype` defaults to
    what config.json says, or else to what most numbers of the checkpoint are stored in. Each process reads only what
    its own devices hold, with at most `budget` bytes of host memory in flight. `verify` says how closely the files of a
    checkpoint of ours are held against its manifest: "full", "sizes" or "none".

    `quantization` keeps weights in fewer bits, for a model that only serves: "int8" or "int4" (in groups of 32 inputs),
    "int8:channel" (one scale for an output: a little smaller, less exact, faster to multiply), or rules of your own
    (`tbjax.quantize`). Each slice is quantised on its way from the file to its device, so nothing ever holds the model
    in full. A plan says it too.

    With pp, layers lie in order and as equally many on each stage as can be, unless `schedule` (a name such as "zb-v",
    or a `tbjax.pipeline` schedule) says by which they will be trained, or `stage_layers` how many there are to be in
    each piece of the model.
    """
    layout = {
        "sharding": sharding,
        "sequence_parallel": sequence_parallel,
        "schedule": schedule,
        "stage_layers": stage_layers,
        "scan": scan,
        "quantization": quantization,
    }
    if checkpoint.is_checkpoint(name_or_path):
        about = checkpoint.read_about(name_or_path, verify=verify)
        beside = companions.unpack(about.companions, str(name_or_path))
        origin = None if beside is None else Origin(*beside)
        layout["quantization"] = _quantization_of(about, quantization, name_or_path)
        model = abstract(about.config, mesh, dtype=about.dtype if dtype is None else dtype, origin=origin, **layout)
        return checkpoint.restore(model, name_or_path, verify=verify)

    from interop.source import resolve

    source = resolve(name_or_path, revision=revision, trust_pickle=trust_pickle)
    translation = family(source.config["model_type"])
    origin = Origin(source.raw_config, source.generation_config, source.tokenizer)
    with source.open() as files:
        config = translation.config(Fields(source.config_for(files), f"{name_or_path}: config.json"))
        model = abstract(config, mesh, dtype=dtype, origin=origin, **layout)
        return load_parameters(model, config, translation, files, budget=budget, progress=progress)


@told_by_name
def from_config(
    config: ModelConfig | Mapping[str, Any] | str | Path | Any,
    mesh: MeshSpec = None,
    *,
    seed: int = 0,
    dtype: Any = None,
    quantization: Quantization | None = None,
    sharding: ShardingStrategy | str | None = None,
    sequence_parallel: bool | None = None,
    schedule: Schedule | str | None = None,
    stage_layers: Sequence[int] | None = None,
    scan: bool = True,
) -> CausalLM:
    """A model with random weights, born sharded and the same on every mesh.

    `config` is a `ModelConfig`, or a Hugging Face config: a dict, a `transformers` config, a path of a config.json.
    """
    origin = None
    if not isinstance(config, ModelConfig):
        values = _hugging_face_config(config)
        origin, config = Origin(values), family(values.get("model_type", "")).config(Fields(values))
    settings = {
        "sharding": sharding,
        "sequence_parallel": sequence_parallel,
        "schedule": schedule,
        "stage_layers": stage_layers,
        "scan": scan,
        "dtype": dtype,
        "origin": origin,
        "quantization": quantization,
    }
    model = abstract(config, mesh, **settings)
    rules = model.quantization
    about = {"plan": model.plan, "training_defaults": model.training_defaults, "quantization": rules}
    make = functools.partial(CausalLM, config, model.sharding, dtype=model.dtype, scan=scan, origin=origin, **about)
    full = lambda key: make(key=key)  # noqa: E731
    born = jax.jit(
        lambda key: convert.quantized(full(key), rules, model.sharding),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, model),
    )
    return born(jax.random.key(seed))


def abstract(
    config: ModelConfig,
    mesh: MeshSpec = None,
    *,
    dtype: Any = None,
    quantization: Quantization | None = None,
    origin: Origin | None = None,
    sharding: ShardingStrategy | str | None = None,
    sequence_parallel: bool | None = None,
    schedule: Schedule | str | None = None,
    stage_layers: Sequence[int] | None = None,
    context: ContextMethod | None = None,
    scan: bool = True,
) -> CausalLM:
    """The model without its weights: shapes, dtypes and shardings, all checked against the mesh."""
    dtype = float_dtype(config.dtype, "the model's dtype") if dtype is None else float_dtype(dtype)
    plan = mesh if isinstance(mesh, Plan) else None
    if plan:
        sharding, sequence_parallel = settings_of(plan, config, sharding, sequence_parallel)
        quantization = quantization_of(plan, quantization)
        if plan.workload.training and plan.layout.pp > 1:
            planned = named(plan.layout.schedule, plan.layout.chunks)
            if stage_layers is not None or schedule not in (None, planned, planned.name):
                raise ValueError(
                    f"the plan has the schedule {planned.name!r} over stages as equal as can be, and a plan is run as "
                    f"it is: leave out schedule={schedule!r} and stage_layers={stage_layers!r}, or plan with them."
                )
            schedule = planned
    strategy = ShardingStrategy.FULL_SHARD if sharding is None else sharding
    layout = Sharding(make_mesh(mesh), ShardingStrategy(strategy), bool(sequence_parallel), context=context)
    defaults = None
    if schedule is not None or stage_layers is not None:
        run_by = named(schedule) if isinstance(schedule, str) else schedule
        layout = dataclasses.replace(layout, cut=cut_for(config, run_by, layout.size("pp"), stage_layers))
        defaults = _trained_by(run_by)
    about = {"origin": origin, "plan": plan, "training_defaults": defaults, "quantization": recipe(quantization)}
    model = _laid_out(config, layout, dtype=dtype, scan=scan, **about)
    for path, axes in layout.uncut(model).items():
        log.warning("%s is not cut by %s: every device along it holds a copy.", path, " and ".join(axes))
    return model


def _laid_out(config: ModelConfig, layout: Sharding, quantization: Recipe | None = None, **settings: Any) -> CausalLM:
    """An abstract model, on its mesh."""
    make = functools.partial(CausalLM, config, layout, quantization=quantization, **settings)
    with shapes_only():
        return layout.place(convert.quantized(jax.eval_shape(make), quantization, layout))


def _quantization_of(about: checkpoint.About, quantization: Any, path: Any) -> Recipe | None:
    """That of a checkpoint of ours, whose arrays are read as they are."""
    asked = recipe(quantization)
    if asked in (None, about.quantization):
        return about.quantization
    if about.quantization is None:
        raise ValueError(
            f"{path} has its weights in full, and what tbjax wrote is read as it is: export it "
            f"(tbjax-convert {path} OUT --to hf) and load that with quantization={quantization!r}."
        )
    raise ValueError(f"{path} is quantised by other rules, {about.quantization}: leave out {quantization!r}.")


def _trained_by(schedule: Schedule | None) -> "Defaults | None":
    """That a model is trained by the schedule that it lies for, if that has a name."""
    from tbjax.training.config import Defaults  # only here: it brings the whole of training with it

    if schedule is None or schedule.name not in NAMED or schedule != named(schedule.name, schedule.chunks):
        return None
    return Defaults(pipeline=schedule.name, chunks=schedule.chunks)


def save(model: CausalLM, path: str | Path, format: Literal["hf", "orbax"] = "hf", **options: Any) -> None:  # noqa: A002
    """Write a model: `format="hf"` as `model.save_pretrained`, `"orbax"` sharded, each process its own part."""
    if format == "hf":
        model.save_pretrained(path, **options)
    elif format == "orbax":
        checkpoint.save(model, path, companions=model.companions, **options)
    else:
        raise ValueError(f"format={format!r}: tbjax writes 'hf' or 'orbax'.")


def _hugging_face_config(config: Any) -> dict[str, Any]:
    """A Hugging Face config, its defaults filled in, from any of its forms."""
    from interop.source import normalize_config, read_config

    if isinstance(config, str | Path):
        return normalize_config(read_config(Path(config)))
    if isinstance(config, Mapping):
        return normalize_config(dict(config))
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise TypeError(
        f"config is a {type(config).__name__}: a ModelConfig, a dict, a path or a transformers config is needed."
    )


def _present(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and (not names or name in names)}
