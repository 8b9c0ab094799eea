"""Linear layers cut over tp: by columns (the output features) or by rows (the input features).

Weights are kept `[out, in]`, as PyTorch keeps them: a checkpoint's bytes are then ours, and loading is a copy. The
layers compute on global arrays: what `gather_output` and `input_is_parallel` choose is where the result and the input
lie, never their values. A column layer followed by a row layer costs one reduction.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tbjax.sharding import Dims, Sharding, leading_dims

# The standard deviation that GPT-2 chose for its weights and most families kept.
INITIAL_STD = 0.02

_shapes_only = ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within it parameters are born as zeros: for a model of which nothing but the shapes is wanted.

    Tracing how random numbers are made takes longer than all the rest of tracing a model.
    """
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def as_sharding(mesh: "Mesh | Sharding | None") -> Sharding:
    """The layout that a layer was given: a `Sharding`, a bare mesh, or none (the first device)."""
    if isinstance(mesh, Sharding):
        return mesh
    from tbjax.mesh import make_mesh

    return Sharding(make_mesh((1, 1, 1), jax.devices()[:1]) if mesh is None else make_mesh(mesh))


def parameter(
    key: Any, shape: tuple[int, ...], dims: Dims, dtype: Any, sharding: Sharding, *, fill: float | None = None
):
    """A parameter, born where it lies: normal with `INITIAL_STD`, or filled with a constant."""

    def make(key: jax.Array) -> jax.Array:
        if fill is not None or _shapes_only.get():
            return jnp.full(shape, fill or 0, dtype)
        return (INITIAL_STD * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    if not isinstance(key, jax.core.Tracer):  # built alone, not inside a model that is placed as a whole
        make = jax.jit(make, out_shardings=sharding.parameter(dims, shape))
    return nnx.Param(make(key), dims=dims)


class ColumnParallelLinear(nnx.Module):
    """y = x Wᵀ + b with the output features cut over tp.

    `gather_output` brings the whole output to every tp device; without it the output stays cut, for a
    `RowParallelLinear(input_is_parallel=True)` to take.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: Mesh | Sharding | None = None,
        *,
        use_bias: bool = False,
        gather_output: bool = True,
        features: str = "mlp",
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self.sharding = as_sharding(mesh)
        self.features = features
        self.gather_output = gather_output
        key = jax.random.key(0) if key is None else key
        self.weight = parameter(key, (out_features, in_features), (features, "embed"), dtype, self.sharding)
        self.bias = parameter(key, (out_features,), (features,), dtype, self.sharding, fill=0.0) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.sharding.project(x, self.weight)
        if self.bias is not None:
            y = y + self.sharding.use(self.bias, x.dtype).astype(y.dtype)
        return self.sharding.constrain(y, *leading_dims(y), None if self.gather_output else self.features)


class RowParallelLinear(nnx.Module):
    """y = x Wᵀ + b with the input features cut over tp; the partial products are summed over tp.

    `input_is_parallel` says that x arrives cut, as a `ColumnParallelLinear(gather_output=False)` leaves it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: Mesh | Sharding | None = None,
        *,
        use_bias: bool = False,
        input_is_parallel: bool = False,
        features: str = "mlp",
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self.sharding = as_sharding(mesh)
        self.features = features
        self.input_is_parallel = input_is_parallel
        key = jax.random.key(0) if key is None else key
        self.weight = parameter(key, (out_features, in_features), ("embed", features), dtype, self.sharding)
        self.bias = parameter(key, (out_features,), (None,), dtype, self.sharding, fill=0.0) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.input_is_parallel:
            x = self.sharding.constrain(x, *leading_dims(x), self.features)
        y = self.sharding.project(x, self.weight)
        if self.bias is not None:
            y = y + self.sharding.use(self.bias, x.dtype).astype(y.dtype)
        return self.sharding.residual(y) if y.ndim == 3 else self.sharding.constrain(y, *leading_dims(y), None)
