"""Rotates queries and keys, and puts below a head's features what masks scores and keeps their powers in range.

The matrix unit sums over 128 products; a head of up to 64 features leaves half of them unused. At no cost for the
vector units these carry
  the mask   a code word of 62 signs for each segment: equal words add 0 to a score, others -264 or less
  the shift  of each query, less than an upper bound of its scores (its norm times the largest norm of a key) by ROOM:
             no running maximum is needed as long as that bound is at most MOST_BOUND

Words come from the BCH code of 63 signs for 16 bits, two of which differ in at least 23 places (Lin and Costello, Error
Control Coding, table of primitive BCH codes): so the sums that cancel are small, and little is rounded off a score.

Example: a head of 64: rows 0-63 its features, 64-125 the word (times 6 in queries), 126 the constant of the mask, 127
the shift (1 in keys).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from navil_jax.model.kernels.flash import LANES, settings

CODE = 62  # signs of a word
GENERATOR = 0o6331141367235453  # polynomial of the code, one sign of which is left out
STEP = 6.0  # a sign that differs adds -2 * STEP
BELOW = CODE + 2  # rows of the word, the constant and the shift
ROOM = 60.0  # powers of two above 1 that weights may take
MOST_BOUND = 90.0  # scores lie within it of 0, so that the largest weight of a query is at least 2**(ROOM - 180)
SLACK = 1 + 2**-6  # features are rounded after their norm is taken
ROWS = 256  # of features at a time


def code(segment_ids: Int32[Array, " S"]) -> Float32[Array, "code S"]:
    """The signs of each position's segment, of which there may be 65,536."""
    bits = [GENERATOR >> place & 1 for place in range(48)]
    masks = [sum(bits[row - n] << n for n in range(16) if 0 <= row - n < 48) for row in range(CODE)]
    ones = jax.lax.population_count(segment_ids & jnp.array(masks)[:, None])
    return 1.0 - 2.0 * (ones & 1)


def rows_below(segment_ids: Int32[Array, " S"], dtype: Any) -> tuple[Float[Array, "below S"], Float[Array, "below S"]]:
    """What stands below the features of queries, but for the shift, and of keys."""
    signs = code(segment_ids)
    ones = jnp.ones((1, signs.shape[1]))
    of_queries = jnp.concatenate([STEP * signs, -CODE * STEP * ones, 0 * ones])
    return of_queries.astype(dtype), jnp.concatenate([signs, ones, ones]).astype(dtype)


