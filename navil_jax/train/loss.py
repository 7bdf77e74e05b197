"""Weighted cross-entropy over slots, and what is logged beside it (paper section 4; released behaviour)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from navil_jax.batch import AnyArray
from navil_jax.sharding import mesh_axes, partition_spec

CHUNK_LOGITS = 2**26  # logits of a device that exist at one time
LOWEST = -1e30  # a logit that never wins


class TokenScores(NamedTuple):
    """Of every slot: cross-entropy of its target (0 where the target is -1), and the likeliest token."""

    cross_entropy: Float32[Array, "B N"]
    predictions: Int32[Array, "B N"]


class _Summary(NamedTuple):
    """Of every slot, over a device's columns of the head; [B, N].

    The largest logit and the logarithm stay apart: their sum would lose the digits of the loss where logits are large.
    """

    logsumexp: jax.Array  # float32, log of the sum of exp(logit - max_logit)
    target_logit: jax.Array  # float32; 0 where another device has it
    max_logit: jax.Array  # float32, without a gradient
    argmax: jax.Array  # int32, its column


_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # over the columns so far


@jax.named_scope("head")
def token_scores(
    x: Float[AnyArray, "B N H"],
    kernel: Float[AnyArray, "H vocab"],
    targets: Int32[AnyArray, "B N"],
    sum_dtype: str | None = None,
) -> TokenScores:
    """Scores every slot through the vocabulary head, a chunk of the vocabulary at a time.

    The logits of all slots never exist together, neither forward nor backward, and each chunk's gradient is one product
    over all slots. On a mesh every device scores its own slots; the head is gathered once, its gradient summed once.

    Args:
      x: the last layer's output after the final norm.
      kernel: the head; products are in x's dtype, sums in float32.
      targets: -1 = none.
      sum_dtype: in which the kernel's gradient is summed over devices; None: x's dtype.
    """
    x, kernel, targets = (jnp.asarray(array) for array in (x, kernel, targets))
    sums = x.dtype if sum_dtype is None else jnp.dtype(sum_dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return _scores(x, kernel.astype(sums), targets, mapped=False)
    slots, hidden = partition_spec(("batch", "slots")), partition_spec(("batch", "slots", "features"))

    def local(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> TokenScores:
        return _scores(x, kernel.astype(sums), targets, mapped=True)

    specs = hidden, partition_spec(("embed", "vocab")), slots
    return jax.shard_map(local, in_specs=specs, out_specs=slots)(x, kernel, targets)


def _scores(x: jax.Array, kernel: jax.Array, targets: jax.Array, mapped: bool) -> TokenScores:
    """`token_scores` of a device's slots, with its columns of the head where it is `mapped` over a mesh."""
    split = mesh_axes("vocab") if mapped else ()
    offset = jax.lax.axis_index(split) * kernel.shape[1] if split else 0
    logsumexp, target_logit, max_logit, argmax = _summary(x, kernel, targets - offset, mapped)
    max_logit = jax.lax.stop_gradient(max_logit)
    if split:
        own, max_logit = max_logit, jax.lax.stop_gradient(jax.lax.pmax(max_logit, split))
        logsumexp = jnp.log(jax.lax.psum(jnp.exp(logsumexp + (own - max_logit)), split))
        target_logit = jax.lax.psum(target_logit, split)
        argmax = jax.lax.pmin(jnp.where(own == max_logit, argmax + offset, jnp.iinfo(jnp.int32).max), split)
    return TokenScores(jnp.where(targets >= 0, logsumexp + (max_logit - target_logit), 0.0), argmax)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summary(x: jax.Array, kernel: jax.Array, targets: jax.Array, mapped: bool) -> _Summary:
    """Goes once over the columns of the head, and a second time for the gradient. Arguments as `_scores` has."""
    return _summarise(x, kernel, targets, mapped)[0]


def _summarise(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, mapped: bool
) -> tuple[_Summary, tuple[jax.Array, ...]]:
    like = kernel[:0]
    kernel = kernel.astype(x.dtype)
    if mapped:
        x, kernel, targets = _spread(x, kernel, targets)
    size, firsts = _chunks(kernel, targets)

    def step(sums: _Sums, first: jax.Array) -> tuple[_Sums, None]:
        max_logit, total, target_logit, argmax = sums
        logits, start, is_target, _ = _logits(x, kernel, targets, first, size)
        largest = logits.max(axis=-1)
        new_max = jnp.maximum(max_logit, largest)
        total = total * jnp.exp(max_logit - new_max) + jnp.exp(logits - new_max[..., None]).sum(axis=-1)
        target_logit += jnp.where(is_target, logits, 0.0).sum(axis=-1)
        argmax = jnp.where(largest > max_logit, start + jnp.argmax(logits, axis=-1), argmax).astype(jnp.int32)
        return (new_max, total, target_logit, argmax), None

    zero = jnp.zeros_like(targets, jnp.float32)
    first = zero + LOWEST, zero, zero, jnp.zeros_like(targets)
    (max_logit, total, target_logit, argmax), _ = jax.lax.scan(step, first, firsts)
    logsumexp = jnp.log(total)
    return _Summary(logsumexp, target_logit, max_logit, argmax), (x, kernel, targets, logsumexp, max_logit, like)


