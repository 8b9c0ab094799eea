"""Stacks of layers between the order of a pipeline's stages (`tbjax.cut`) and the layers' own, which is that on disk.

On its way a stack lies cut over pp in another dimension than that of its layers. Every device then has a part of every
layer, can put them in whatever order, and the number of layers need not divide: one exchange between the stages, and
never more on a device than its share.

What is given and taken is by path, as a checkpoint has it: parameters, or an optimizer's arrays that have their shapes.
"""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tbjax.cut import HOLE, Cut
from tbjax.model import Decoder, with_holes
from tbjax.quantize import convert
from tbjax.sharding import Sharding, axes_of, by_path, with_arrays

Model = TypeVar("Model", bound=Decoder)


def in_order(arrays: Mapping[str, Any], model: Decoder) -> dict[str, Any]:
    """Arrays (or their shapes, with shardings) as they lie on the stages, with stacks in the layers' order."""
    found = dict(arrays)
    for path, array in arrays.items():
        cut = _cut(path, array, model)
        if cut is not None:
            shape, between = (cut.repeats, *array.shape[1:]), _across(array)
            if isinstance(array, jax.ShapeDtypeStruct):
                found[path] = jax.ShapeDtypeStruct(shape, array.dtype, sharding=between)
            else:
                # What lies in the host's memory is put in order on the device.
                on_device = jax.device_put(array, _on_device(array.sharding))
                found[path] = _taker(cut.places, between, between)(on_device)
    return found


def on_stages(arrays: Mapping[str, jax.Array], wanted: Mapping[str, Any], model: Decoder) -> dict[str, jax.Array]:
    """And back: `wanted` are the arrays, or their shapes with shardings, that `in_order` was or would be given."""
    found = dict(arrays)
    for path, array in arrays.items():
        cut = _cut(path, wanted[path], model)
        if cut is not None:
            after = wanted[path].sharding
            taken = _taker(cut.order, _across(wanted[path]), _on_device(after))(array)
            found[path] = jax.device_put(taken, after)
    return found


def moved(model: Decoder, sharding: Sharding) -> Decoder:
    """A copy of the model that lies as `sharding` says, on other devices or over other stages."""
    there = jax.eval_shape(lambda: Decoder(model.config, sharding, dtype=model.dtype, scan=model.scan))
    rules = getattr(model, "quantization", None)
    return filled(sharding.place(convert.quantized(there, rules, sharding)), model)


def filled(there: Model, model: Decoder) -> Model:
    """`there`, an abstract model of the same config that lies anywhere, with the arrays of `model`."""
    arrays, wanted = in_order(by_path(model), model), by_path(there)
    between = in_order(wanted, there)
    arrays = {path: jax.device_put(array, between[path].sharding) for path, array in arrays.items()}
    return with_arrays(there, on_stages(arrays, wanted, there))


def _cut(path: str, there: Any, model: Decoder) -> Cut | None:
    """How `there`, what lies at a path of the stages, is cut; None if in order, or if it is no stack."""
    if not path.startswith("stacks."):
        return None
    cut = model.sharding.stack(model.config.groups[int(path.split(".")[1])].repeats)
    return cut if not cut.plain and there.ndim and there.shape[0] == cut.stages * cut.rows else None


def _on_device(sharding: Any) -> NamedSharding:
    """The same place in the memory of the devices."""
    return NamedSharding(sharding.mesh, sharding.spec)


def _across(array: Any) -> NamedSharding:
    """How a stack lies between the orders: no longer cut by layers, but in the first dimension that pp divides."""
    sharding = cast(NamedSharding, array.sharding)
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    spec[0] = None
    for dim in range(1, array.ndim):
        axes = axes_of(spec[dim])
        degree = int(np.prod([sharding.mesh.shape[axis] for axis in (*axes, "pp")]))
        if array.shape[dim] % degree == 0:
            spec[dim] = (*axes, "pp")
            break
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.cache
def _taker(rows: tuple[int, ...], between: NamedSharding, after: NamedSharding) -> Any:
    """A function that takes these rows of a stack; a HOLE is zeros."""

    def take(stack: jax.Array) -> jax.Array:
        stack = jax.lax.with_sharding_constraint(stack, between)[np.maximum(rows, 0)]
        if HOLE in rows:
            stack = with_holes(np.asarray(rows), stack)
        return jax.lax.with_sharding_constraint(stack, between)

    return jax.jit(take, out_shardings=after)
