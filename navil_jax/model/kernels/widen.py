"""Rotates queries and keys, and gives each head the lanes that `flash` reads: before and after the attention kernels.

A head of up to MOST_WIDTH features leaves lanes of the matrix unit's contraction unused. They carry what would be work of
the vector units for every score:
  the mask   a code of 16 signs for each segment: equal codes add 0 to a score, others -256 or less
  the shift  of each query, less than an upper bound of its scores (its norm times the largest norm of a key) by ROOM: no
             running maximum is needed as long as that bound is at most MOST_BOUND
Scores are made for powers of two: queries carry log2(e), multiplied before they are rounded.

Example: a head of 64: lanes 0-63 its features, 64-79 the code (times 128 in queries), 80 the constant of the mask, 81 the
shift (1 in keys).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from navil_jax.model.kernels.flash import LANES

CODE = 16  # signs of a segment's code
STEP = 128.0  # a sign that differs adds -2 * STEP
ROOM = 60.0  # powers of two above 1 that weights may take
MOST_BOUND = 90.0  # scores lie within it of 0, so that the largest weight of a query is at least 2**(ROOM - 180)
MOST_WIDTH = LANES - CODE - 2
MOST_SEGMENTS = 1 << CODE


class Tables(NamedTuple):
    """What all layers and heads share."""

    cos: Float32[Array, "S lanes"]  # of both halves of a head, repeated over the lanes
    sin: Float32[Array, "S lanes"]  # negative for the first half
    query_lanes: Float[Array, "S lanes"]  # what stands beside a query's features, but for the shift
    key_lanes: Float[Array, "S lanes"]


def rotation_lanes(
    cos: Float32[Array, "S half"], sin: Float32[Array, "S half"]
) -> tuple[Float32[Array, "S lanes"], Float32[Array, "S lanes"]]:
    """Cosines and sines as they multiply a register of heads and one of heads with halves swapped."""
    heads = LANES // (2 * cos.shape[1])
    return jnp.tile(cos, (1, 2 * heads)), jnp.tile(jnp.concatenate([-sin, sin], 1), (1, heads))


def mask_lanes(segment_ids: Int32[Array, " S"], width: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The lanes of queries and keys that are no features: [S, LANES] each."""
    code = jnp.where((segment_ids[:, None] >> jnp.arange(CODE)) & 1, 1.0, -1.0)
    ones, fill = jnp.ones((len(code), 1)), jnp.zeros((len(code), LANES - width - CODE - 2))
    before = jnp.zeros((len(code), width))
    query = jnp.concatenate([before, code * STEP, -CODE * STEP * ones, 0 * ones, fill], 1)
    return query.astype(dtype), jnp.concatenate([before, code, ones, ones, fill], 1).astype(dtype)


