"""Weighted cross-entropy over slots, and what is logged beside it (paper section 4; released behaviour)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK_LOGITS = 2**26  # logits of a chunk of slots that exist at one time


class TokenScores(NamedTuple):
    """Of every slot: cross-entropy of its target (0 where the target is -1), and the likeliest token."""

    cross_entropy: jax.Array  # [B, N] float32
    predictions: jax.Array  # [B, N] int32


def token_scores(logits: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, vocab: int) -> TokenScores:
    """Scores every slot, a chunk of slots at a time, so that the logits of all never exist together.

    Args:
      logits: [B, n, H] -> [B, n, vocab] float32.
      x: [B, N, H], the last layer's output.
      targets: [B, N] int32, -1 = none.
      vocab: size of the vocabulary.
    """

    def score(x: jax.Array, targets: jax.Array) -> TokenScores:
        scores = logits(x)
        chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        cross_entropy = jnp.where(targets >= 0, jax.nn.logsumexp(scores, axis=-1) - chosen, 0.0)
        return TokenScores(cross_entropy, jnp.argmax(scores, axis=-1).astype(jnp.int32))

    rows, slots = targets.shape
    chunks = max(1, min(slots, rows * slots * vocab // CHUNK_LOGITS))
    while slots % chunks:
        chunks += 1
    if chunks == 1:
        return score(x, targets)
    split = lambda a: jnp.moveaxis(a.reshape(rows, chunks, slots // chunks, *a.shape[2:]), 1, 0)  # noqa: E731
    scores = jax.lax.map(jax.checkpoint(lambda chunk: score(*chunk)), (split(x), split(targets)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(rows, slots), scores)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """sum(values * weights) / sum(weights) over the global batch; 0 where nothing has a weight.

    Example: values 2 4 9, weights 1 0.5 0 -> 4 / 1.5
    """
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-8)


def feature_scale(x: jax.Array, mask: jax.Array) -> jax.Array:
    """How unequal tokens are in size: the standard deviation (n - 1) over tokens of mean |x|. x [B, N, H], mask [B, N].

    The released code logs it of the last layer, for visual and for other tokens; nan where there is no token.
    """
    sizes = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=-1)
    count = jnp.sum(mask)
    mean = jnp.sum(sizes * mask) / count
    return jnp.sqrt(jnp.sum(jnp.square(sizes - mean) * mask) / (count - 1))
