"""Flash attention, forward and backward, over a list of pairs of blocks.

A grid step computes one pair of blocks for several heads. All arrays are turned, features by positions, as the compiler
likes to lay out activations whose width is no multiple of a register's 128 lanes. Scores stand as [keys, queries]:
sums and maxima run over sublanes, in the vector units, and values stream through probabilities that the matrix unit
holds, so that heads of 64 features fill it. Stages of neighbouring tiles stand side by side in the program, as the
compiler does not look far ahead.

A head of a query or key has LANES rows, a head of a value `width`. Two ways to mask and to keep powers of two in range:
  spare rows  of queries and keys hold both (`spare_rows.py`): scores arrive masked and shifted, nothing is done here
  exact       segment ids in pairs that need it, and a running maximum
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from navil_jax.model.kernels.pairs import FIRST, LAST, PARTIAL, Pairs

LANES, SUBLANES = 128, 8
MASKED = -1e30
BLOCK = 512  # positions of a block, in rows that are long enough
NT = (((1,), (1,)), ((), ()))  # contraction of both last dimensions
NN = (((1,), (0,)), ((), ()))
dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def block_size(length: int) -> int:
    """The length of a block for rows of `length`: whole lanes, few empty positions at the end, at most BLOCK."""
    blocks = -(-length // BLOCK)
    return -(-length // (LANES * blocks)) * LANES


class Blocks(NamedTuple):
    """How a kernel divides its work."""

    block: int  # positions of a block
    tile: int  # queries of a block at a time
    heads: int  # of a grid step
    vmem: int  # bytes that a kernel may take


def forward(
    q: Float[Array, "H*lanes S"],
    k: Float[Array, "H*lanes S"],
    v: Float[Array, "H*width S"],
    pairs: Pairs,
    blocks: Blocks,
    segment_ids: Int32[Array, " S"] | None = None,
    *,
    width: int,
    interpret: bool = False,
) -> tuple[Float[Array, "H*width S"], Float32[Array, "groups heads S"]]:
    """Attention of every query block over its key blocks.

    Args:
      q: scaled so that a score's power of two is its weight.
      pairs: those of a query block side by side.
      segment_ids: for the exact way; None: spare rows hold the mask.

    Returns:
      Output in q's dtype, and log2 of the sum of each query's powers, heads in groups of `blocks.heads`.
    """
    length, heads, per = q.shape[1], q.shape[0] // LANES, blocks.heads
    exact = segment_ids is not None

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        ids, (out_ref, lse_ref, out_acc, sum_acc, keys, top_acc) = refs[:-6], refs[-6:]
        flags = flags_ref[pl.program_id(1)]

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            out_acc[...] = jnp.zeros_like(out_acc)
            sum_acc[...] = jnp.zeros_like(sum_acc)
            if exact:
                top_acc[...] = jnp.full_like(top_acc, MASKED)

        for head in range(per):
            keys[:, rows_of(head, LANES)] = k_ref[rows_of(head, LANES)].T

        def work(partial: bool) -> None:
            def scores(head: int, columns: slice) -> jax.Array:
                s = dot(keys[:, rows_of(head, LANES)], q_ref[rows_of(head, LANES), columns], NN)
                return jnp.where(same_segment(ids, columns, blocks), s, MASKED) if partial else s

            def weights(head: int, columns: slice, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                scale = None
                if exact:
                    before = top_acc[head, :1, columns]
                    top_acc[head, :1, columns] = jnp.maximum(before, s.max(0, keepdims=True))
                    s = s - top_acc[head, :1, columns]
                    scale = jnp.exp2(before - top_acc[head, :1, columns])
                    sum_acc[head, :, columns] *= scale
                p = jnp.exp2(s).astype(q_ref.dtype)  # the sum is of rounded weights, too: a large one's error cancels
                sum_acc[head, :, columns] += p.astype(jnp.float32).reshape(-1, SUBLANES, blocks.tile).sum(0)
                return p, scale

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array | None]) -> None:
                p, scale = given
                rows = rows_of(head, width)
                before = out_acc[rows, columns]
                out_acc[rows, columns] = dot(v_ref[rows], p, NN) + (before if scale is None else before * scale)

            side_by_side(blocks, scores, weights, add)

        where_needed(work, exact, flags)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            for head in range(per):
                rows, total = rows_of(head, width), sum_acc[head].sum(0, keepdims=True)
                out_ref[rows] = (out_acc[rows] / total).astype(out_ref.dtype)
                lse = jnp.log2(total)
                lse_ref[0, head : head + 1] = lse + top_acc[head, :1] if exact else lse

    tables, specs = id_tables(segment_ids, blocks.block)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, q.dtype),
            jax.ShapeDtypeStruct((heads // per, per, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads // per, pairs.used),
            in_specs=[
                _turned(0, per * LANES, blocks),
                _turned(1, per * LANES, blocks),
                _turned(1, per * width, blocks),
                *specs,
            ],
            out_specs=[_turned(0, per * width, blocks), of_queries(per, blocks)],
            scratch_shapes=[
                pltpu.VMEM((per * width, blocks.block), jnp.float32),
                pltpu.VMEM((per, SUBLANES, blocks.block), jnp.float32),
                pltpu.VMEM((blocks.block, per * LANES), k.dtype),
                pltpu.VMEM((per if exact else 1, SUBLANES, blocks.block), jnp.float32),
            ],
        ),
        compiler_params=compiler_params(blocks),
        name=f"packed_fwd_{'exact' if exact else 'spare'}",
        metadata=settings(width=width, block=blocks.block, tile=blocks.tile, heads=per),
        interpret=interpret,
    )(*pairs[:3], q, k, v, *tables)


def backward(
    q: Float[Array, "H*lanes S"],
    k: Float[Array, "H*lanes S"],
    v: Float[Array, "H*width S"],
    gradient: Float[Array, "H*width S"],
    sums: Float32[Array, "groups 2*heads S"],
    pairs: Pairs,
    blocks: Blocks,
    segment_ids: Int32[Array, " S"] | None = None,
    *,
    width: int,
    row: int,
    interpret: bool = False,
) -> tuple[Float32[Array, "H*width S"], Float32[Array, "H*width S"], Float[Array, "H*width S"]]:
    """Gradients of `forward`, its scores computed anew.

    Args:
      gradient: of the output.
      sums: of each query, heads in groups of `blocks.heads`: what `forward` returned, then output times gradient.
      pairs: those of a key block side by side, row after row.
      row: positions of a row; gradients of a row's queries are held in VMEM, `blocks.heads * width * row` numbers.

    Returns:
      Gradients of queries and keys but for a factor ln 2, which the base of the powers brings; and of values.
    """
    heads, per, block = q.shape[0] // LANES, blocks.heads, blocks.block
    exact, dtype = segment_ids is not None, q.dtype

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        (g_ref, sums_ref, *ids), (dq_ref, dk_ref, dv_ref), scratch = refs[:-9], refs[-9:-6], refs[-6:]
        dq_acc, dk_acc, dv_acc, keys, values, copied = scratch
        group, number = pl.program_id(0), pl.program_id(1)
        flags = flags_ref[number]
        start, here = (pl.multiple_of(jax.lax.rem(ref[number] * block, row), block) for ref in (query_ref, key_ref))

        @pl.when((flags & FIRST != 0) & (here == 0))
        def _() -> None:
            dq_acc[...] = jnp.zeros_like(dq_acc)

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)
            for head in range(per):
                keys[:, rows_of(head, LANES)] = k_ref[rows_of(head, LANES)].T
                values[:, rows_of(head, LANES)] = _alone(v_ref[_register(head, width)].T, head, width)

        def work(partial: bool) -> None:
            def products(head: int, columns: slice) -> tuple[jax.Array, jax.Array]:
                own = rows_of(head, LANES)
                s = dot(keys[:, own], q_ref[own, columns], NN)
                s = jnp.where(same_segment(ids, columns, blocks), s, MASKED) if partial else s
                return s, dot(values[:, own], g_ref[_register(head, width), columns], NN)

            def slopes(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                s, dp = given
                p = jnp.exp2(s - sums_ref[0, head : head + 1, columns])
                inner = sums_ref[0, per + head : per + head + 1, columns]
                return p.astype(dtype), (p * (dp - inner)).astype(dtype)

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> None:
                p, ds = given
                rows, features = rows_of(head, width), slice(head * LANES, head * LANES + width)
                dv_acc[rows] += dot(g_ref[rows, columns], p, NT)
                dk_acc[rows] += dot(q_ref[features, columns], ds, NT)
                there = pl.ds(pl.multiple_of(start + columns.start, blocks.tile), blocks.tile)
                dq_acc[rows, there] += dot(k_ref[features], ds, NN)

            side_by_side(blocks, products, slopes, add)

        where_needed(work, exact, flags)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            dk_ref[...] = dk_acc[...]
            dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

        @pl.when((flags & LAST != 0) & (here == row - block))
        def _() -> None:
            of_row = pl.ds(key_ref[number] * block - here, row)
            target = dq_ref.at[pl.ds(group * per * width, per * width), of_row]
            copy = pltpu.make_async_copy(dq_acc, target, copied)
            copy.start()
            copy.wait()

    tables, specs = id_tables(segment_ids, block)
    by_key = functools.partial(_turned, 1, blocks=blocks)
    return pl.pallas_call(
        kernel,
        out_shape=[
            *(jax.ShapeDtypeStruct(v.shape, jnp.float32),) * 2,
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads // per, pairs.used),
            in_specs=[
                _turned(0, per * LANES, blocks),
                by_key(per * LANES),
                by_key(per * width),
                _turned(0, per * width, blocks),
                of_queries(2 * per, blocks),
                *specs,
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), by_key(per * width), by_key(per * width)],
            scratch_shapes=[
                pltpu.VMEM((per * width, row), jnp.float32),
                *(pltpu.VMEM((per * width, block), jnp.float32),) * 2,
                *(pltpu.VMEM((block, per * LANES), dtype),) * 2,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=compiler_params(blocks),
        name=f"packed_bwd_{'exact' if exact else 'spare'}",
        metadata=settings(width=width, block=block, tile=blocks.tile, heads=per),
        interpret=interpret,
    )(*pairs[:3], q, k, v, gradient, sums, *tables)


def settings(**sizes: int) -> dict[str, str]:
    """What a kernel says of itself in the compiled program and in profiles."""
    return {"xprof_metadata": json.dumps(sizes)}


def side_by_side(blocks: Blocks, *stages: Callable[..., Any]) -> None:
    """Runs the stages for every head and tile, each stage one tile behind the one before it.

    Example: stages a b, tiles 0 1 2 -> a0 a1 b0 a2 b1 b2
    """
    starts = range(0, blocks.block, blocks.tile)
    tiles = [(head, slice(start, start + blocks.tile)) for head in range(blocks.heads) for start in starts]
    made: list[dict[int, Any]] = [{} for _ in stages]
    for step in range(len(tiles) + len(stages) - 1):
        for number, stage in enumerate(stages):
            at = step - number
            if 0 <= at < len(tiles):
                given = (made[number - 1].pop(at),) if number else ()
                made[number][at] = stage(*tiles[at], *given)


def where_needed(work: Callable[[bool], None], exact: bool, flags: jax.Array) -> None:
    """Runs the work of a pair, with a mask where that is the kernel's to apply and the pair needs one."""
    if not exact:
        return work(False)
    pl.when(flags & PARTIAL != 0)(functools.partial(work, True))
    pl.when(flags & PARTIAL == 0)(functools.partial(work, False))
    return None


