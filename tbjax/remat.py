"""What the backward pass keeps of each layer's forward pass, and what it computes again.

    none   keeps every intermediate value
    dots   keeps what matmuls with weights gave, and computes what lies between them again
    full   keeps the layer's input alone, and runs the layer again

Between these, what is kept can be named, and can be kept in the host's memory:

    save(attention,mlp)               keeps what stands under these names (`NAMES`), and the layer's input
    offload(dots)                     keeps what `dots` keeps, in the host's memory
    save(up)+offload(layer_input)     both; parts are joined by +
    full:0.5                          half of the layers are run again, the others keep everything

Under no policy is a gathered weight kept: with FSDP that would keep the whole model on every device, so weights are
gathered a second time. A gathered weight is a cast and a relayout of a stored one, and so all casts and relayouts are
among what is computed again; others of them cost next to nothing. Nor are attention's scores ever kept: its backward
pass is its own (`tbjax.layers.blocks`).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

# The policies that have a word of their own.
Policy: TypeAlias = Literal["none", "dots", "full"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# What can be kept by name. The layers mark it with `jax.ad_checkpoint.checkpoint_name`.
NAMES: Mapping[str, str] = {
    "layer_input": "the residual stream that a layer gets",
    "query": "queries, before positions turn them",
    "key": "keys, likewise",
    "value": "values",
    "attended": "the values that attention has summed, before its projection",
    "attention": "what attention adds to the residual stream",
    "gate": "what the activation function gets",
    "up": "what the gate lets through",
    "hidden": "their product, which the MLP's last matmul gets",
    "mlp": "what the MLP or the experts add to the residual stream",
}

# Not a name but a kind: what matmuls with weights gave.
DOTS = "dots"

# With a ratio, the program spells out this many layers at most, of which some are run again; so a ratio is rounded to
# eighths or coarser, and where that is further off than half an eighth (or half a layer) it is refused.
LONGEST_CYCLE = 8
ROUNDING = 1 / 16

# How a weight becomes what a matmul takes, by the names of JAX's primitives.
CASTS_AND_RELAYOUTS = ("convert_element_type", "sharding_constraint", "layout_constraint")

# How a layer's weight becomes a value of its own, where several layers come together (`row_of`).
CUTS = ("slice", "squeeze")

# The parameters by which primitives hold the functions that they call.
CALLED = ("call_jaxpr", "jaxpr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat:
    """A policy. `str` writes it as above and `Remat.parse` reads that; without arguments it is `full`."""

    everything: bool = False  # keep all: "none"
    saved: tuple[str, ...] = ()  # by name, or "dots"
    offloaded: tuple[str, ...] = ()  # likewise, to the host's memory
    ratio: float = 1.0  # of the layers that this is the policy of; the others keep everything

    def __post_init__(self) -> None:
        for name in (*self.saved, *self.offloaded):
            if name not in (DOTS, *NAMES):
                known = ", ".join((DOTS, *NAMES))
                raise ValueError(f"remat={str(self)!r}: nothing is called {name!r}; what has a name is {known}.")
        if twice := {*self.saved} & {*self.offloaded}:
            raise ValueError(f"remat={str(self)!r}: {min(twice)} is to be saved and to be offloaded: choose one.")
        if self.everything and (self.saved or self.offloaded):
            raise ValueError(f"remat={str(self)!r} names what is kept where everything is.")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"remat={str(self)!r}: a share of the layers lies between 0 and 1, not at {self.ratio}.")

    @classmethod
    def parse(cls, text: "str | Remat") -> "Remat":
        """A policy from its text, or as it is."""
        if isinstance(text, Remat):
            return text
        if not isinstance(text, str):
            raise ValueError(f"remat={text!r} is neither text nor a Remat.")
        what, colon, share = text.replace(" ", "").partition(":")
        ratio = 1.0
        if colon:
            try:
                ratio = float(share)
            except ValueError:
                raise ValueError(f"remat={text!r}: {share!r} is no number; 'full:0.5' is of half the layers.") from None
        if what == "none":
            return cls(everything=True, ratio=ratio)
        if what == "full":
            return cls(ratio=ratio)
        kept: dict[str, list[str]] = {"save": [], "offload": []}
        for part in what.split("+"):
            found = re.fullmatch(r"(save|offload)\(([a-z_]+(?:,[a-z_]+)*)\)", part)
            if part == DOTS:
                kept["save"].append(DOTS)
            elif found:
                kept[found[1]] += found[2].split(",")
            else:
                raise ValueError(
                    f"remat={text!r} is unknown: tbjax knows 'none', 'dots', 'full', 'save(NAME,...)' and "
                    "'offload(NAME,...)', joined by +, with ':0.5' behind them for half of the layers."
                )
        return cls(saved=tuple(kept["save"]), offloaded=tuple(kept["offload"]), ratio=ratio)

    def __str__(self) -> str:
        parts = ["none"] if self.everything else []
        parts += [DOTS] if DOTS in self.saved else []
        named = [name for name in self.saved if name != DOTS]
        parts += [f"save({','.join(named)})"] if named else []
        parts += [f"offload({','.join(self.offloaded)})"] if self.offloaded else []
        return "+".join(parts or ["full"]) + (f":{self.ratio:g}" if self.ratio != 1 else "")

    @property
    def word(self) -> Policy | None:
        """The one word that says all of it; None where there is no such word."""
        words: dict[str, Policy] = {"none": "none", "dots": "dots", "full": "full"}
        return words.get(str(self))

    def offloading(self) -> "Remat":
        """The policy that keeps in the host's memory all that this one keeps."""
        if self.everything:
            raise ValueError(
                f"remat={str(self)!r} keeps too much to name, and what is offloaded must have a name: 'dots' and "
                "'full' can be offloaded, and what 'save(...)' names."
            )
        kept = dict.fromkeys((*self.saved, *self.offloaded, "layer_input"))
        return dataclasses.replace(self, saved=(), offloaded=tuple(kept))

    def cycle(self, repeats: int, positions: int) -> tuple["Remat", ...]:
        """The policies of consecutive layers, of which there are `repeats` times `positions`, until they repeat.

        A ratio spreads evenly: of four layers every second is run again for 0.5. A cycle is as many layers as the
        program spells out, so it is a whole number of patterns that divides what there is of them.
        """
        whole = dataclasses.replace(self, ratio=1.0)
        if self.ratio == 1:
            return (whole,) * positions
        lengths = [
            n * positions for n in range(1, repeats + 1) if repeats % n == 0 and n * positions <= LONGEST_CYCLE
        ] or [positions]
        counts = {length: round(self.ratio * length) for length in lengths}
        length = min(lengths, key=lambda n: (round(abs(counts[n] / n - self.ratio), 9), n))
        if abs(counts[length] / length - self.ratio) > max(ROUNDING, 0.5 / (repeats * positions)) + 1e-9:
            near = sorted({count / n for n in lengths for count in range(n + 1)})
            raise ValueError(
                f"remat={str(self)!r}: of {repeats * positions} layers no such share can be run again, as the program "
                f"repeats a cycle of at most {LONGEST_CYCLE} that must divide them; "
                f"{', '.join(f'{n:g}' for n in near)} can."
            )
        again = [(i + 1) * counts[length] // length > i * counts[length] // length for i in range(length)]
        return tuple(whole if one else KEEP_EVERYTHING for one in again)


KEEP_EVERYTHING = Remat(everything=True)


def rematerialised(layer: Callable[Arguments, Result], remat: Remat | str | None) -> Callable[Arguments, Result]:
    """`layer`, with the policy for its backward pass (None where there is no backward pass)."""
    if remat is None:
        return layer
    # Inside a scan XLA cannot merge the second computation with the first, so it need not be prevented from it.
    return jax.checkpoint(layer, policy=_policy(Remat.parse(remat)), prevent_cse=False)


def _policy(remat: Remat) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat.everything:
        return _all_but_casts_and_relayouts
    of_dots = policies.nothing_saveable
    if DOTS in remat.saved:
        of_dots = policies.dots_with_no_batch_dims_saveable
    elif DOTS in remat.offloaded:
        of_dots = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    of_names = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in remat.saved if name != DOTS],
        names_which_can_be_offloaded=[name for name in remat.offloaded if name != DOTS],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def policy(primitive: Any, *values: Any, **parameters: Any) -> Any:
        return (of_names if primitive.name == "name" else of_dots)(primitive, *values, **parameters)

    return policy


def _all_but_casts_and_relayouts(primitive: Any, *_: Any, **parameters: Any) -> bool:
    return not _is_cast_or_relayout(primitive, parameters)


def _is_cast_or_relayout(primitive: Any, parameters: dict[str, Any]) -> bool:
    """Whether a primitive is one of them, or calls nothing else."""
    called = next((parameters[name] for name in CALLED if name in parameters), None)
    if called is None:
        return primitive.name in CASTS_AND_RELAYOUTS
    equations = getattr(called, "jaxpr", called).eqns
    return bool(equations) and all(
        equation.primitive.name in CUTS or _is_cast_or_relayout(equation.primitive, equation.params)
        for equation in equations
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def row_of(stack: jax.Array, row: int) -> jax.Array:
    """A row of a stack of weights: a call of its own, which no policy keeps the result of."""
    return jax.lax.index_in_dim(stack, row, keepdims=False)


def _row_forward(stack: jax.Array, row: int) -> tuple[jax.Array, int]:
    return row_of(stack, row), stack.shape[0]


def _row_backward(row: int, rows: int, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.pad(gradient[None], [(row, rows - 1 - row), *[(0, 0)] * gradient.ndim]),)


row_of.defvjp(_row_forward, _row_backward)
