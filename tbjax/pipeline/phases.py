"""A layer's computation taken apart: forward, gradient of the input, gradient of the weights.

JAX gives a layer's backward pass as one function. A pipeline wants it in parts that run at different times, with as
little as possible kept in between:

    forward    the layer's output, and what `remat` says is kept of the way there
    backward   from what was kept: the gradient of the layer's input (what the stage before waits for), whatever comes
               out on the way, and the pairs from which the rest follows
    weights    the gradients of the weights, from pairs, and from what was kept and is needed twice

Nothing is computed in two of the parts except by the remat policy, so splitting the backward costs no arithmetic. It is
done on the traced program, a list of equations, and so works for any layer: equations of the backward pass that the
input's gradient needs cannot wait; of the others the matmuls wait, with all that follows from them. What else there is
(the gradients of norms' scales, of biases) is small and follows from large arrays, which need then not be kept. The
pairs are the operands of the matmuls that wait: for a weight, its input and the gradient of its output. Where what was
kept stays until the weights' gradients are made, what is kept anyway is no pair, and the gradient of the layer's output
takes the place of its input, which is of the same shape and has been used by then.

What follows from the weights and the surroundings alone (a gathered or cast weight, a mask) is never kept, and made
again in every part that needs it: with FSDP, keeping gathered weights would keep the whole model on every device.

Experts run inside a `shard_map`, one equation with both gradients in it: theirs do not wait.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from tbjax.remat import CASTS_AND_RELAYOUTS, Policy

# Calls that are only a way of writing: their equations take their place.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}

# What is worth putting off.
_MATMULS = ("dot_general", "ragged_dot", "ragged_dot_general")

Gradients = dict[int, jax.Array]  # by the weight's place among the leaves


@dataclasses.dataclass(frozen=True)
class Phases:
    """The parts of a layer `layer(weights, surroundings, x) -> y`, for arguments of one shape.

    `kept` and `pairs` are the shapes of what goes from forward to backward and from backward to weights; `places` says
    of each pair which of those kept it may take the place of, or None.
    """

    forward: Callable[[Any, Any, Any], tuple[Any, tuple[jax.Array, ...]]]  # weights, surroundings, x -> y, kept
    # weights, surroundings, kept, gradient of y -> gradient of x, gradients of weights so far, pairs
    backward: Callable[[Any, Any, Sequence[jax.Array], Any], tuple[Any, Gradients, tuple[jax.Array, ...]]]
    # weights, surroundings, kept, pairs -> the others
    weights: Callable[[Any, Any, Sequence[jax.Array], Sequence[jax.Array]], Gradients]
    kept: tuple[jax.ShapeDtypeStruct, ...]
    pairs: tuple[jax.ShapeDtypeStruct, ...]
    places: tuple[int | None, ...]


def take_apart(
    layer: Callable[[Any, Any, Any], Any],
    weights: Any,
    surroundings: Any,
    x: Any,
    *,
    remat: Policy,
    split: bool,
    stays: bool,
) -> Phases:
    """The phases of `layer`; without `split` no gradient waits. Arguments are arrays or their shapes.

    `stays` says that what is kept for the backward is still there, in a place of its own, when the weights' turn comes.
    """

    def whole(weights: Any, surroundings: Any, x: Any, of_y: Any) -> Any:
        y, pull = jax.vjp(lambda weights, x: layer(weights, surroundings, x), weights, x)
        of_weights, of_x = pull(of_y)
        return y, of_x, of_weights

    y = jax.eval_shape(layer, weights, surroundings, x)
    jaxpr, consts = _flat(*_opened(jax.make_jaxpr(whole)(weights, surroundings, x, y)))
    standing, into, above = _cut(jaxpr.invars, len(jax.tree.leaves((weights, surroundings))), len(jax.tree.leaves(x)))
    out, of_x, of_weights = _cut(jaxpr.outvars, len(jax.tree.leaves(y)), len(jax.tree.leaves(x)))
    y_tree, x_tree = jax.tree.structure(y), jax.tree.structure(x)

    constants = dict(zip(jaxpr.constvars, consts, strict=True))
    steps = _Steps(jaxpr.eqns)
    given = {*standing, *constants}
    fixed = given | steps.following_from(given)  # never kept
    # Only what lies on the way to y: what a layer's own backward rule computes again is not to be kept either.
    way = [jaxpr.eqns[e] for e in steps.reach(out, given | {*into})[0]]
    keepable = {*into, *(v for e in way if _is_kept(e, remat) for v in e.outvars if v not in fixed)}

    gradients = dict(enumerate(of_weights))
    needed, kept = steps.reach([*of_x, *of_weights], given | keepable | {*above})
    kept = [v for v in kept if v in keepable]
    waiting = _waiting(jaxpr.eqns, needed, steps, of_x, given | keepable | {*above}) if split else set()
    put_off = {v for e in waiting for v in jaxpr.eqns[e].outvars}
    early = {i: v for i, v in gradients.items() if v not in put_off}
    later = {i: v for i, v in gradients.items() if v in put_off}
    ready = {v for e in jaxpr.eqns for v in e.outvars if v not in put_off and v not in fixed} | {*into, *above}
    if stays:  # what only lies otherwise than something that is kept is laid so again
        ready -= {v for v in ready if v not in kept and steps.root(v) in kept}
    last, read = steps.reach(later.values(), given | ready)
    twice = {v for v in read if v in kept} if stays else set()
    pairs = [v for v in read if v in ready and v not in twice]
    # An input and the gradient that stands in its place lie alike, being parts of one kind of payload.
    free = {above[i]: kept.index(v) for i, v in enumerate(into) if v in kept and v not in twice and i < len(above)}
    places = [free.get(steps.root(v)) if stays else None for v in pairs]
    places = [place if place not in places[:i] else None for i, place in enumerate(places)]
    first, _ = steps.reach([*of_x, *early.values(), *pairs], given | {*kept, *above})
    ahead, _ = steps.reach([*out, *kept], given | {*into})

    def run(numbers: Iterable[int], wanted: Iterable[Any], *bound: tuple[Sequence[Var], Any]) -> list[jax.Array]:
        environment = dict(constants)
        for variables, values in bound:
            environment |= zip(variables, jax.tree.leaves(values), strict=True)
        _evaluate([jaxpr.eqns[e] for e in numbers], environment)
        return [_read(environment, v) for v in wanted]

    def forward(weights: Any, surroundings: Any, x: Any) -> Any:
        values = run(ahead, [*out, *kept], (standing, (weights, surroundings)), (into, x))
        return jax.tree.unflatten(y_tree, values[: len(out)]), tuple(values[len(out) :])

    def backward(weights: Any, surroundings: Any, kept_values: Any, of_y: Any) -> Any:
        bound = (standing, (weights, surroundings)), (kept, kept_values), (above, of_y)
        values = run(first, [*of_x, *early.values(), *pairs], *bound)
        x_values, found, pair_values = _cut(values, len(of_x), len(early))
        return jax.tree.unflatten(x_tree, x_values), dict(zip(early, found, strict=True)), tuple(pair_values)

    def of_the_weights(weights: Any, surroundings: Any, kept_values: Any, pair_values: Any) -> Gradients:
        bound = (standing, (weights, surroundings)), (kept, kept_values), (pairs, pair_values)
        return dict(zip(later, run(last, later.values(), *bound), strict=True))

    return Phases(forward, backward, of_the_weights, _shapes(kept), _shapes(pairs), tuple(places))


class _Steps:
    """The equations of a program, and who makes what."""

    def __init__(self, equations: Sequence[JaxprEqn]) -> None:
        self.equations = equations
        self.number = {v: i for i, equation in enumerate(equations) for v in equation.outvars}

    def following_from(self, given: Iterable[Var]) -> set[Var]:
        """All that is made from `given` alone, or from nothing."""
        known = {*given}
        for equation in self.equations:
            if all(v in known for v in _inputs(equation)):
                known.update(equation.outvars)
        return known

    def root(self, variable: Any) -> Any:
        """What a variable is but another layout of."""
        while (number := self.number.get(variable)) is not None:
            equation = self.equations[number]
            source = equation.invars[0] if len(equation.invars) == 1 else None
            alike = isinstance(source, Var) and _shapes([source]) == _shapes([variable])
            if equation.primitive.name not in (*CASTS_AND_RELAYOUTS, "name") or not alike:
                break
            variable = source
        return variable

    def reach(self, wanted: Iterable[Any], given: set[Var]) -> tuple[list[int], list[Var]]:
        """The equations that make `wanted` from `given`, in order, and what of `given` they (or you) read."""
        numbers: set[int] = set()
        read: dict[Var, None] = {}
        open_ = [v for v in wanted if not isinstance(v, Literal)]
        while open_:
            variable = open_.pop()
            if variable in given:
                read[variable] = None
            elif (number := self.number[variable]) not in numbers:
                numbers.add(number)
                open_ += _inputs(self.equations[number])
        return sorted(numbers), list(read)


def _waiting(
    equations: Sequence[JaxprEqn], needed: Iterable[int], steps: _Steps, of_x: Sequence[Any], given: set[Var]
) -> set[int]:
    """The matmuls among the `needed` equations that the input's gradient does not need, and what follows from them."""
    urgent = {*steps.reach(of_x, given)[0]}
    waiting: set[int] = set()
    waits: set[Var] = set()
    for number in needed:
        equation = equations[number]
        if number not in urgent and (equation.primitive.name in _MATMULS or any(v in waits for v in _inputs(equation))):
            waiting.add(number)
            waits.update(equation.outvars)
    return waiting


