"""Rotary positions: a table of angles per position, and the turn of each pair of features by its angle.

Feature i of the rotated part is paired with feature i + half, the layout of all Hugging Face decoders. Angles, cosines
and sines are float32 whatever the precision of the model. Two kinds depend on how long the sequence is (`dynamic`
stretches its base, `longrope` changes its factors): the length is the row's own, so that no row depends on another.
Keys in a cache keep the turn of the length at which they were written. Of documents packed in a row, each counts its
own positions and has its own length.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tbjax.config import Rope


def angles(
    rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, [B, S, rotated/2] each, for integer positions [B, S].

    `lengths` [B, S] are those of each token's document; by default a row is one document.
    """
    if lengths is None:
        turns = jnp.expand_dims(frequencies(rope, head_dim, jnp.max(positions, axis=1) + 1), -2)
    else:
        turns = frequencies(rope, head_dim, lengths)
    theta = positions.astype(jnp.float32)[..., None] * turns
    return jnp.cos(theta) * rope.attention_factor, jnp.sin(theta) * rope.attention_factor


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turns the leading features of each head of x [B, S, H, N]; what is beyond the table passes."""
    half = cosines.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    cosines, sines = cosines[:, :, None].astype(x.dtype), sines[:, :, None].astype(x.dtype)
    return jnp.concatenate((first * cosines - second * sines, second * cosines + first * sines, rest), axis=-1)


def frequencies(rope: Rope, head_dim: int, lengths: jax.Array) -> jax.Array:
    """Radians per position of each pair of features: [rotated/2], or [..., rotated/2] where `lengths` [...] matter."""
    rotated = int(head_dim * rope.fraction)
    exponents = np.arange(0, rotated, 2) / rotated
    plain = rope.theta**-exponents
    match rope.kind:
        case "default":
            result = plain
        case "linear":
            result = plain / rope.factor
        case "llama3":
            result = _llama3(rope, plain)
        case "yarn":
            result = _yarn(rope, plain, rotated)
        case "dynamic":
            stretch = jnp.maximum(lengths, rope.original_positions) / rope.original_positions
            growth = (rope.factor * stretch - (rope.factor - 1)) ** (rotated / (rotated - 2))
            return (rope.theta * growth)[..., None] ** -jnp.asarray(exponents, jnp.float32)
        case "longrope":
            short, long = (plain / np.asarray(factors) for factors in (rope.short_factors, rope.long_factors))
            return jnp.where((lengths > rope.original_positions)[..., None], jnp.float32(long), jnp.float32(short))
    return jnp.asarray(result, jnp.float32)


def depends_on_length(rope: Rope | None) -> bool:
    """Whether the angles of a position differ with the length of its document."""
    return rope is not None and rope.kind in ("dynamic", "longrope")


def within(segments: jax.Array) -> jax.Array:
    """The place of each token [B, S] in its document: a run of equal segments."""
    slots = jnp.arange(segments.shape[1])
    return slots - jax.lax.cummax(jnp.where(_begins(segments), slots, 0), axis=1)


def lengths_within(segments: jax.Array) -> jax.Array:
    """The length of each token's document, [B, S]."""
    count = segments.shape[1]
    ends = jnp.pad(_begins(segments)[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    # The first end at or behind each token.
    last = jax.lax.cummin(jnp.where(ends, jnp.arange(count), count), axis=1, reverse=True)
    return last - jnp.arange(count) + within(segments) + 1


def _begins(segments: jax.Array) -> jax.Array:
    """Which tokens [B, S] are the first of a run."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    span = rope.high_frequency_factor - rope.low_frequency_factor
    kept = np.clip((rope.original_positions / wavelengths - rope.low_frequency_factor) / span, 0, 1)
    return plain * (kept + (1 - kept) / rope.factor)


def _yarn(rope: Rope, plain: np.ndarray, rotated: int) -> np.ndarray:
    """Pairs that turn over `beta_fast` times within the trained length are kept, under `beta_slow` times stretched."""

    def pair_turning(times: float) -> float:
        return rotated * math.log(rope.original_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    stretched = np.clip((np.arange(rotated // 2) - low) / ((high - low) or 0.001), 0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched
