"""Optimizers by name, over optax, and where their state lies.

An optimizer sees the parameters as a flat dict from path to array. Its state then carries those same paths, whatever
transformations it is chained from, and that is how each array of state finds the parameter that it belongs to.

Every recipe decays and orthogonalises matrices alone: norms' scales and biases are left out, as is usual, and `muon`
keeps AdamW for them and for the embeddings, as its authors advise.

Any optax transformation will do in their place. One that treats the layers of a stack apart can say so (`Layerwise`),
and may then be run layer by layer (`tbjax.training.update`), as it must be where its state lies in the host's memory.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from tbjax.sharding import Dims, Leaf, Sharding, leaves
from tbjax.training.rules import Rule, chosen

Name: TypeAlias = Literal["adamw", "adafactor", "sgd", "lion", "muon"]
Parameters: TypeAlias = dict[str, Any]

SGD_MOMENTUM = 0.9

# The memory of the host that devices can read and write by themselves.
HOST = "pinned_host"


class Layerwise(optax.GradientTransformationExtraArgs):
    """A transformation whose update of a layer follows from that layer alone, and from the extra argument
    `gradient_norm`: the norm of all gradients together.

    A promise: `Layerwise(*transformation)` makes it for one of your own. One that clips by the norm of all gradients
    must do that with `clip_by_norm`, as optax's own would take the norm of a layer for that of all.
    """


class OnlyLayerwise(Layerwise):
    """One that takes so much memory for a whole stack that it is run layer by layer in any case."""


def make_optimizer(
    name: Name,
    model: nnx.Module,
    *,
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    decayed: Rule | None = None,
) -> optax.GradientTransformation:
    """The optimizer `name` for the parameters of `model`, which may be abstract.

    Its state is in the parameters' dtype: adamw two arrays like them (muon for what it leaves to AdamW), lion, sgd and
    muon one, adafactor one value per row and column of each matrix. `clip_norm` bounds the norm of all gradients
    together (None or 0: nothing does). `decayed` says which parameters' weights decay, by their paths: matrices unless
    told otherwise (sgd and adafactor decay none).
    """
    found = {leaf.path: leaf for leaf in leaves(model)}
    matrices = frozenset(path for path, leaf in found.items() if _is_matrix(leaf))
    decaying = matrices if decayed is None else chosen(decayed, found, "decayed")

    def mask(values: Parameters) -> dict[str, bool]:
        return {path: path in decaying for path in values}

    match name:
        case "adamw":
            rule = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay, mask=mask)
        case "adafactor":
            _check_no_holes(model)
            rule = optax.adafactor(learning_rate)
        case "sgd":
            rule = optax.sgd(learning_rate, momentum=SGD_MOMENTUM)
        case "lion":
            rule = optax.lion(learning_rate, weight_decay=weight_decay, mask=mask)
        case "muon":
            rule = _muon(found, learning_rate, weight_decay, mask)
        case _:
            known = ", ".join(map(repr, Name.__args__))
            raise ValueError(f"optimizer={name!r} is unknown: tbjax knows {known}.")
    whole = optax.chain(clip_by_norm(clip_norm), rule) if clip_norm else rule
    # Adafactor's clipping and scaling are by the size of an array, which for it is a stack.
    kind = {"adafactor": optax.GradientTransformationExtraArgs, "muon": OnlyLayerwise}.get(name, Layerwise)
    return kind(*optax.with_extra_args_support(whole))


def _check_no_holes(model: Any) -> None:
    """Adafactor measures whole stacks, and rows without a layer would count in it."""
    for group in model.config.groups:
        cut = model.sharding.stack(group.repeats)
        if cut.rows * cut.stages > cut.repeats:
            raise ValueError(
                f"optimizer='adafactor' scales updates by the size of whole stacks, but {cut.repeats} layers over "
                f"pp={cut.stages} leave rows without a layer in them: use another optimizer, or stages of equal depth."
            )


def clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, of gradients whose norm may be known already (`gradient_norm`)."""

    def init(params: Any) -> Any:
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        known = extra.get("gradient_norm")
        norm = optax.tree.norm(updates) if known is None else known

        def clip(gradient: jax.Array) -> jax.Array:
            return jax.lax.select(norm < largest, gradient, gradient / norm.astype(gradient.dtype) * largest)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _muon(
    found: Mapping[str, Leaf], learning_rate: optax.ScalarOrSchedule, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """Muon for the matrices of layers and AdamW for the rest, as `optax.contrib.muon` joins them; but that one can
    decay all or nothing of what is left to AdamW."""

    def numbers(values: Any) -> Any:
        return {path: _orthogonalised(found[path]) or optax.MaskedNode() for path in values}

    def widened(updates: Any, params: Any = None) -> Any:
        """Times what makes updates of matrices of any shape as large as those of square ones (Jordan's factor)."""
        result = dict(updates)
        for path, dims in numbers(updates).items():
            if isinstance(dims, contrib.MuonDimensionNumbers):
                fan_in, fan_out = (updates[path].shape[axis] for axis in (dims.reduction_axis, dims.output_axis))
                result[path] = updates[path] * math.sqrt(max(1, fan_out / fan_in))
        return result

    rules: dict[Any, optax.GradientTransformation] = {
        "muon": optax.chain(
            contrib.scale_by_muon(weight_dimension_numbers=numbers),
            optax.stateless(widened),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adam": optax.adamw(learning_rate, nesterov=True, weight_decay=weight_decay, mask=mask),
    }
    return optax.partition(
        rules, lambda values: {path: "muon" if _orthogonalised(found[path]) else "adam" for path in values}
    )


def place_state(state: Any, model: nnx.Module, sharding: Sharding, *, host: bool = False) -> Any:
    """An abstract optimizer state with shardings: each array lies like its parameter, cut as the strategy has it, and
    in the host's memory where `host` says so."""
    found = {leaf.path: leaf for leaf in leaves(model)}
    replicated = NamedSharding(sharding.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        leaf = next((found[key] for key in keys if key in found), None)
        where = replicated if leaf is None else _like(leaf, array.shape, sharding)
        if host and leaf is not None:
            where = in_host(where)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, state)


def in_host(sharding: Any) -> NamedSharding:
    """The same place in the memory of the host.

    GPUs that are only compiled for do not say what memories they have, and over such devices JAX drops the kind. Over
    an abstract mesh it does not, and to the compiler that is the same.
    """
    hosted = sharding.with_memory_kind(HOST)
    if hosted.memory_kind is None:
        hosted = NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=HOST)
    return hosted


def _like(leaf: Leaf, shape: tuple[int, ...], sharding: Sharding) -> NamedSharding:
    """Where an array of state lies: like its parameter, less the dimensions that the optimizer has summed away."""
    axes = sharding.parameter(leaf.dims, leaf.variable.shape, leaf.path, cut=sharding.strategy.cuts_optimizer).spec
    left = list(zip(leaf.variable.shape, axes, strict=True))
    spec = []
    for size in shape:
        while left and left[0][0] != size:
            left.pop(0)
        spec.append(left.pop(0)[1] if left else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _is_matrix(leaf: Leaf) -> bool:
    return len(_own_dims(leaf)) >= 2


def _own_dims(leaf: Leaf) -> Dims:
    """The dimensions of one layer's parameter."""
    return tuple(dim for dim in leaf.dims if dim != "layers")


def _orthogonalised(leaf: Leaf) -> contrib.MuonDimensionNumbers | None:
    """The two dimensions of the matrices that muon orthogonalises; those in front of them count layers and experts."""
    if not _is_matrix(leaf) or "vocab" in leaf.dims:
        return None
    inwards_last = "experts" not in leaf.dims  # ours lie [out, in], experts' [E, in, out]
    return contrib.MuonDimensionNumbers(*((-1, -2) if inwards_last else (-2, -1)))
