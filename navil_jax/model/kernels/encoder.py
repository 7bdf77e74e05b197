"""The encoder's attention on TPUs as one function: rotation, kernels and gradients, for heads of 32 or 64 features."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from navil_jax.model.kernels import flash, spare_rows
from navil_jax.model.kernels.flash import LANES, Blocks
from navil_jax.model.kernels.pairs import Pairs, block_pairs

WIDTHS = (32, 64)  # of heads that fill registers and leave rows for the mask
MOST_HEADS, MOST_BACKWARD_HEADS = 14, 4  # of a grid step
OTHER_BYTES = 10 * 2**20  # of VMEM, beside the gradients of a row's queries


class Shape(NamedTuple):
    """The sizes that the kernels are made for."""

    width: int  # of a head
    row: int  # positions of a row, whole blocks
    block: int
    cores: int  # of a device
    vmem: int  # bytes that a kernel may take
    interpret: bool = False


class Inputs(NamedTuple):
    """What one call of the kernels reads besides queries, keys and values."""

    cos: Float32[Array, "half S"]
    sin: Float32[Array, "half S"]
    below: tuple[Float[Array, "below S"], Float[Array, "below S"]]  # rows of queries and of keys
    by_query: Pairs
    by_key: Pairs
    segment_ids: Int32[Array, " S"]


def make_inputs(
    segment_ids: Int32[Array, "B S"],
    rotation: tuple[Float32[Array, "B S half"], Float32[Array, "B S half"]],
    block: int,
    dtype: Any,
    longest: int | None = None,
) -> Inputs:
    """Rotation and pairs of blocks, the same for all layers whose segments are these.

    Args:
      segment_ids: rows of whole blocks; 0 = empty.
      rotation: cosines and sines of every position; half = width / 2.
      longest: the most positions from the first to the last of a segment; None: a whole row.
    """
    cos, sin = (x.reshape(segment_ids.size, -1).T for x in rotation)
    width = None if longest is None else -(-2 * longest // block) + 2
    pairs = functools.partial(block_pairs, segment_ids, block, width=width)
    ids = segment_ids.reshape(-1)
    return Inputs(cos, sin, spare_rows.rows_below(ids, dtype), pairs(), pairs(by_key=True), ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "H*width S"],
    k: Float[Array, "H*width S"],
    v: Float[Array, "H*width S"],
    inputs: Inputs,
    shape: Shape,
) -> Float[Array, "H*width S"]:
    """Rotates queries and keys and lets every position see those of its segment, weights in float32.

    Args:
      q, k, v: turned, rows one behind the other; heads fill whole registers, H * width = n * LANES.
    """
    return _forward(q, k, v, inputs, shape)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs, shape: Shape) -> tuple[jax.Array, Any]:
    wide_q, wide_k, fits = widened(q, k, inputs, shape)
    heads = len(q) // shape.width
    blocks = Blocks(shape.block, shape.block, heads_per_step(shape, heads), shape.vmem)
    run = functools.partial(
        flash.forward, wide_q, wide_k, v, inputs.by_query, blocks, width=shape.width, interpret=shape.interpret
    )
    out, lse = jax.lax.cond(fits, run, lambda: run(inputs.segment_ids))
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse.reshape(heads, -1)))
    return out, (q, k, v, inputs, out, lse)


def _backward(shape: Shape, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, inputs, out, lse = kept
    wide_q, wide_k, fits = widened(q, k, inputs, shape)
    options: dict[str, Any] = {"block": shape.block, "interpret": shape.interpret}
    inner = spare_rows.inner_products(gradient, out, width=shape.width, **options)
    per = heads_per_step(shape, len(lse), backward=True)
    sums = jnp.concatenate([x.reshape(-1, per, x.shape[1]) for x in (lse, inner)], axis=1)
    tile = 256 if shape.block % 256 == 0 else LANES
    run = functools.partial(
        flash.backward,
        *(wide_q, wide_k, v, gradient, sums, inputs.by_key, Blocks(shape.block, tile, per, shape.vmem)),
        width=shape.width,
        row=shape.row,
        interpret=shape.interpret,
    )
    of_q, of_k, of_v = jax.lax.cond(fits, run, lambda: run(inputs.segment_ids))
    of_q, of_k = (
        spare_rows.narrow(of, inputs.cos, inputs.sin, scale=scale, dtype=q.dtype, **options)
        for of, scale in ((of_q, shape.width**-0.5), (of_k, math.log(2)))
    )
    return of_q, of_k, of_v, None


attend.defvjp(_forward, _backward)


def widened(q: jax.Array, k: jax.Array, inputs: Inputs, shape: Shape) -> tuple[jax.Array, jax.Array, Bool[Array, ""]]:
    """Rotated queries and keys with their spare rows, and whether all scores keep to the range that these allow.

    Queries carry log2(e), multiplied before they are rounded, as the kernels take powers of two.
    """
    of_queries, of_keys = inputs.below
    widen = functools.partial(
        spare_rows.widen, cos=inputs.cos, sin=inputs.sin, block=shape.block, interpret=shape.interpret
    )
    wide_k, norms = widen(k, below=of_keys, limits=None, scale=1.0)
    scale = shape.width**-0.5 * math.log2(math.e)
    wide_q, bounds = widen(q, below=of_queries, limits=norms.max(1), scale=scale)
    return wide_q, wide_k, bounds.max() <= spare_rows.MOST_BOUND


def heads_per_step(shape: Shape, heads: int, *, backward: bool = False) -> int:
    """The most heads of a grid step that fill registers, divide over cores and fit VMEM; 0: none do."""
    each = heads // shape.cores if heads % shape.cores == 0 else heads
    held = shape.width * shape.row * 4  # gradients of a head's queries in a row
    most = min(MOST_BACKWARD_HEADS, (shape.vmem - OTHER_BYTES) // held) if backward else MOST_HEADS
    fitting = [n for n in range(1, most + 1) if each % n == 0 and n * shape.width % LANES == 0]
    return max(fitting, default=0)
