"""From what a dimension means to where it lies: the one place that knows mesh axes.

Layers name the dimensions of their parameters and activations (`embed`, `heads`, `batch`, ...). Two small tables say
which mesh axes may cut each, and one function turns names into a `PartitionSpec`. Parameters must be cut as asked or
the request raises; activations are cut as far as their size allows (a batch of one is computed everywhere).

Under FSDP a parameter lies cut over `fsdp` and is gathered where it is used: `use` says so to the compiler, which turns
it into an all-gather forwards and a reduce-scatter of the gradient backwards. A few tokens, as in decoding, are smaller
than the weights that they meet: `project` then leaves the weights where they lie and moves the tokens.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tbjax import mesh as meshes
from tbjax import native, weights
from tbjax.cut import Cut
from tbjax.cut import cut as cut_over
from tbjax.quantize.weight import Parts, QuantizedWeight
from tbjax.quantize.weight import matmul as quantized_matmul
from tbjax.shown import changed

# A dimension is cut by its first axis, or the request raises; by the further ones only where another dimension does
# not hold them. So `embed` is cut by ep as well, except in expert weights, where `experts` has it.
PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {
    "layers": ("pp",),
    "vocab": ("tp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "experts": ("ep",),
    "embed": ("fsdp", "ep"),
}
ACTIVATION_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp", "ep"),
    "sequence": ("cp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "cached": ("cp",),  # tokens of a cache,
    "all_cached": ("cp", "tp"),  # and where its heads are too few for tp
    "mlp": ("tp",),
    "vocab": ("tp",),
    "experts": ("ep",),
}

# Where weights stay cut over the data axes, a token's features are cut by them too, and the batch is not.
STATIONARY_AXES: Mapping[str, tuple[str, ...]] = {**ACTIVATION_AXES, "batch": ("dp",), "embed": ("fsdp", "ep")}

# Weights stay where they lie if moving the tokens in and out moves at most this share of what gathering them would: far
# enough from level that training always gathers, and a step of decoding does not.
STATIONARY_SHARE = 1 / 8

# The axes that FSDP and its lesser forms act on.
DATA_AXES = ("fsdp", "ep")

# A tensor above this share of all parameters must be cut by every sharding axis, or it is named.
NOTABLE_SHARE = 0.02

Dims = tuple[str | None, ...]
ContextMethod: TypeAlias = Literal["ring", "gather"]
Module = TypeVar("Module")


class ShardingStrategy(enum.StrEnum):
    """What the data-parallel devices share out between them, under the names PyTorch's FSDP gave."""

    NO_SHARD = "NO_SHARD"  # nothing: data parallel
    OPTIMIZER = "OPTIMIZER"  # optimizer state: ZeRO-1
    SHARD_GRAD_OP = "SHARD_GRAD_OP"  # gradients too: ZeRO-2
    FULL_SHARD = "FULL_SHARD"  # parameters too: ZeRO-3
    HYBRID_SHARD = "HYBRID_SHARD"  # FULL_SHARD over fsdp, replicated over dp

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"sharding={value!r} is not a strategy: tbjax knows {', '.join(cls)}.")

    @property
    def cuts_parameters(self) -> bool:
        return self in (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)

    @property
    def cuts_gradients(self) -> bool:
        return self.cuts_parameters or self is ShardingStrategy.SHARD_GRAD_OP

    @property
    def cuts_optimizer(self) -> bool:
        return self.cuts_gradients or self is ShardingStrategy.OPTIMIZER


class Leaf(NamedTuple):
    """One parameter of a module: its dotted path, its dimensions, its variable."""

    path: str
    dims: Dims
    variable: nnx.Variable


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def leaves(module: Any) -> Iterator[Leaf]:
    """The parameters of a module in tree order. In a stack they have one dimension more than they name: the layers."""
    return _leaves(module, is_variable)


def whole_leaves(module: Any) -> Iterator[Leaf]:
    """As `leaves`, but a quantised weight is one, in the shape that it has in full."""
    return _leaves(module, lambda node: is_variable(node) or isinstance(node, QuantizedWeight))


def _leaves(module: Any, is_leaf: Callable[[Any], bool]) -> Iterator[Leaf]:
    for path, variable in jax.tree_util.tree_flatten_with_path(module, is_leaf=is_leaf)[0]:
        dims = tuple(variable.dims)
        stacked = len(variable.shape) > len(dims)
        yield Leaf(
            jax.tree_util.keystr(path, simple=True, separator="."), ("layers", *dims) if stacked else dims, variable
        )