def rows_of(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _register(head: int, width: int) -> slice:
    """The rows of the heads that share a register of lanes with this one, once they are turned."""
    first = head * width // LANES * LANES
    return slice(first, first + LANES)


def _alone(values: jax.Array, head: int, width: int) -> jax.Array:
    """[keys, LANES] with zeros in the place of other heads."""
    lane, first = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1), head * width % LANES
    return jnp.where((lane >= first) & (lane < first + width), values, jnp.zeros_like(values))


def same_segment(ids: Any, columns: slice, blocks: Blocks) -> jax.Array:
    """[keys, queries of a tile]: whether the query sees the key."""
    of_queries, of_keys = ids
    return jnp.tile(of_keys[...], (1, blocks.tile // LANES)) == of_queries[:1, columns]


def id_tables(segment_ids: Int32[Array, " S"] | None, block: int) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Segment ids of queries along lanes and of keys along sublanes, as the exact way reads them."""
    if segment_ids is None:
        return [], []
    size = segment_ids.size
    tables = [jnp.broadcast_to(segment_ids, (SUBLANES, size)), jnp.broadcast_to(segment_ids[:, None], (size, LANES))]
    by_query = pl.BlockSpec((SUBLANES, block), lambda group, n, query, key, flags: (0, query[n]))
    by_key = pl.BlockSpec((block, LANES), lambda group, n, query, key, flags: (key[n], 0))
    return tables, [by_query, by_key]


def _turned(side: int, rows: int, blocks: Blocks) -> pl.BlockSpec:
    """Rows of the step's heads, positions of a pair's query block (side 0) or key block (1)."""
    return pl.BlockSpec((rows, blocks.block), lambda group, n, *pairs: (group, pairs[side][n]))


def of_queries(numbers: int, blocks: Blocks) -> pl.BlockSpec:
    """So many numbers for each query."""
    return pl.BlockSpec((1, numbers, blocks.block), lambda group, n, query, key, flags: (group, 0, query[n]))


def compiler_params(blocks: Blocks) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem)
