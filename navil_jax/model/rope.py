"""Rotary position embeddings: one axis with scaling for the decoder, two axes for the vision encoder."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from navil_jax.batch import AnyArray
from navil_jax.config import DecoderConfig, VisionConfig

Rotation = tuple[Float32[Array, "B N half"], Float32[Array, "B N half"]]  # cos and sin; half = head_dim / 2


def decoder_rotation(
    config: DecoderConfig, positions: Int[AnyArray, "B N"], lengths: Int[Array, "B _"] | None = None
) -> Rotation:
    """Rotation of every token.

    Args:
      positions: in the token's own sample.
      lengths: [B, S] or [B, 1], length of the token's own sample; needed for dynamic scaling only.

    Dynamic scaling raises the base when a sample is longer than `max_positions`; the released code takes the length of
    the padded batch, and keeps the last base for every later text. Here each sample's own length counts.
    """
    dim = config.head_dim
    base = jnp.float32(config.rope_theta)
    positions = positions.astype(jnp.float32)
    if config.rope_scaling == "linear":
        positions = positions / config.rope_factor
    elif config.rope_scaling == "dynamic" and lengths is not None:
        factor, limit = config.rope_factor, config.max_positions
        stretch = factor * lengths.astype(jnp.float32) / limit - (factor - 1)
        base = jnp.where(lengths > limit, base * jnp.maximum(stretch, 1.0) ** (dim / (dim - 2)), base)[..., None]
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    angles = positions[..., None] / base**exponents
    return jnp.cos(angles), jnp.sin(angles)


def vision_angles(config: VisionConfig, coords: Int[AnyArray, "... 2"]) -> Float32[Array, "... half"]:
    """Angles of every patch: head_dim/4 for its row, then head_dim/4 for its column.

    Args:
      coords: (row, column) in the patch's own scale.
    """
    dim = config.head_dim // 2
    frequencies = 1.0 / jnp.float32(config.rope_theta) ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = coords[..., None].astype(jnp.float32) * frequencies
    return angles.reshape(*coords.shape[:-1], dim)


@jax.custom_vjp
def rotate(x: Float[Array, "B N H D"], rotation: Rotation) -> Float[Array, "B N H D"]:
    """Turns the pairs (i, i + D/2) of every head, in float32.

    Halves swap in x's own dtype, so that no float32 copy of x is written; the gradient turns back.
    """
    cos, sin = rotation
    cos, sin = (jnp.concatenate(halves, axis=-1)[:, :, None, :] for halves in ((cos, cos), (-sin, sin)))
    first, second = jnp.split(x, 2, axis=-1)
    swapped = jnp.concatenate([second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


def _rotate_forward(x: jax.Array, rotation: Rotation) -> tuple[jax.Array, Rotation]:
    return rotate(x, rotation), rotation


def _rotate_backward(rotation: Rotation, gradient: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = rotation
    return rotate(gradient, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