def _summary_gradient(
    mapped: bool, kept: tuple[jax.Array, ...], gradient: _Summary
) -> tuple[jax.Array, jax.Array, None]:
    """Of `x`, summed in float32 over the chunks, and of `kernel`, each chunk of which is one product over all slots."""
    x, kernel, targets, logsumexp, max_logit, like = kept
    size, firsts = _chunks(kernel, targets)

    def step(sums: tuple[jax.Array, jax.Array], first: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        of_x, of_kernel = sums
        logits, start, is_target, chunk = _logits(x, kernel, targets, first, size)
        of_logits = jnp.exp(logits - max_logit[..., None] - logsumexp[..., None]) * gradient.logsumexp[..., None]
        of_logits += jnp.where(is_target, gradient.target_logit[..., None], 0.0)
        of_logits = of_logits.astype(x.dtype)
        of_x += jnp.einsum("bnv,hv->bnh", of_logits, chunk, preferred_element_type=jnp.float32)
        of_chunk = jnp.einsum("bnh,bnv->hv", x, of_logits, preferred_element_type=jnp.float32)
        known = jax.lax.dynamic_slice_in_dim(of_kernel, start, size, axis=1)
        new = known + of_chunk.astype(of_kernel.dtype)
        return (of_x, jax.lax.dynamic_update_slice_in_dim(of_kernel, new, start, axis=1)), None

    zeros = jnp.zeros_like(x, jnp.float32), jnp.zeros_like(kernel, like.dtype)
    (of_x, of_kernel), _ = jax.lax.scan(step, zeros, firsts)
    of_x = of_x.astype(x.dtype)
    return *(_collect(of_x, of_kernel) if mapped else (of_x, of_kernel)), None


_summary.defvjp(_summarise, _summary_gradient)


def _axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes along which slots differ and the head does not, and the reverse."""
    slots, head = (mesh_axes(a) + mesh_axes(b) for a, b in (("batch", "slots"), ("embed", "vocab")))
    return tuple(a for a in slots if a not in head), tuple(a for a in head if a not in slots)


def _spread(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The head's rows of all devices; and all arrays as ones that may differ along all axes."""
    of_slots, of_head = _axes()
    if mesh_axes("embed"):
        kernel = jax.lax.all_gather(kernel, mesh_axes("embed"), axis=0, tiled=True)
    vary = lambda x, axes: jax.lax.pcast(x, axes, to="varying") if axes else x  # noqa: E731
    own = tuple(axis for axis in of_head if axis not in mesh_axes("vocab"))  # targets count from the first column
    return vary(x, of_head), vary(kernel, of_slots), vary(targets, own)


def _collect(of_x: jax.Array, of_kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of both gradients over the devices that share the array; each device keeps its own rows of the head.

    That happens before anything else: a gradient of the whole head would stay until those of all layers are known.
    """
    of_slots, of_head = _axes()
    if mesh_axes("embed"):
        of_kernel = jax.lax.psum_scatter(of_kernel, mesh_axes("embed"), scatter_dimension=0, tiled=True)
    of_x, of_kernel = jax.lax.optimization_barrier((of_x, of_kernel))
    return (
        jax.lax.psum(of_x, of_head) if of_head else of_x,
        jax.lax.psum(of_kernel, of_slots) if of_slots else of_kernel,
    )


def _chunks(kernel: jax.Array, targets: jax.Array) -> tuple[int, jax.Array]:
    """Columns of a chunk of the head, whole lanes of them, and the first new column of every chunk."""
    vocab = kernel.shape[1]
    size = min(vocab, max(128, CHUNK_LOGITS // targets.size // 128 * 128))
    return size, jnp.arange(0, vocab, size)


def _logits(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, first: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Logits of a chunk of the head, [B, N, size] float32.

    Returns:
      them, the chunk's first column, which of them are of targets, and the chunk's kernel [H, size]. The last chunk
      reaches back over columns of the one before, and takes them for empty.
    """
    start = jnp.minimum(first, kernel.shape[1] - size)
    columns = start + jnp.arange(size)
    chunk = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
    logits = jnp.einsum("bnh,hv->bnv", x, chunk, preferred_element_type=jnp.float32)
    new = columns >= first
    return jnp.where(new, logits, LOWEST), start, new & (columns == targets[..., None]), chunk


def weighted_mean(values: Shaped[AnyArray, "*n"], weights: Shaped[AnyArray, "*n"]) -> Float[Array, ""]:
    """sum(values * weights) / sum(weights) over the global batch; 0 where nothing has a weight.

    Example: values 2 4 9, weights 1 0.5 0 -> 4 / 1.5
    """
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-8)


def feature_scale(x: Float[AnyArray, "B N H"], mask: Bool[AnyArray, "B N"]) -> Float32[Array, ""]:
    """How unequal tokens are in size: the standard deviation (n - 1) over tokens of mean |x|.

    The released code logs it of the last layer, for visual and for other tokens; nan where there is no token.
    """
    sizes = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=-1)
    count = jnp.sum(mask)
    mean = jnp.sum(sizes * mask) / count
    return jnp.sqrt(jnp.sum(jnp.square(sizes - mean) * mask) / (count - 1))
