"""Applying the optimizer: to all parameters at once, or layer by layer.

Layer by layer means a loop over the rows of each stack: a row of the gradients, of the parameters and of the state is
taken, updated and written back where it was. What the update needs in between is then one layer's, and state that lies
in the host's memory comes to the device a layer at a time. The parameters of no layer (embedding, head, last norm) are
one further part, taken whole.

The stacks are carried by the loop and not scanned over: what is carried is written where it lies, while what goes in
row by row and comes out row by row stands in memory twice.

What of an optimizer's state belongs to no parameter (a counter) is the same for all parts: each part gets it as it was
before the step, and what the parts make of it is the same.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax.experimental.xla_metadata import set_xla_metadata

from tbjax.model import Decoder
from tbjax.sharding import Dims, Leaf, leaves, on_host, to_device
from tbjax.training.optimizer import Layerwise, OnlyLayerwise, Parameters, place_state

# What can lie in the host's memory between its uses.
Offloaded: TypeAlias = Literal["optimizer", "parameters", "activations"]

Result = TypeVar("Result")


class Update(NamedTuple):
    """What an update works on."""

    optimizer: optax.GradientTransformation
    model: Decoder  # whose parameters these are, for where they lie
    gradient_norm: jax.Array
    finite: jax.Array | None  # where False, everything stays as it is; None: not asked


def check_offload(offload: Iterable[str], optimizer: optax.GradientTransformation) -> None:
    """Raise for what cannot be offloaded."""
    for name in offload:
        if name not in get_args(Offloaded):
            raise ValueError(f"offload={name!r} is unknown: tbjax knows {', '.join(map(repr, get_args(Offloaded)))}.")
    if {*offload} & {"optimizer", "parameters"} and not isinstance(optimizer, Layerwise):
        raise ValueError(
            f"offload={tuple(offload)}: what lies in the host's memory is updated layer by layer, and this optimizer "
            "does not promise to treat layers apart. adamw, lion, sgd and muon of make_optimizer do; "
            "tbjax.training.Layerwise(*transformation) says so of one of your own."
        )


def apply(update: Update, gradients: Parameters, state: Any, values: Parameters, *, layerwise: bool) -> Any:
    """The next values and state. All are by path; gradients lie where the optimizer works."""
    if layerwise or isinstance(update.optimizer, OnlyLayerwise):
        return _by_layers(update, gradients, state, values)
    strategy = update.model.sharding.strategy
    # The optimizer works where its state lies, on the parts of the parameters that belong there.
    values_there = lay(values, update.model, strategy.cuts_optimizer)
    updates, found = _updates(update, gradients, state, values_there)
    found = _lay_state(found, update.model)
    result = lay(optax.apply_updates(values_there, updates), update.model, strategy.cuts_parameters)
    return _unless_finite(update, values, result), _unless_finite(update, state, found)


def lay(values: Any, model: Decoder, cut: bool) -> Parameters:
    """Values by path, constrained to lie like the parameters that they belong to, cut over the data axes or not."""
    sharding = model.sharding
    if sharding.mesh.size == 1:
        return values
    return {
        leaf.path: values[leaf.path]
        if on_host(values[leaf.path])  # where it was put, and to be taken from there row by row
        else sharding.constrain_parameter(values[leaf.path], leaf, cut=cut)
        for leaf in leaves(model)
        if leaf.path in values
    }


def norm_of(gradients: Parameters, model: Decoder) -> jax.Array:
    """The norm of all gradients together, of those in the host's memory row by row."""
    here = {path: value for path, value in gradients.items() if not on_host(value)}
    if len(here) == len(gradients):
        return optax.tree.norm(gradients)
    found = {leaf.path: leaf for leaf in leaves(model) if leaf.path in gradients and leaf.path not in here}
    ways, total = _Rows(model.sharding.size("pp")), jnp.square(optax.tree.norm(here))

    def squares(values: Any) -> jax.Array:
        return sum((jnp.sum(jnp.square(a.astype(jnp.float32))) for a in to_device(values).values()), jnp.float32(0))

    for rows, part in _parts(found):
        own = _only(part, gradients)
        if rows is None:
            total += squares(own)
            continue

        def add(row: jax.Array, total: jax.Array, own: Parameters = own) -> jax.Array:
            return total + squares({path: ways.pick(value, row) for path, value in own.items()})

        total = jax.lax.fori_loop(0, rows // ways.stages, add, total)
    return jnp.sqrt(total)


def added(totals: Parameters, gradients: Parameters, model: Decoder) -> Parameters:
    """The sums of gradients with more of them added, those in the host's memory row by row."""
    result = {path: a + gradients[path].astype(a.dtype) for path, a in totals.items() if not on_host(a)}
    found = {leaf.path: leaf for leaf in leaves(model) if leaf.path in totals and leaf.path not in result}
    ways = _Rows(model.sharding.size("pp"))

    def sums(a: Parameters, b: Parameters) -> Parameters:
        return {path: _to_host(total + to_device(b[path])) for path, total in to_device(a).items()}

    for rows, part in _parts(found):
        begun, more = _only(part, totals), _only(part, gradients)
        if rows is None:
            result |= sums(begun, more)
            continue

        def add(row: jax.Array, stacks: Parameters, more: Parameters = more) -> Parameters:
            picked = ({path: ways.pick(a, row) for path, a in tree.items()} for tree in (stacks, more))
            return {path: ways.put(stacks[path], row, total) for path, total in sums(*picked).items()}

        result |= jax.lax.fori_loop(0, rows // ways.stages, add, begun)
    return result


def _updates(update: Update, gradients: Parameters, state: Any, values: Parameters) -> Any:
    optimizer = optax.with_extra_args_support(update.optimizer)
    # In the parameters' dtype, whatever they were summed in.
    gradients = jax.tree.map(lambda gradient, value: gradient.astype(value.dtype), gradients, values)
    return optimizer.update(gradients, state, values, gradient_norm=update.gradient_norm)


def _unless_finite(update: Update, old: Any, new: Any) -> Any:
    finite = update.finite
    return new if finite is None else jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)


def _lay_state(state: Any, model: Decoder) -> Any:
    """The optimizer's state, constrained to lie where it lay; the host's memory is where it was put."""
    if model.sharding.mesh.size == 1:
        return state
    placed = place_state(state, model, model.sharding)
    return jax.tree.map(
        lambda a, b: a if on_host(a) else jax.lax.with_sharding_constraint(a, b.sharding), state, placed
    )


# Layer by layer.


class _State(NamedTuple):
    """An optimizer's state taken apart: the dicts by path in it, and what lies between them."""

    own: list[Parameters]
    common: list[Any]
    join: Callable[["_State"], Any]


def _by_layers(update: Update, gradients: Parameters, state: Any, values: Parameters) -> Any:
    found = {leaf.path: leaf for leaf in leaves(update.model) if leaf.path in values}
    taken = _take_apart(state, found)
    own, common = taken.own, taken.common
    for rows, part in _parts(found):
        there = _only(part, values), [_only(part, tree) for tree in own]
        if rows is None:
            values_now, own_now, common = _step(update, part, gradients, *there, taken, None)
        else:
            values_now, own_now, common = _loop(update, part, gradients, *there, taken, rows)
        values = {**values, **values_now}
        own = [{**before, **now} for before, now in zip(own, own_now, strict=True)]
    # What a loop carries lies where the compiler finds best, so it is said again where it is to lie.
    values = lay(values, update.model, update.model.sharding.strategy.cuts_parameters)
    return values, _lay_state(taken.join(taken._replace(own=own, common=common)), update.model)


def _parts(found: Mapping[str, Leaf]) -> list[tuple[int | None, dict[str, Leaf]]]:
    """The parameters that are updated together: those of each stack, with its rows, and those of none."""
    parts: dict[Any, dict[str, Leaf]] = {}
    for path, leaf in found.items():
        group = ".".join(path.split(".")[:2]) if "layers" in leaf.dims else None
        parts.setdefault(group, {})[path] = leaf
    return [
        (None if group is None else next(iter(part.values())).variable.shape[0], part) for group, part in parts.items()
    ]


class _Rows(NamedTuple):
    """How a stack is gone through: one row of it at a time, or with pp one of every stage's."""

    stages: int

    def pick(self, stack: jax.Array, row: Any) -> jax.Array:
        if self.stages == 1:
            return jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)
        return jax.lax.dynamic_index_in_dim(self._by_stage(stack), row, 1, keepdims=False)

    def put(self, stack: jax.Array, row: Any, value: jax.Array) -> jax.Array:
        if self.stages == 1:
            return jax.lax.dynamic_update_index_in_dim(stack, value, row, 0)
        return jax.lax.dynamic_update_index_in_dim(self._by_stage(stack), value, row, 1).reshape(stack.shape)

    def _by_stage(self, stack: jax.Array) -> jax.Array:
        return stack.reshape(self.stages, -1, *stack.shape[1:])


