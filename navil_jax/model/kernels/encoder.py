"""Bidirectional attention inside segments for heads of up to 64 features: rotation, kernels, gradients in one function."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from navil_jax.model.kernels import flash, widen
from navil_jax.model.kernels.flash import LANES, Blocks, Mask
from navil_jax.model.kernels.pairs import Pairs, block_pairs

BLOCK = 512  # positions of a block, in rows that are long enough
MOST_HEADS, MOST_BACKWARD_HEADS = 14, 4  # of a grid step
OTHER_BYTES = 10 * 2**20  # of VMEM, beside the gradients of a row's queries


class Shape(NamedTuple):
    """The sizes that the kernels are made for."""

    width: int  # of a head
    row: int  # positions of a row, whole blocks
    block: int
    cores: int  # of a device
    vmem: int  # bytes that a kernel may take
    interpret: Any = False


class Inputs(NamedTuple):
    """What one call of the kernels reads besides queries, keys and values."""

    tables: widen.Tables
    by_query: Pairs
    by_key: Pairs
    segment_ids: Int32[Array, " S"]


def make_inputs(
    segment_ids: Int32[Array, "B S"],
    rotation: tuple[Float32[Array, "B S half"], Float32[Array, "B S half"]],
    shape: Shape,
    dtype: Any,
    longest: int | None = None,
) -> Inputs:
    """Lanes and pairs of blocks, the same for all layers whose segments are these.

    Args:
      segment_ids: rows of whole blocks; 0 = empty.
      rotation: cosines and sines of every position; half = width / 2.
      longest: the most positions from the first to the last of a segment; None: a whole row.
    """
    ids = segment_ids.reshape(-1)
    cos, sin = (x.reshape(ids.size, -1) for x in rotation)
    tables = widen.Tables(*widen.rotation_lanes(cos, sin), *widen.mask_lanes(ids, shape.width, dtype))
    width = None if longest is None else -(-2 * longest // shape.block) + 2
    pairs = functools.partial(block_pairs, segment_ids, shape.block, width=width)
    return Inputs(tables, pairs(), pairs(by_key=True), ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "S H*width"],
    k: Float[Array, "S H*width"],
    v: Float[Array, "S H*width"],
    inputs: Inputs,
    shape: Shape,
) -> Float[Array, "S H*width"]:
    """Rotates queries and keys and lets every position see those of its segment, weights in float32.

    Args:
      q, k, v: as projected, rows one behind the other; heads fill whole registers, H * width = n * LANES.
    """
    return _forward(q, k, v, inputs, shape)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, inputs: Inputs, shape: Shape) -> tuple[jax.Array, Any]:
    wide_q, wide_k, fits = _widened(q, k, inputs, shape)
    blocks = Blocks(shape.block, shape.block, heads_per_step(shape, _heads(q, shape)), shape.vmem)
    run = functools.partial(
        flash.forward, wide_q, wide_k, v, inputs.by_query, blocks, width=shape.width, interpret=shape.interpret
    )
    out, lse = jax.lax.cond(fits, run, lambda: run(Mask(inputs.segment_ids, causal=False)))
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse.reshape(_heads(q, shape), -1)))
    return out, (q, k, v, inputs, out, lse)


def _backward(shape: Shape, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, inputs, out, lse = kept
    wide_q, wide_k, fits = _widened(q, k, inputs, shape)
    options = {"width": shape.width, "block": shape.block, "interpret": shape.interpret}
    inner = widen.inner_products(gradient, out, **options)
    per = heads_per_step(shape, _heads(q, shape), backward=True)
    tile = 256 if shape.block % 256 == 0 else LANES
    blocks = Blocks(shape.block, tile, per, shape.vmem)
    grouped = (x.reshape(-1, per, x.shape[1]) for x in (lse, inner))
    run = functools.partial(
        flash.backward,
        *(wide_q, wide_k, v, gradient, jnp.concatenate(list(grouped), axis=1), inputs.by_key, blocks),
        width=shape.width,
        row=shape.row,
        interpret=shape.interpret,
    )
    of_q, of_k, of_v = jax.lax.cond(fits, run, lambda: run(Mask(inputs.segment_ids, causal=False)))
    narrow = functools.partial(widen.narrow, tables=inputs.tables, dtype=q.dtype, **options)
    return narrow(of_q, queries=True), narrow(of_k, queries=False), of_v, None


attend.defvjp(_forward, _backward)


def _widened(q: jax.Array, k: jax.Array, inputs: Inputs, shape: Shape) -> tuple[jax.Array, jax.Array, Bool[Array, ""]]:
    """Queries and keys as the kernels read them, and whether all scores keep to the range of the shift."""
    make = functools.partial(
        widen.widen, tables=inputs.tables, width=shape.width, block=shape.block, interpret=shape.interpret
    )
    wide_k, largest = make(k, limits=None)
    wide_q, bounds = make(q, limits=largest)
    return wide_q, wide_k, bounds.max() <= widen.MOST_BOUND


def _heads(x: jax.Array, shape: Shape) -> int:
    return x.shape[1] // shape.width


def heads_per_step(shape: Shape, heads: int, *, backward: bool = False) -> int:
    """The most heads of a grid step that fill registers, divide over cores and fit VMEM; 0: none do."""
    each = heads // shape.cores if heads % shape.cores == 0 else heads
    held = shape.width * shape.row * 4  # gradients of a head's queries in a row
    most = min(MOST_BACKWARD_HEADS, (shape.vmem - OTHER_BYTES) // held) if backward else MOST_HEADS
    fitting = [n for n in range(1, most + 1) if each % n == 0 and n * shape.width % LANES == 0]
    return max(fitting, default=0)