def widen(
    x: Float[Array, "H*width S"],
    cos: Float32[Array, "half S"],
    sin: Float32[Array, "half S"],
    below: Float[Array, "below S"],
    limits: Float32[Array, " H"] | None,
    *,
    scale: float,
    block: int,
    interpret: bool = False,
) -> tuple[Float[Array, "H*lanes S"], Float32[Array, "H S"]]:
    """Rotates heads, scales them and fills them up to LANES rows.

    Args:
      below: of queries or of keys (`rows_below`).
      limits: for queries, the largest norm of each head's keys; None: x are keys.

    Returns:
      Heads in x's dtype; for queries an upper bound of their scores, for keys their norms.
    """
    (lanes, length), half = x.shape, len(cos)
    width, rows = 2 * half, ROWS if lanes % ROWS == 0 else LANES
    per, queries = rows // width, limits is not None
    kept, fill = BELOW - 16, LANES - width - BELOW

    def kernel(limit_ref: Any, x_ref: Any, cos_ref: Any, sin_ref: Any, below_ref: Any, *outputs: Any) -> None:
        out_ref, norm_ref = outputs
        cos, sin = cos_ref[...] * scale, sin_ref[...] * scale
        row = jax.lax.broadcasted_iota(jnp.int32, (16, block), 0)
        for head in range(per):
            start = head * width
            first, second = (x_ref[start + at : start + at + half].astype(jnp.float32) for at in (0, half))
            first, second = first * cos - second * sin, second * cos + first * sin
            norm = jnp.sqrt(jnp.sum(first * first + second * second, axis=0, keepdims=True)) * SLACK
            last = below_ref[kept:]
            if queries:
                norm = norm * limit_ref[pl.program_id(1) * per + head]
                last = jnp.where(row == 15, ROOM - norm, last.astype(jnp.float32)).astype(x.dtype)
            norm_ref[0, head : head + 1] = norm
            whole = [first.astype(x.dtype), second.astype(x.dtype), below_ref[:kept], last]
            whole += [jnp.zeros((fill, block), x.dtype)] if fill else []
            out_ref[head * LANES : (head + 1) * LANES] = jnp.concatenate(whole, 0)

    tile = lambda rows: pl.BlockSpec((rows, block), lambda n, group, limit: (group, n))  # noqa: E731
    shared = lambda rows: pl.BlockSpec((rows, block), lambda n, group, limit: (0, n))  # noqa: E731
    wide, norms = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((lanes // width * LANES, length), x.dtype),
            jax.ShapeDtypeStruct((lanes // rows, per, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(length // block, lanes // rows),
            in_specs=[tile(rows), shared(half), shared(half), shared(BELOW)],
            out_specs=[tile(per * LANES), pl.BlockSpec((1, per, block), lambda n, group, limit: (group, 0, n))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"packed_widen_{'queries' if queries else 'keys'}",
        metadata=settings(width=width, block=block),
        interpret=interpret,
    )(jnp.ones(1) if limits is None else limits, x, cos, sin, below)
    return wide, norms.reshape(-1, length)


def narrow(
    gradient: Float32[Array, "H*width S"],
    cos: Float32[Array, "half S"],
    sin: Float32[Array, "half S"],
    *,
    scale: float,
    block: int,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, "H*width S"]:
    """Rotates a gradient back and scales it."""
    (lanes, length), half = gradient.shape, len(cos)
    rows = ROWS if lanes % ROWS == 0 else LANES

    def kernel(g_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any) -> None:
        cos, sin = cos_ref[...] * scale, sin_ref[...] * scale
        for start in range(0, rows, 2 * half):
            first, second = (g_ref[start + at : start + at + half] for at in (0, half))
            out_ref[start : start + half] = (first * cos + second * sin).astype(dtype)
            out_ref[start + half : start + 2 * half] = (second * cos - first * sin).astype(dtype)

    tile, rotation = (
        functools.partial(pl.BlockSpec, index_map=index)
        for index in (lambda n, group: (group, n), lambda n, group: (0, n))
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(gradient.shape, dtype),
        grid=(length // block, lanes // rows),
        in_specs=[tile((rows, block)), rotation((half, block)), rotation((half, block))],
        out_specs=tile((rows, block)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="packed_narrow",
        metadata=settings(width=2 * half, block=block),
        interpret=interpret,
    )(gradient, cos, sin)


def inner_products(
    x: Float[Array, "H*width S"], y: Float[Array, "H*width S"], *, width: int, block: int, interpret: bool = False
) -> Float32[Array, "H S"]:
    """The sum over features of x times y, of each head and position."""
    lanes, length = x.shape
    rows = ROWS if lanes % ROWS == 0 else LANES

    def kernel(x_ref: Any, y_ref: Any, out_ref: Any) -> None:
        for head in range(rows // width):
            of_head = slice(head * width, (head + 1) * width)
            products = x_ref[of_head].astype(jnp.float32) * y_ref[of_head].astype(jnp.float32)
            out_ref[0, head : head + 1] = products.sum(0, keepdims=True)

    tile = pl.BlockSpec((rows, block), lambda n, group: (group, n))
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((lanes // rows, rows // width, length), jnp.float32),
        grid=(length // block, lanes // rows),
        in_specs=[tile, tile],
        out_specs=pl.BlockSpec((1, rows // width, block), lambda n, group: (group, 0, n)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="packed_inner",
        metadata=settings(width=width, block=block),
        interpret=interpret,
    )(x, y)
    return out.reshape(-1, length)
