"""Weighted cross-entropy over slots, and what is logged beside it (paper section 4; released behaviour)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from navil_jax.sharding import mesh_axes, partition_spec

CHUNK_LOGITS = 2**26  # logits of a device that exist at one time
LOWEST = -1e30  # a logit that never wins


class TokenScores(NamedTuple):
    """Of every slot: cross-entropy of its target (0 where the target is -1), and the likeliest token."""

    cross_entropy: jax.Array  # [B, N] float32
    predictions: jax.Array  # [B, N] int32


class _Sums(NamedTuple):
    """What is known of the logits of each slot after a part of the vocabulary; [B, N]."""

    top: jax.Array  # float32, the largest
    total: jax.Array  # float32, sum of exp(logit - top)
    chosen: jax.Array  # float32, the target's
    best: jax.Array  # int32, token of the largest


def token_scores(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> TokenScores:
    """Scores every slot through the vocabulary head, a part of the vocabulary at a time.

    The logits of all slots never exist together, neither forward nor backward, and each part's gradient is one product
    over all slots. On a mesh every device scores its own slots; the head is gathered once, its gradient summed once.

    Args:
      x: [B, N, H], the last layer's output after the final norm.
      kernel: [H, vocab], the head; products are in x's dtype, sums in float32.
      targets: [B, N] int32, -1 = none.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _scores(x, kernel.astype(x.dtype), targets, mapped=False)
    slots, hidden = partition_spec(("batch", "slots")), partition_spec(("batch", "slots", "features"))

    def local(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> TokenScores:
        kernel = kernel.astype(x.dtype)
        if mesh_axes("embed"):
            kernel = jax.lax.all_gather(kernel, mesh_axes("embed"), axis=0, tiled=True)
        return _scores(x, kernel, targets, mapped=True)

    specs = hidden, partition_spec(("embed", "vocab")), slots
    return jax.shard_map(local, in_specs=specs, out_specs=TokenScores(slots, slots))(x, kernel, targets)


def _scores(x: jax.Array, kernel: jax.Array, targets: jax.Array, mapped: bool) -> TokenScores:
    """`token_scores` of a device's slots, with its columns of the head where it is `mapped` over a mesh."""
    vocab, split = kernel.shape[1], mesh_axes("vocab") if mapped else ()
    offset = jax.lax.axis_index(split) * vocab if split else 0
    size = max(128, CHUNK_LOGITS // targets.size // 128 * 128)
    zeros = jnp.zeros(targets.shape)
    start = _Sums(zeros + LOWEST, zeros, zeros, zeros.astype(jnp.int32))
    if vocab <= size:
        sums = _add_part(x, start, kernel, targets - offset, 0, vocab)
    else:
        exact = x.astype(jnp.float32)  # so that the parts' gradients of x are summed in float32
        padded = jnp.pad(kernel, ((0, 0), (0, -vocab % size)))

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(sums: _Sums, first: jax.Array) -> tuple[_Sums, None]:
            part = jax.lax.dynamic_slice_in_dim(padded, first, size, axis=1)
            return _add_part(exact.astype(x.dtype), sums, part, targets - offset, first, vocab), None

        if axes := tuple(axis for name in ("batch", "slots", "embed", "vocab") if mapped for axis in mesh_axes(name)):
            start = jax.lax.pcast(start, tuple(dict.fromkeys(axes)), to="varying")
        sums, _ = jax.lax.scan(step, start, jnp.arange(0, vocab, size))
    top, total, chosen, best = sums
    if split:
        local_top, best = top, best + offset
        top = jax.lax.pmax(jax.lax.stop_gradient(local_top), split)
        total = jax.lax.psum(total * jnp.exp(local_top - top), split)
        chosen = jax.lax.psum(chosen, split)
        best = jax.lax.pmin(jnp.where(local_top == top, best, jnp.iinfo(jnp.int32).max), split)
    return TokenScores(jnp.where(targets >= 0, jnp.log(total) + top - chosen, 0.0), best)


def _add_part(
    x: jax.Array, sums: _Sums, part: jax.Array, targets: jax.Array, first: jax.Array | int, vocab: int
) -> _Sums:
    """Takes in the logits of columns first, first + 1, ... of the head; those from `vocab` on are empty."""
    columns = first + jnp.arange(part.shape[1])
    real = columns < vocab
    logits = jnp.einsum("bnh,hv->bnv", x, part, preferred_element_type=jnp.float32)
    logits = jnp.where(real, logits, LOWEST)
    largest = jax.lax.stop_gradient(logits.max(axis=-1))
    top = jnp.maximum(sums.top, largest)
    return _Sums(
        top,
        sums.total * jnp.exp(sums.top - top) + jnp.exp(logits - top[..., None]).sum(axis=-1),
        sums.chosen + jnp.where(real & (columns == targets[..., None]), logits, 0.0).sum(axis=-1),
        jnp.where(largest > sums.top, first + jnp.argmax(logits, axis=-1), sums.best).astype(jnp.int32),
    )


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