def _is_kept(maker: JaxprEqn, remat: Policy) -> bool:
    match remat:
        case "full":
            return False
        case "dots":
            return maker.primitive.name == "dot_general" and not maker.params["dimension_numbers"][1][0]
        case "none":
            return maker.primitive.name not in CASTS_AND_RELAYOUTS
    raise ValueError(f"remat={remat!r} is unknown: tbjax knows 'none', 'dots', 'full'.")


def _opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A traced program and the values of its constants. In JAX 0.10 one that has them is a `ClosedJaxpr` around a
    `Jaxpr`; in 0.12 there is one class, whose `jaxpr` is itself."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def _flat(jaxpr: Jaxpr, consts: Sequence[Any]) -> tuple[Jaxpr, Sequence[Any]]:
    """The program with the equations of calls in the place of the calls."""

    def run(*values: Any) -> list[Any]:
        environment = dict(zip(jaxpr.invars, values, strict=True))
        environment |= zip(jaxpr.constvars, consts, strict=True)
        _evaluate(jaxpr.eqns, environment, inline=True)
        return [_read(environment, v) for v in jaxpr.outvars]

    return _opened(jax.make_jaxpr(run)(*_shapes(jaxpr.invars)))


def _evaluate(equations: Iterable[JaxprEqn], environment: dict[Any, Any], *, inline: bool = False) -> None:
    """Run `equations`, reading from `environment` and writing to it."""
    for equation in equations:
        values = [_read(environment, v) for v in equation.invars]
        called = _CALLS.get(equation.primitive.name) if inline else None
        if called is not None:
            jaxpr, consts = _opened(equation.params[called])
            inside = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
            _evaluate(jaxpr.eqns, inside, inline=True)
            results = [_read(inside, v) for v in jaxpr.outvars]
        else:
            bound = equation.primitive.get_bind_params(equation.params)
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # as JAX up to 0.9, and since
            with equation.ctx.manager:
                results = equation.primitive.bind(*functions, *values, **parameters)
            results = results if equation.primitive.multiple_results else [results]
        environment.update(zip(equation.outvars, results, strict=True))


def _read(environment: Mapping[Any, Any], variable: Any) -> Any:
    return variable.val if isinstance(variable, Literal) else environment[variable]


def _inputs(equation: JaxprEqn) -> Iterator[Any]:
    return (v for v in equation.invars if not isinstance(v, Literal))


def _shapes(variables: Iterable[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables)


def _cut(values: Sequence[Any], *lengths: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    first, second = lengths
    return values[:first], values[first : first + second], values[first + second :]
