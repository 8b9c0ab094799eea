"""The feed-forward layer, gated or not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tbjax import native
from tbjax.config import ModelConfig
from tbjax.layers.linear import ColumnParallelLinear, RowParallelLinear
from tbjax.sharding import Sharding

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, config: ModelConfig, sharding: Sharding, *, dtype: Any, key: Any) -> None:
        self.activation = config.activation
        keys = jax.random.split(key, 3)
        column = {"gather_output": False, "use_bias": config.mlp_bias, "dtype": dtype}
        self.up = ColumnParallelLinear(config.embed, config.mlp, sharding, key=keys[0], **column)
        gate = (
            ColumnParallelLinear(config.embed, config.mlp, sharding, key=keys[1], **column)
            if config.gated_mlp
            else None
        )
        self.gate = gate
        self.down = RowParallelLinear(
            config.mlp,
            config.embed,
            sharding,
            use_bias=config.mlp_bias,
            input_is_parallel=True,
            dtype=dtype,
            key=keys[2],
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        gate = None if self.gate is None else checkpoint_name(self.gate(x), "gate")
        up = checkpoint_name(self.up(x), "up")
        hidden = activation(native.wide(up if gate is None else gate))
        if gate is not None:
            hidden = hidden * native.wide(up)
        return self.down(checkpoint_name(hidden.astype(up.dtype), "hidden"))
