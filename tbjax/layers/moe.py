"""A mixture of experts without dropped tokens: route, sort by expert, one ragged matmul, unsort.

The router is ordinary array code. The experts run per device (`shard_map`), since a sort of tokens must stay local:
over `ep` each device holds some of the experts, gathers the tokens of its ep peers, computes the part that its experts
contribute, and scatters the sums back. Over tp each expert's features are cut as in a dense MLP; both reductions come
last, together.

T tokens on a device, E experts, k experts per token, D embed, F width of an expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tbjax.config import ModelConfig
from tbjax.layers.linear import parameter
from tbjax.layers.mlp import ACTIVATIONS
from tbjax.quantize.weight import Parts, QuantizedWeight, ragged_matmul
from tbjax.sharding import Sharding


class RouterLoad(NamedTuple):
    """Sums over the tokens of one layer, from which the auxiliary loss is made."""

    assignments: jax.Array  # [E] how many times each expert was chosen
    probabilities: jax.Array  # [E] the router's probabilities
    tokens: jax.Array  # how many tokens


class Router(nnx.Module):
    """A softmax over all experts, then the best k of them."""

    def __init__(self, config: ModelConfig, sharding: Sharding, *, dtype: Any, key: Any) -> None:
        self.moe = config.experts
        self.sharding = sharding
        self.weight = parameter(key, (self.moe.experts, config.embed), (None, "embed"), dtype, sharding)

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, RouterLoad]:
        """Weights and experts of each token, [B, S, k] both, and the load that they make."""
        scores = self.sharding.project(x, self.weight).astype(jnp.float32)
        probabilities = jax.nn.softmax(self.sharding.constrain(scores, "batch", "sequence", None), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.moe.experts_per_token)
        if self.moe.normalize_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        counted = valid[..., None].astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(experts, self.moe.experts, dtype=jnp.float32), axis=2)
        load = RouterLoad(
            jnp.sum(chosen * counted, axis=(0, 1)), jnp.sum(probabilities * counted, axis=(0, 1)), jnp.sum(counted)
        )
        return weights, experts, load


class MixtureOfExperts(nnx.Module):
    """Each token's chosen experts, weighted and summed. Their weights lie [E, in, out], as ragged matmuls take them."""

    def __init__(self, config: ModelConfig, sharding: Sharding, *, dtype: Any, key: Any) -> None:
        self.sharding = sharding
        self.activation = config.activation
        e, d, f = config.experts.experts, config.embed, config.experts.mlp
        keys = jax.random.split(key, 4)
        inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.router = Router(config, sharding, dtype=dtype, key=keys[0])
        self.gate = parameter(keys[1], (e, d, f), inwards, dtype, sharding)
        self.up = parameter(keys[2], (e, d, f), inwards, dtype, sharding)
        self.down = parameter(keys[3], (e, f, d), outwards, dtype, sharding)

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, RouterLoad]:
        weights, experts, load = self.router(x, valid)
        gate, up, down = (self._used(w, x.dtype) for w in (self.gate, self.up, self.down))
        operands = (x, weights.astype(x.dtype), experts, gate, up, down)
        if self.sharding.mesh.size == 1:
            return self._experts(*operands, ep=None, gathers=False), load
        tokens = self.sharding.activation(("batch", "sequence", None), x.shape)
        inwards, outwards = PartitionSpec("ep", None, "tp"), PartitionSpec("ep", "tp", None)
        specs = *(_specs(inwards, w) for w in (gate, up)), _specs(outwards, down)
        gathers = "ep" in jax.tree.leaves(tuple(tokens))
        run = self.sharding.per_device(
            lambda *args: self._experts(*args, ep="ep", gathers=gathers),
            in_specs=(tokens, tokens, tokens, *specs),
            out_specs=tokens,
        )
        return self.sharding.residual(run(*operands)), load

    def _used(self, weight: Any, dtype: Any) -> Any:
        """The weight as it is used, or its parts if it is quantised."""
        if isinstance(weight, QuantizedWeight):
            return self.sharding.parts(weight)
        return self.sharding.use(weight, dtype)

    def _experts(self, x, weights, experts, gate, up, down, *, ep: str | None, gathers: bool) -> jax.Array:
        """What the experts of this device make of its tokens (and, over ep, of its peers')."""
        # Cast here: what is cut out of this function for a device has its gradient summed over the others as it came.
        gate, up, down = (a if isinstance(a, Parts) else a.astype(x.dtype) for a in (gate, up, down))
        local_shape = x.shape
        x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
        held, first = jax.tree.leaves(gate)[0].shape[0], 0
        if ep is not None:
            first = jax.lax.axis_index(ep) * held
            if gathers:
                x, weights, experts = (jax.lax.all_gather(a, ep, tiled=True) for a in (x, weights, experts))
        chosen = weights.shape[1]
        # Assignments to experts that are not held here sort behind all others, where the ragged matmul does not reach.
        expert = experts.reshape(-1) - first
        expert = jnp.where((expert >= 0) & (expert < held), expert, held)
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=held + 1)[:held].astype(jnp.int32)
        rows = x[order // chosen]
        activation = ACTIVATIONS[self.activation]

        def product(rows: jax.Array, weight: Any) -> jax.Array:
            if isinstance(weight, Parts):
                return ragged_matmul(rows, weight, sizes, expert[order])
            return jax.lax.ragged_dot(rows, weight, sizes)

        rows = product(activation(product(rows, gate)) * product(rows, up), down)
        rows = jnp.where((expert[order] < held)[:, None], rows * weights.reshape(-1)[order][:, None], 0)
        out = jnp.sum(rows[jnp.argsort(order)].reshape(-1, chosen, x.shape[-1]), axis=1)
        if ep is not None:
            out = jax.lax.psum(out, "tp")
            out = jax.lax.psum_scatter(out, ep, tiled=True) if gathers else jax.lax.psum(out, ep)
        return out.reshape(local_shape)


def _specs(spec: PartitionSpec, weight: Any) -> Any:
    """Where a weight [E, in, out] lies that is cut as `spec` says, or its parts; one scale is of all inputs."""
    if not isinstance(weight, Parts):
        return spec
    frame = PartitionSpec(spec[0], None if weight.offset is None else spec[1], spec[2])
    return Parts(spec, frame, None if weight.offset is None else frame)
