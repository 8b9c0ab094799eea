"""GPipe as one writes it in an afternoon: a scan over ticks that JAX differentiates as a whole.

It does the same work as the executor's GPipe: layers are run again in the backward pass, and a stage that has nothing
to do in a tick does nothing. What a scan keeps from forward to backward it keeps of every tick, so its memory grows
with the microbatches whatever the schedule; there is no other schedule, since JAX decides what runs backward when.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tbjax.model import Decoder
from tbjax.pipeline.stages import specs
from tbjax.training import Batch
from tbjax.training.loss import cross_entropy


def loss_and_gradients(model: Decoder, batch: Batch, microbatches: int) -> tuple[jax.Array, Decoder]:
    """The mean loss of a batch's targets, and its gradient."""
    stages = model.sharding.size("pp")
    parts = jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch)

    def on_stage(index: jax.Array, model: Decoder, parts: Batch) -> jax.Array:
        stage = index[0]
        around = model.surroundings(parts.tokens[0])

        @jax.checkpoint
        def layer(x: jax.Array, blocks: Any) -> jax.Array:
            return model.repeat(0, blocks, x, around)[0]

        def piece(x: jax.Array, tokens: jax.Array) -> jax.Array:
            x = jax.lax.cond(stage == 0, lambda x: model.start(tokens), lambda x: x, x)
            return jax.lax.scan(lambda x, blocks: (layer(x, blocks), None), x, list(model.stacks[0]))[0]

        def end(x: jax.Array, targets: jax.Array) -> jax.Array:
            return cross_entropy(model, model.final_norm(x), targets) / batch.targets.size

        def tick(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> Any:
            x, total = carry
            microbatch = number - stage
            part = jax.tree.map(lambda a: a[jnp.clip(microbatch, 0, microbatches - 1)], parts)
            works = (microbatch >= 0) & (microbatch < microbatches)
            x = jax.lax.cond(works, lambda x: piece(x, part.tokens), lambda x: x, x)
            total += jax.lax.cond(
                works & (stage == stages - 1), lambda x: end(x, part.targets), lambda x: jnp.float32(0), x
            )
            return (jax.lax.ppermute(x, "pp", [(s, s + 1) for s in range(stages - 1)]), total), None

        nothing = jnp.zeros((*parts.tokens.shape[1:], model.config.embed), model.dtype)
        ticks = jnp.arange(microbatches + stages - 1)
        (_, total), _ = jax.lax.scan(tick, (nothing, jnp.float32(0)), ticks)
        return jax.lax.psum(total, "pp")

    def loss(model: Decoder) -> jax.Array:
        shard_map: Any = jax.shard_map
        return shard_map(
            on_stage,
            mesh=model.sharding.mesh,
            axis_names={"pp"},
            in_specs=(PartitionSpec("pp"), specs(model), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(jnp.arange(stages), model, parts)

    return jax.value_and_grad(loss)(model)