def widen(
    x: Float[Array, "S H*width"],
    tables: Tables,
    limits: Float32[Array, " H"] | None,
    *,
    width: int,
    block: int,
    interpret: Any = False,
) -> tuple[Float[Array, "S H*lanes"], Float32[Array, " H"]]:
    """Rotates heads and widens them to LANES.

    Args:
      limits: for queries, the largest norm of each head's keys; None: x are keys.

    Returns:
      Widened heads in x's dtype; for queries an upper bound of each head's scores, for keys their largest norm.
    """
    length, heads = x.shape[0], x.shape[1] // width
    per, blocks = LANES // width, length // block
    queries = limits is not None
    scale = width**-0.5 * math.log2(math.e) if queries else 1.0

    def kernel(limit_ref: Any, x_ref: Any, cos_ref: Any, sin_ref: Any, lanes_ref: Any, out_ref: Any, top_ref: Any) -> None:
        lane = jax.lax.broadcasted_iota(jnp.int32, (block, LANES), 1)
        turned = _turn(x_ref[...].astype(jnp.float32), cos_ref[...], sin_ref[...], width) * scale
        for head in range(per):
            mine = jnp.where(lane < width, pltpu.roll(turned, -head * width % LANES, 1), 0.0)
            norm = jnp.sqrt(jnp.sum(mine * mine, axis=1, keepdims=True))
            wide = jnp.where(lane < width, mine.astype(x.dtype), lanes_ref[...])
            if queries:
                norm = norm * limit_ref[pl.program_id(1) * per + head]
                wide = jnp.where(lane == width + CODE + 1, (ROOM - norm).astype(x.dtype), wide)
            out_ref[:, head * LANES : (head + 1) * LANES] = wide
            top_ref[0, head : head + 1] = jnp.broadcast_to(norm.max(0, keepdims=True), (1, LANES))

    tile = lambda lanes: pl.BlockSpec((block, lanes), lambda n, group, limit: (n, group))  # noqa: E731
    shared = pl.BlockSpec((block, LANES), lambda n, group, limit: (n, 0))
    wide, top = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((length, heads * LANES), x.dtype),
            jax.ShapeDtypeStruct((blocks * heads // per, per, LANES), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(blocks, heads // per),
            in_specs=[tile(LANES), shared, shared, shared],
            out_specs=[
                tile(per * LANES),
                pl.BlockSpec((1, per, LANES), lambda n, group, limit: (n * (heads // per) + group, 0, 0)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"packed_widen_{'queries' if queries else 'keys'}",
        interpret=interpret,
    )(
        jnp.zeros(1, jnp.float32) if limits is None else limits,
        x,
        tables.cos,
        tables.sin,
        tables.query_lanes if queries else tables.key_lanes,
    )
    return wide, top[..., 0].reshape(blocks, heads).max(0)


def narrow(
    gradient: Float32[Array, "S H*width"] | Float32[Array, "H*width S"],
    tables: Tables,
    *,
    width: int,
    block: int,
    queries: bool,
    dtype: Any,
    interpret: Any = False,
) -> Float[Array, "S H*width"]:
    """The gradient of what `widen` was given, from what `flash.backward` returns: of queries turned, of keys not."""
    length, lanes = gradient.shape[::-1] if queries else gradient.shape
    scale = width**-0.5 if queries else math.log(2)

    def kernel(g_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any) -> None:
        found = g_ref[...].T if queries else g_ref[...]
        out_ref[...] = (_turn(found, cos_ref[...], -sin_ref[...], width) * scale).astype(dtype)

    tile, shared = (
        pl.BlockSpec((block, LANES), index) for index in (lambda n, group: (n, group), lambda n, group: (n, 0))
    )
    turned = pl.BlockSpec((LANES, block), lambda n, group: (group, n))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((length, lanes), dtype),
        grid=(length // block, lanes // LANES),
        in_specs=[turned if queries else tile, shared, shared],
        out_specs=tile,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"packed_narrow_{'queries' if queries else 'keys'}",
        interpret=interpret,
    )(gradient, tables.cos, tables.sin)


def inner_products(
    x: Float[Array, "S H*width"], y: Float[Array, "S H*width"], *, width: int, block: int, interpret: Any = False
) -> Float32[Array, "H S"]:
    """The sum over features of x times y, of each head and position."""
    length, lanes = x.shape
    per = max(1, LANES // width)

    def kernel(x_ref: Any, y_ref: Any, out_ref: Any) -> None:
        products = (x_ref[...].astype(jnp.float32) * y_ref[...].astype(jnp.float32)).T
        for head in range(per):
            out_ref[0, head : head + 1] = products[head * width : (head + 1) * width].sum(0, keepdims=True)

    tile = pl.BlockSpec((block, per * width), lambda n, group: (n, group))
    groups = lanes // (per * width)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, per, length), jnp.float32),
        grid=(length // block, groups),
        in_specs=[tile, tile],
        out_specs=pl.BlockSpec((1, per, block), lambda n, group: (group, 0, n)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="packed_inner",
        interpret=interpret,
    )(x, y)
    return out.reshape(groups * per, length)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array, width: int) -> jax.Array:
    """Rotates the pairs (i, i + width/2) of the heads in a register's lanes."""
    half = width // 2
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    swapped = jnp.where(lane % width < half, pltpu.roll(x, LANES - half, 1), pltpu.roll(x, half, 1))
    return x * cos + swapped * sin