def by_path(module: Any) -> dict[str, Any]:
    """What a module's parameters are, by path: arrays, or their shapes."""
    return dict(zip((leaf.path for leaf in leaves(module)), jax.tree.leaves(module), strict=True))


def with_arrays(module: Module, arrays: Mapping[str, Any]) -> Module:
    """`module` with other parameters, given by path."""
    return jax.tree.unflatten(jax.tree.structure(module), [arrays[leaf.path] for leaf in leaves(module)])


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, and how a model is laid out on it."""

    mesh: Mesh | AbstractMesh
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD
    sequence_parallel: bool = False  # Megatron's: norms and residuals are cut over tp along the sequence
    cut: Cut | None = None  # how stacks of layers lie over pp; None: in order, as evenly as can be
    context: ContextMethod | None = None  # how keys get to queries over cp (`tbjax.layers.context`); None: what serves
    reduce_dtype: str | None = None  # in which gradients are summed over devices, where wider than that of the matmuls

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", ShardingStrategy(self.strategy))
        if self.context not in (None, *get_args(ContextMethod)):
            known = ", ".join(map(repr, get_args(ContextMethod)))
            raise ValueError(f"context={self.context!r} is unknown: tbjax knows {known}.")
        if self.context == "ring" and self.size("pp") > 1:
            raise ValueError(
                f"context='ring' does not go with pp={self.size('pp')}: stages of a pipeline do different things at a "
                "time, and the ring's transfers name devices of all stages; context='gather' would do."
            )
        if self.cut is not None and self.cut.stages != self.size("pp"):
            raise ValueError(f"the cut is for pp={self.cut.stages}, but the mesh has pp={self.size('pp')}.")

    def __repr__(self) -> str:
        sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        return changed(self, mesh=repr(sizes) if sizes else "one device")

    def size(self, *axes: str) -> int:
        """The product of the sizes of `axes` (an axis that the mesh lacks has size one)."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    @property
    def platform(self) -> str | None:
        """What the devices are, as JAX calls it ("cpu", "gpu", "tpu"); None for a mesh on paper."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else None

    @property
    def in_stage(self) -> bool:
        """Whether what is being traced is per device already, as a pipeline's stages are."""
        return _inside_shard_map()

    def stack(self, repeats: int) -> Cut:
        """How a stack of `repeats` layers lies over pp."""
        if self.cut is not None and self.cut.repeats == repeats:
            return self.cut
        stages = self.size("pp")
        # Fewer layers than stages cannot be cut, which is said where the parameter is to be placed.
        return cut_over(repeats, stages if repeats >= stages else 1)

    # Parameters.

    def parameter(
        self, dims: Dims, shape: tuple[int, ...], name: str = "parameter", *, cut: bool | None = None
    ) -> NamedSharding:
        """Where a parameter lies. Raises, naming it, where a dimension does not divide.

        `cut` says whether the data axes cut it: by default as the strategy has parameters, though what belongs to a
        parameter (its gradient, its optimizer state) may lie otherwise.
        """
        axes = dict(PARAMETER_AXES)
        if not (self.strategy.cuts_parameters if cut is None else cut):
            axes["embed"] = ()
        spec = self._spec(dims, axes)
        for dim, size, entry in zip(dims, shape, spec, strict=True):
            degree = self.size(*axes_of(entry))
            if size % degree and dim == "kv_heads":
                # Few key-value heads are held by every tp device, as is usual.
                spec = PartitionSpec(*(None if d == "kv_heads" else e for d, e in zip(dims, spec, strict=True)))
            elif size % degree:
                raise ValueError(
                    f"{name}: dimension {dim!r} of size {size} does not divide over {'*'.join(axes_of(entry))}={degree}"
                )
        return NamedSharding(self.mesh, spec)

    def constrain_parameter(self, value: jax.Array, leaf: Leaf, *, cut: bool) -> jax.Array:
        """Tells the compiler that `value` is to lie like a parameter, cut over the data axes or not."""
        return self.lay(value, self.parameter(leaf.dims, leaf.variable.shape, leaf.path, cut=cut).spec)

    def use(self, variable: nnx.Variable, dtype: Any = None) -> jax.Array:
        """The value of a parameter, gathered over the axes that only store it (FSDP) and still cut over tp.

        What `sums_wide` has rounded to `dtype` comes in the wider dtype of its gradient: cast it where it is used.
        """
        value = variable[...]
        wide = dtype is not None and self.sums_wide(dtype)
        if dtype is not None and not wide:
            value = value.astype(dtype)
        gathers = self.size(*DATA_AXES) > 1 and self.strategy.cuts_gradients
        if not gathers and not wide:
            return value
        dims = tuple(variable.dims)
        used, stored = (self.parameter(dims, value.shape, cut=cut).spec for cut in (False, gathers))
        if wide:
            value = cast(jax.Array, weights.rounded(value, self, used, stored, jnp.dtype(dtype).name))
        else:
            value = cast(jax.Array, weights.gathered(value, self, used, stored))
        if self.in_stage and self.size("tp") > 1 and not any(used):
            # The compiler would share the gradient's matmul out over tp and lay the result as it is stored by a
            # permute, for which in a pipeline it makes stages wait that do something else. So it is laid as it is used
            # first.
            value = self.lay(value, used)
        return value

    def sums_wide(self, dtype: Any) -> bool:
        """Whether gradients of weights that are used in `dtype` are summed over devices in a wider one."""
        return self.reduce_dtype is not None and jnp.dtype(self.reduce_dtype).itemsize > jnp.dtype(dtype).itemsize

    def parts(self, weight: QuantizedWeight, *, stationary: bool = False) -> Parts:
        """What a quantised weight consists of, gathered as by `use`; `stationary`: as it is stored.

        Where the inputs are cut within a group, each device gets scale and offset of every weight that it has.
        """
        found: list[Any] = []
        for variable in weight.parts:
            if variable is None or stationary:
                found.append(variable if variable is None else variable[...])
                continue
            value, dims = variable[...], tuple(variable.dims)
            stored, used = (self.parameter(dims, value.shape, cut=cut).spec for cut in (None, False))
            found.append(value if used == stored else weights.gathered_integers(value, self, used, stored))
        values, *frame = found
        spec = self.parameter(weight.dims, values.shape, cut=None if stationary else False).spec
        if weight.offset is not None and self.platform == "tpu":
            # Its compiler would have groups lie otherwise, and turn whole stacks of integers round before it begins.
            values = weights.pinned(values, self, spec)
        if self.size(*axes_of(spec[1])) > 1 and weight.scale.dims[1] is None and weight.offset is not None:
            frame = [self.lay(jnp.repeat(a, values.shape[1] // a.shape[1], axis=1), spec) for a in frame]
        return Parts(values, *frame)

    def project(self, x: jax.Array, weight: nnx.Variable | QuantizedWeight) -> jax.Array:
        """x Wᵀ for a weight [out, in] and x [..., in], moving whichever of the two is smaller."""
        rows, (features_out, features_in) = math.prod(x.shape[:-1]), weight.shape
        moved, kept = rows * (features_in + features_out), features_in * features_out
        if isinstance(weight, QuantizedWeight):
            kept *= weight.encoding.bits / (8 * x.dtype.itemsize)
        if moved > STATIONARY_SHARE * kept:
            if isinstance(weight, QuantizedWeight):
                return quantized_matmul(x, self.parts(weight))
            if self.sums_wide(x.dtype):
                return weights.matmul_summed_wide(x, self.use(weight, x.dtype))
            matmul = weights.matmul_turning_less if self.platform == "cpu" else weights.matmul
            return matmul(x, self.use(weight, x.dtype))
        leading = leading_dims(x)
        x = self.lay(x, self.activation((*leading, weight.dims[1]), x.shape, STATIONARY_AXES))
        if isinstance(weight, QuantizedWeight):
            y = quantized_matmul(x, self.parts(weight, stationary=True))
        else:
            y = weights.matmul(x, weight[...].astype(x.dtype))
        return self.lay(y, self.activation((*leading, weight.dims[0]), y.shape, STATIONARY_AXES))

    def lookup(self, tokens: jax.Array, table: nnx.Variable, dtype: Any = None) -> jax.Array:
        """The rows of a table [V, D], moving whichever is smaller, them or the table."""
        if tokens.size > STATIONARY_SHARE * table.shape[0] or self.in_stage:
            used = self.parameter(tuple(table.dims), table.shape, cut=False).spec
            # The gradient of a lookup lies as the table does in use, and is then cut: see `weights.gathered`.
            rows = self.lay(self.use(table, dtype), used)
            if self.in_stage:
                return self._lookup_by_part(tokens, rows, used, dtype or table.dtype)
            return cast(jax.Array, weights.take(rows, tokens, table.shape[0])).astype(dtype or table.dtype)
        stored = self.parameter(tuple(table.dims), table.shape).spec
        if tokens.size == 1 and stored[0] is not None:
            # XLA for NVIDIA makes a slice of a lookup of one row, for which it would gather the table.
            found = self._lookup_by_part(tokens, table[...], stored, dtype or table.dtype)
        else:
            found = native.take(table[...], tokens).astype(dtype or table.dtype)
        return self.lay(found, self.activation((*leading_dims(found), table.dims[1]), found.shape, STATIONARY_AXES))

    def _lookup_by_part(self, tokens: jax.Array, table: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
        """A lookup in which each device finds what its part of the table has, and the parts are summed.

        It is what the compiler makes of a lookup elsewhere; in a pipeline stage it fails an assertion of its own (XLA
        of 2026-01: ExpandDeviceGroupsWithIota, of a gather where an outer axis is manual).
        """
        of_tokens = self.activation(("batch", "sequence"), tokens.shape)
        over = axes_of(spec[0])

        def find(table: jax.Array, tokens: jax.Array) -> jax.Array:
            first = jax.lax.axis_index(over) * table.shape[0] if over else 0
            place = jnp.clip(tokens, 0, self.size(*over) * table.shape[0] - 1) - first
            here = (place >= 0) & (place < table.shape[0])
            found = jnp.where(here[..., None], weights.take(table, place, table.shape[0]), 0).astype(dtype)
            return jax.lax.psum(found, over) if over else found

        return self.per_device(find, (spec, of_tokens), PartitionSpec(*of_tokens, spec[1]))(table, tokens)

    def place(self, module: Module) -> Module:
        """An abstract module with shardings on its leaves. Raises, with a mesh that would do, where this one cannot."""
        shardings = {}
        for path, dims, variable in leaves(module):
            try:
                shardings[path] = self.parameter(dims, variable.shape, path)
            except ValueError as error:
                hint = self._working_mesh(module)
                raise ValueError(f"{error}. {hint}") from None
        placed = iter(shardings.values())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=next(placed)), module)

    def uncut(self, module: Any) -> dict[str, tuple[str, ...]]:
        """The notable tensors that a sharding axis (fsdp, tp) does not cut, with those axes."""
        sharding_axes = [
            a for a in ("fsdp", "tp") if self.size(a) > 1 and (a != "fsdp" or self.strategy.cuts_parameters)
        ]
        found = list(leaves(module))
        total = sum(math.prod(variable.shape) for _, _, variable in found)
        result = {}
        for path, dims, variable in found:
            if math.prod(variable.shape) > NOTABLE_SHARE * total:
                used = {a for entry in self.parameter(dims, variable.shape, path).spec for a in axes_of(entry)}
                missing = tuple(axis for axis in sharding_axes if axis not in used)
                if missing:
                    result[path] = missing
        return result

    # Activations.

    def activation(
        self, dims: Dims, shape: tuple[int, ...], axes: Mapping[str, tuple[str, ...]] = ACTIVATION_AXES
    ) -> PartitionSpec:
        """How an activation is cut: as far as its sizes allow."""
        spec = self._spec(dims, axes)
        return PartitionSpec(*(self._fitting(entry, size) for entry, size in zip(spec, shape, strict=True)))

    def shard_shape(self, dims: Dims, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of an activation that one device has."""
        spec = self.activation(dims, shape)
        return tuple(size // self.size(*axes_of(entry)) for size, entry in zip(shape, spec, strict=True))

    def constrain(self, value: jax.Array, *dims: str | None) -> jax.Array:
        """Tells the compiler how `value` is to lie."""
        return self.lay(value, self.activation(dims, value.shape))

    def in_order(self, value: jax.Array, *dims: str | None) -> jax.Array:
        """As `constrain`, and in memory its dimensions stand in the order that they have in its shape."""
        return weights.pinned(value, self, self.activation(dims, value.shape))

    def residual(self, value: jax.Array) -> jax.Array:
        """As `constrain` for the residual stream [B, S, D], whose sequence lies over tp under sequence parallelism."""
        spec = self.activation(("batch", "sequence", None), value.shape)
        if self.sequence_parallel:
            entry = self._fitting((*axes_of(spec[1]), "tp"), value.shape[1])
            spec = PartitionSpec(spec[0], entry, None)
        return self.lay(value, spec)

    def per_device(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` run on each device's part of its arguments; in a pipeline, on each device of a stage."""
        # A stage is itself inside a shard_map, whose mesh (with `pp` taken out) is then the one to use.
        mesh = None if self.in_stage else self.mesh
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def lay(self, value: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Tells the compiler that `value` is to lie as `spec` says."""
        if self.mesh.size == 1:
            return value
        if not self.in_stage:
            return jax.lax.with_sharding_constraint(value, NamedSharding(self.mesh, spec))
        return jax.lax.with_sharding_constraint(value, spec)  # on the shard_map's own mesh

    # The one function.

    def _spec(self, dims: Dims, axes: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
        """The mesh axes of each dimension; raises if two dimensions claim one axis as their first."""
        held: dict[str, str] = {}
        for dim in dims:
            for axis in axes.get(dim or "", ())[:1]:
                if axis in held:
                    raise ValueError(
                        f"dimensions {held[axis]!r} and {dim!r} of one tensor {dims} both claim mesh axis {axis!r}."
                    )
                held[axis] = dim or ""
        entries = []
        for dim in dims:
            mine = [a for a in axes.get(dim or "", ()) if held.setdefault(a, dim or "") == dim and self.size(a) > 1]
            entries.append(mine[0] if len(mine) == 1 else tuple(mine) or None)
        return PartitionSpec(*entries)

    def _fitting(self, entry: Any, size: int) -> Any:
        """The leading axes of `entry` whose product divides `size`."""
        axes = [axis for axis in axes_of(entry) if self.size(axis) > 1]
        while axes and size % self.size(*axes):
            axes.pop()
        return axes[0] if len(axes) == 1 else tuple(axes) or None

    def _working_mesh(self, module: Any) -> str:
        """A sentence naming the mesh nearest to this one, over as many devices, that the module's sizes allow."""
        asked = dict(self.mesh.shape)
        movable = [axis for axis in ("dp", "fsdp", "tp") if axis in asked]
        movable += [axis for axis in ("pp", "ep") if asked.get(axis, 1) > 1]
        count = self.size(*movable)
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        candidates = [
            asked | dict(zip(movable, sizes, strict=True))
            for sizes in itertools.product(divisors, repeat=len(movable))
            if math.prod(sizes) == count
        ]

        def distance(sizes: Mapping[str, int]) -> tuple[float, float, int]:
            # Near what was asked; then with tp as asked; then with as little left replicated as can be.
            moved = {axis: abs(math.log2(sizes[axis] / asked[axis])) for axis in movable}
            return sum(moved.values()), moved.get("tp", 0), -sizes.get("fsdp", 1)

        candidates.sort(key=distance)
        for sizes in candidates:
            if self._fits(module, sizes):
                return f"A mesh that would do: {meshes.spell(sizes)}."
        return "No mesh over this many devices would do."

    def _fits(self, module: Any, sizes: Mapping[str, int]) -> bool:
        other = dataclasses.replace(self, mesh=AbstractMesh(tuple(sizes.values()), tuple(sizes)), cut=None)
        try:
            for path, dims, variable in leaves(module):
                other.parameter(dims, variable.shape, path)
        except ValueError:
            return False
        return True


def on_host(value: Any) -> bool:
    """Whether an array of a program lies in the host's memory."""
    return jax.typeof(value).memory_space == jax.memory.Space.Host


def to_device(tree: Module) -> Module:
    """A module or any tree of arrays, with what lies in the host's memory brought to the device."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device) if on_host(a) else a, tree)


def _inside_shard_map() -> bool:
    context = jax.sharding.get_abstract_mesh()
    return not context.empty and AxisType.Manual in context.axis_types


def leading_dims(x: jax.Array) -> Dims:
    """What the dimensions of x before its features are: batch, then sequence."""
    return ("batch", "sequence", *[None] * x.ndim)[: x.ndim - 1]


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names: None, an axis, or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
