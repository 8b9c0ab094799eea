"""Models with quantised weights from models without, and back; abstract ones too."""

import functools
from typing import Any, TypeVar

import jax
from flax import nnx

from tbjax.quantize.rules import Encoding, Recipe
from tbjax.quantize.weight import Dims, Parts, QuantizedWeight, decoded, encoded, inputs_of
from tbjax.sharding import Leaf, Sharding, axes_of, by_path, leaves

Model = TypeVar("Model", bound=nnx.Module)


def quantized(model: Model, recipe: Recipe | None, sharding: Sharding) -> Model:
    """A copy of `model` in which the weights that the rules are about are quantised. Norms and biases never are."""
    if recipe is None:
        return model
    copy = jax.tree.map(lambda a: a, model)
    found = list(leaves(copy))
    recipe.check(leaf.path for leaf in found)
    values = by_path(copy)
    for leaf in found:
        encoding = recipe.encoding(leaf.path)
        if encoding is not None and len(leaf.variable.dims) > 1:
            _put(copy, leaf.path, _quantized(leaf, values[leaf.path], encoding, sharding))
    return copy


def dequantized(model: Model, dtype: Any) -> Model:
    """A copy of `model`, which is no abstract one, in which every weight is in full, in `dtype`."""
    copy = jax.tree.map(lambda a: a, model)
    for path, weight in weights(copy).items():
        parts = Parts(*(None if part is None else part.get_value() for part in weight.parts))
        _put(copy, path, nnx.Param(decoded(parts, "float32").astype(dtype), dims=weight.dims))
    return copy


def weights(model: Any) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model, by path."""
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, QuantizedWeight))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): node
        for path, node in flat
        if isinstance(node, QuantizedWeight)
    }


def refuse(model: Any, what: str) -> None:
    """Raises where `model` has quantised weights, with what to do instead."""
    if weights(model):
        raise ValueError(
            f"this model's weights are quantised; such {what}: take `model.dequantized()`, whose weights are in full."
        )


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _quantized(leaf: Leaf, value: Any, encoding: Encoding, sharding: Sharding) -> QuantizedWeight:
    dims = tuple(leaf.variable.dims)
    inputs = inputs_of(dims)
    groups = encoding.groups(value.shape[inputs], leaf.path)
    make = functools.partial(encoded, inputs=inputs, encoding=encoding)
    parts = jax.eval_shape(make, value) if isinstance(value, jax.ShapeDtypeStruct) else make(value)
    return QuantizedWeight(parts, dims, _frame_dims(leaf, groups, inputs, sharding), encoding)


def _frame_dims(leaf: Leaf, groups: int, inputs: int, sharding: Sharding) -> Dims:
    """The dimensions of scales and offsets: cut along the inputs as the weight is, if whole groups are."""
    spec = sharding.parameter(leaf.dims, leaf.variable.shape, leaf.path).spec
    named = groups > 1 and groups % sharding.size(*axes_of(spec[inputs])) == 0
    dims = list(leaf.variable.dims)
    dims[inputs] = dims[inputs] if named else None
    return tuple(dims)


def _put(model: Any, path: str, node: Any) -> None:
    """Set what stands at a path of the model."""
    *owners, name = path.split(".")
    for part in owners:
        model = model[int(part)] if part.isdecimal() else getattr(model, part)
    setattr(model, name, node)