def _loop(
    update: Update,
    part: Mapping[str, Leaf],
    gradients: Parameters,
    values: Parameters,
    own: list[Parameters],
    state: _State,
    rows: int,
) -> Any:
    """The update of a stack, row by row."""

    def body(row: jax.Array, carry: Any) -> Any:
        values, own, _ = carry
        *new, common = _step(update, part, gradients, values, own, state, row)
        return (*jax.tree.map(lambda a, b: ways.put(a, row, b), (values, own), tuple(new)), common)

    ways = _Rows(update.model.sharding.size("pp"))
    return jax.lax.fori_loop(0, rows // ways.stages, body, (values, own, state.common))


def _step(
    update: Update,
    part: Mapping[str, Leaf],
    gradients: Parameters,
    values: Parameters,
    own: list[Parameters],
    state: _State,
    row: jax.Array | None,
) -> tuple[Parameters, list[Parameters], list[Any]]:
    """One row of a stack, or what belongs to no stack: its values, state, and the state that is common to all."""
    ways = _Rows(update.model.sharding.size("pp"))
    pick = lambda a: a if row is None else ways.pick(a, row)  # noqa: E731
    hosted = jax.tree.map(on_host, (values, own))
    old = to_device(jax.tree.map(pick, (values, own)))
    old_gradients = {path: to_device(pick(gradients[path])) for path in part}
    step = _called(partial(_updated, update, part, state), update.model)
    new, common = step(old, old_gradients)
    return *jax.tree.map(lambda a, host: _to_host(a) if host else a, new, hosted), common


def _updated(
    update: Update,
    part: Mapping[str, Leaf],
    state: _State,
    old: tuple[Parameters, list[Parameters]],
    gradients: Parameters,
) -> tuple[tuple[Parameters, list[Parameters]], list[Any]]:
    """New values and state of old ones, and the state that is common to all."""
    strategy = update.model.sharding.strategy

    def there(tree: Parameters, cut: bool) -> Parameters:
        return {
            path: jax.tree.map(lambda a, path=path: _lay_row(a, part[path], update.model, cut), value)
            for path, value in tree.items()
        }

    values_there, gradients_there = (there(tree, strategy.cuts_optimizer) for tree in (old[0], gradients))
    before = state.join(state._replace(own=[there(tree, strategy.cuts_optimizer) for tree in old[1]]))
    updates, after = _updates(update, gradients_there, before, values_there)
    after = _take_apart(after, part)
    values: Any = optax.apply_updates(values_there, updates)
    new = there(values, strategy.cuts_parameters), [there(tree, strategy.cuts_optimizer) for tree in after.own]
    return _unless_finite(update, old, new), _unless_finite(update, state.common, after.common)


def _called(function: Callable[..., Result], model: Decoder) -> Callable[..., Result]:
    """`function`, on CPUs as a call of its own that takes rows and gives rows.

    On CPUs, XLA computes each result in a loop of its own, and would take the rows out of the stacks anew in each. As
    it does not see that all of those come before the rows are written back, it would copy the whole stacks first, for
    every row.
    """
    if model.sharding.platform != "cpu":
        return function

    def call(*operands: Any) -> Result:
        return cast(Result, set_xla_metadata(jax.jit(function)(*operands), inlineable="false"))

    return call


def _lay_row(value: jax.Array, leaf: Leaf, model: Decoder, cut: bool) -> jax.Array:
    """What belongs to a parameter, all of it or a row, constrained to lie like that."""
    if model.sharding.mesh.size == 1:
        return value
    dims: Dims = leaf.dims[len(leaf.dims) - value.ndim :]
    if value.shape[-1:] != leaf.variable.shape[-1:] or len(dims) != value.ndim:
        return value  # a figure about the parameter: where it lies is the compiler's to say
    return jax.lax.with_sharding_constraint(value, model.sharding.parameter(dims, value.shape, leaf.path, cut=cut))


def _take_apart(state: Any, paths: Iterable[str]) -> _State:
    known = {*paths}

    def is_by_path(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and {*node} <= known

    nodes, tree = jax.tree.flatten(state, is_leaf=is_by_path)
    places = [is_by_path(node) for node in nodes]

    def join(state: _State) -> Any:
        own, common = iter(state.own), iter(state.common)
        return jax.tree.unflatten(tree, [next(own if place else common) for place in places])

    own = [node for node, place in zip(nodes, places, strict=True) if place]
    return _State(own, [node for node, place in zip(nodes, places, strict=True) if not place], join)


def _only(part: Mapping[str, Leaf], values: Mapping[str, Any]) -> Parameters:
    return {path: values[path] for path in part if path in values}


# The host's memory.


def _to_host(value: jax.Array) -> jax.Array:
    return jax.device_put(value, jax.memory.Space.Host)
