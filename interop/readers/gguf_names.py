"""What llama.cpp's conversion does to a checkpoint, per architecture, so that it can be undone.

Names: the `gguf` library maps Hugging Face's names to GGUF's for each architecture. The tables below list the names
that a Hugging Face checkpoint of the architecture has; mapped and turned round they name the tensors of a file.

Values: four changes, none of which loses anything that the file could give back.

- `llama` (Llama, Mistral, Mixtral): llama.cpp turns neighbouring pairs in its rope where Hugging Face turns halves of
  the head, so the rows of queries and keys were interleaved.
- `falcon`: the groups of [queries..., key, value] in the fused projection were sorted into all queries, keys, values.
- `gemma2`, `gemma3`: one was added to the norms' scales. That sum was rounded to float32; what it lost is lost.
- The experts of a layer were stacked into one tensor.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from interop.readers.base import CheckpointError
from interop.readers.gguf_file import GGUFFile, StoredTensor

# Frequencies of a stretched rope, which belong to the config and not to the weights.
ROPE_FREQUENCIES = "rope_freqs.weight"

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_FEEDFORWARD_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The modules of a Hugging Face checkpoint, and what conversion does to their weights."""

    layer: tuple[str, ...]
    # Fused in GGUF; in Hugging Face's file `.experts.` is followed by the expert's number.
    experts: tuple[str, ...] = ()
    layers: str = "model.layers"
    ends: tuple[str, ...] = ("model.embed_tokens", "model.norm", "lm_head")
    interleaved_rope: bool = False
    sorted_groups: bool = False
    norms_plus_one: bool = False


_LLAMA = Architecture(
    layer=(*_ATTENTION, *_MLP, *_NORMS, "block_sparse_moe.gate"),
    experts=tuple(f"block_sparse_moe.experts.{name}" for name in ("w1", "w2", "w3")),
    interleaved_rope=True,
)
_FALCON_MODULES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FALCON = Architecture(
    layer=(*_FALCON_MODULES, "input_layernorm"),
    layers="transformer.h",
    ends=("transformer.word_embeddings", "transformer.ln_f", "lm_head"),
    sorted_groups=True,
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "qwen2": Architecture(layer=(*_ATTENTION, *_MLP, *_NORMS)),
    "qwen3": Architecture(layer=(*_ATTENTION, *_QUERY_KEY_NORMS, *_MLP, *_NORMS)),
    "qwen3moe": Architecture(
        layer=(*_ATTENTION, *_QUERY_KEY_NORMS, *_NORMS, "mlp.gate"),
        experts=tuple(f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    ),
    "gemma2": Architecture(layer=(*_ATTENTION, *_MLP, *_NORMS, *_FEEDFORWARD_NORMS), norms_plus_one=True),
    "gemma3": Architecture(
        layer=(*_ATTENTION, *_QUERY_KEY_NORMS, *_MLP, *_NORMS, *_FEEDFORWARD_NORMS), norms_plus_one=True
    ),
    "phi3": Architecture(
        layer=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS)
    ),
    "olmo2": Architecture(
        layer=(*_ATTENTION, *_QUERY_KEY_NORMS, *_MLP, "post_attention_layernorm", "post_feedforward_layernorm")
    ),
    "falcon": _FALCON,
}
# Falcon 40B has two norms where 7B has one, and GGUF calls the second one's companion by the same name.
FALCON_SECOND_NORM = "blk.0.attn_norm_2.weight"
_FALCON_TWO_NORMS = dataclasses.replace(_FALCON, layer=(*_FALCON_MODULES, "ln_mlp", "ln_attn"))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a Hugging Face tensor is in the file: in tensor `stored`, as which expert, and what to undo."""

    stored: str
    expert: int | None = None
    order: np.ndarray | None = None  # for each of our rows, the row of the file
    subtract_one: bool = False


def architecture_of(file: GGUFFile) -> Architecture:
    """The entry for the file's architecture; raises where there is none."""
    name = file.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: general.architecture={name!r} is not supported: from GGUF tbjax reads "
            f"{', '.join(ARCHITECTURES)}."
        )
    return _FALCON_TWO_NORMS if name == "falcon" and FALCON_SECOND_NORM in file.tensors else ARCHITECTURES[name]


