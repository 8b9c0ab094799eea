"""Optimizers by name, over optax, and where their state lies.

An optimizer sees the parameters as a flat dict from path to array. Its state then carries those same paths, whatever
transformations it is chained from, and that is how each array of state finds the parameter that it belongs to.

Every recipe decays and orthogonalises matrices alone: norms' scales and biases are left out, as is usual, and `muon`
keeps AdamW for them and for the embeddings, as its authors advise.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from tbjax.sharding import Dims, Leaf, Sharding, leaves

Name: TypeAlias = Literal["adamw", "adafactor", "sgd", "lion", "muon"]
Parameters: TypeAlias = dict[str, Any]

SGD_MOMENTUM = 0.9


def make_optimizer(
    name: Name,
    model: nnx.Module,
    *,
    learning_rate: optax.ScalarOrSchedule = 3e-4,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """The optimizer `name` for the parameters of `model`, which may be abstract.

    Its state is in the parameters' dtype: adamw two arrays like them (muon for what it leaves to AdamW), lion, sgd and
    muon one, adafactor one value per row and column of each matrix. `clip_norm` bounds the norm of all gradients
    together.
    """
    found = {leaf.path: leaf for leaf in leaves(model)}
    decayed = {path: _is_matrix(leaf) for path, leaf in found.items()}

    def orthogonalised(values: Any) -> Any:
        return {path: _orthogonalised(found[path]) for path in values}

    match name:
        case "adamw":
            rule = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay, mask=decayed)
        case "adafactor":
            rule = optax.adafactor(learning_rate)
        case "sgd":
            rule = optax.sgd(learning_rate, momentum=SGD_MOMENTUM)
        case "lion":
            rule = optax.lion(learning_rate, weight_decay=weight_decay, mask=decayed)
        case "muon":
            rule = contrib.muon(
                learning_rate,
                weight_decay=weight_decay,
                weight_decay_mask=decayed,
                adam_weight_decay=weight_decay,
                muon_weight_dimension_numbers=orthogonalised,
            )
        case _:
            known = ", ".join(map(repr, Name.__args__))
            raise ValueError(f"optimizer={name!r} is unknown: tbjax knows {known}.")
    return rule if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def place_state(state: Any, model: nnx.Module, sharding: Sharding) -> Any:
    """An abstract optimizer state with shardings: each array lies like its parameter, cut as the strategy has it."""
    found = {leaf.path: leaf for leaf in leaves(model)}
    replicated = NamedSharding(sharding.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        leaf = next((found[key] for key in keys if key in found), None)
        where = replicated if leaf is None else _like(leaf, array.shape, sharding)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(place, state)


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


def as_dict(model: nnx.Module) -> Parameters:
    """The parameters of a model by path."""
    return dict(zip((leaf.path for leaf in leaves(model)), jax.tree.leaves(model), strict=True))


def with_parameters(model: Any, values: Mapping[str, Any]) -> Any:
    """`model` with other parameters."""
    return jax.tree.unflatten(jax.tree.structure(model), [values[leaf.path] for leaf in leaves(model)])