def placements(file: GGUFFile) -> dict[str, Placement]:
    """Hugging Face's name of every weight in the file, and where it is."""
    architecture = architecture_of(file)
    modules = dict(_modules(file, architecture))
    found: dict[str, Placement] = {}
    for stored in file.tensors.values():
        if stored.name == ROPE_FREQUENCIES and file.architecture == "llama":
            continue
        module, _, parameter = stored.name.rpartition(".")
        if module not in modules or parameter not in ("weight", "bias"):
            raise CheckpointError(
                f"{file.path}: tensor {stored.name!r} has no counterpart in a Hugging Face checkpoint of "
                f"{file.architecture}."
            )
        name = f"{modules[module]}.{parameter}"
        order = _order(file, architecture, name, stored)
        if modules[module].endswith(architecture.experts):
            for expert in range(_experts(file, stored)):
                found[name.replace(".experts.", f".experts.{expert}.")] = Placement(stored.name, expert)
        else:
            plus_one = architecture.norms_plus_one and name.endswith("norm.weight")
            found[name] = Placement(stored.name, order=order, subtract_one=plus_one)
    return found


def count(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A metadata field of the architecture that must be a positive integer."""
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{file.path}: {file.architecture}.{key} is {value!r}; one positive integer is needed.")
    return value


def _modules(file: GGUFFile, architecture: Architecture) -> Iterator[tuple[str, str]]:
    """GGUF's name of each module, with Hugging Face's."""
    import gguf

    blocks = count(file, "block_count")
    if blocks > len(file.tensors):
        raise CheckpointError(f"{file.path}: block_count is {blocks}, but there are only {len(file.tensors)} tensors.")
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = gguf.get_tensor_name_map(key, blocks)
    layers = (
        f"{architecture.layers}.{layer}.{module}"
        for layer in range(blocks)
        for module in (*architecture.layer, *architecture.experts)
    )
    for ours in (*architecture.ends, *layers):
        theirs = names.get_name(ours)
        if theirs is not None:  # an output that the library does not expect: such a model's embeddings are always tied
            yield theirs, ours


def _experts(file: GGUFFile, stored: StoredTensor) -> int:
    experts = count(file, "expert_count")
    if len(stored.shape) != 3 or stored.shape[0] != experts:
        raise CheckpointError(
            f"{file.path}: tensor {stored.name!r} has shape {list(stored.shape)}; with expert_count={experts} it must "
            f"be [{experts}, out, in]."
        )
    return experts


def _order(file: GGUFFile, architecture: Architecture, name: str, stored: StoredTensor) -> np.ndarray | None:
    """The row of the file for each row of a tensor whose rows were moved."""
    interleaved = architecture.interleaved_rope and (".q_proj." in name or ".k_proj." in name)
    sorted_groups = architecture.sorted_groups and ".query_key_value." in name
    if not interleaved and not sorted_groups:
        return None
    heads = count(file, "attention.head_count")
    kv_heads = count(file, "attention.head_count_kv", heads)
    parts = heads + 2 * kv_heads if sorted_groups else heads if ".q_proj." in name else kv_heads
    rows = stored.shape[0] if stored.shape else 0
    if not rows or rows % (2 * parts) or heads % kv_heads:
        raise CheckpointError(
            f"{file.path}: tensor {stored.name!r} has {rows} rows, which are not {parts} heads of an even size "
            f"(head_count={heads}, head_count_kv={kv_heads})."
        )
    return _groups(heads, kv_heads, rows // parts) if sorted_groups else _halves(parts, rows // parts)


def _halves(heads: int, head_dim: int) -> np.ndarray:
    """Rows [head, half, pair] of a file whose rows are [head, pair, half]."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _groups(heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    """Rows [group, its queries then its key then its value, head_dim] of a file with queries, keys, values apart."""
    rows = np.arange((heads + 2 * kv_heads) * head_dim).reshape(-1, head_dim)
    queries, keys, values = np.split(rows, [heads, heads + kv_heads])
    grouped = [part.reshape(kv_heads, -1, head_dim) for part in (queries, keys, values)]
    return np.concatenate(grouped, axis=1).reshape(-1)
