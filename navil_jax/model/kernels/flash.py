"""Flash attention, forward and backward, over a list of pairs of blocks.

A grid step computes one pair of blocks for several heads. Scores stand as [keys, queries]: sums and maxima run over
sublanes, in the vector units, and values stream through probabilities that the matrix unit holds, so that heads of 64
features fill it. Stages of neighbouring tiles stand side by side in the program, as the compiler does not look far ahead.

Arrays are [positions, heads * lanes], as the projections of a layer write them: a head of a query or key has LANES lanes,
a head of a value `width`. There are two ways to mask and to keep powers of two in range:
  lanes  by spare lanes of queries and keys (`widen.py`): scores arrive masked and shifted, nothing is done here
  exact  by segment ids in pairs that need it, and by a running maximum
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from navil_jax.model.kernels.pairs import FIRST, LAST, PARTIAL, Pairs

LANES, SUBLANES = 128, 8
MASKED = -1e30
_NT = (((1,), (1,)), ((), ()))  # contraction of both last dimensions
_NN = (((1,), (0,)), ((), ()))
_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class Blocks(NamedTuple):
    """How a kernel divides its work."""

    block: int  # positions of a block
    tile: int  # queries of a block at a time
    heads: int  # query heads of a grid step; a multiple of those that share a key
    vmem: int  # bytes that a kernel may take


class Mask(NamedTuple):
    """What the exact way of masking reads."""

    segment_ids: Int32[Array, " S"]
    causal: bool


def forward(
    q: Float[Array, "S H*lanes"],
    k: Float[Array, "S K*lanes"],
    v: Float[Array, "S K*width"],
    pairs: Pairs,
    blocks: Blocks,
    mask: Mask | None = None,
    *,
    width: int,
    interpret: Any = False,
) -> tuple[Float[Array, "S H*width"], Float32[Array, "groups heads S"]]:
    """Attention of every query block over its key blocks.

    Args:
      q: scaled so that a score's power of two is its weight; query head h reads key head h // (H / K).
      pairs: those of a query block side by side.
      mask: of the exact way; None: queries and keys hold it in their lanes.

    Returns:
      Output in q's dtype, and log2 of the sum of each query's powers, heads in groups of `blocks.heads`.
    """
    length, heads = q.shape[0], q.shape[1] // LANES
    per, sharing = blocks.heads, heads // (v.shape[1] // width)
    keys_per = per // sharing
    exact = mask is not None
    assert sharing == 1 or width == LANES, "shared keys need heads of 128"

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        ids, (out_ref, lse_ref, out_acc, sum_acc, values, top_acc) = refs[:-6], refs[-6:]
        query, key, flags = (ref[pl.program_id(1)] for ref in (query_ref, key_ref, flags_ref))

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            out_acc[...] = jnp.zeros_like(out_acc)
            sum_acc[...] = jnp.zeros_like(sum_acc)
            if exact:
                top_acc[...] = jnp.full_like(top_acc, MASKED)

        values[...] = v_ref[...].T

        def work(partial: bool) -> None:
            def scores(head: int, columns: slice) -> jax.Array:
                s = _dot(k_ref[:, _lanes(head // sharing)], q_ref[columns, _lanes(head)], _NT)
                return jnp.where(_sees(mask, ids, columns, query, key, blocks), s, MASKED) if partial else s

            def weights(head: int, columns: slice, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                if not exact:
                    p = jnp.exp2(s)
                    sum_acc[head, :, columns] += p.reshape(-1, SUBLANES, p.shape[1]).sum(0)
                    return p.astype(q_ref.dtype), None
                before = top_acc[head, :1, columns]
                top = jnp.maximum(before, s.max(0, keepdims=True))
                p, scale = jnp.exp2(s - top), jnp.exp2(before - top)
                part = p.reshape(-1, SUBLANES, p.shape[1]).sum(0)
                sum_acc[head, :, columns] = scale * sum_acc[head, :, columns] + part
                top_acc[head, :1, columns] = top
                return p.astype(q_ref.dtype), scale

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array | None]) -> None:
                p, scale = given
                out = _dot(values[_rows(head // sharing, width)], p, _NN)
                rows = _rows(head, width)
                out_acc[rows, columns] = out + out_acc[rows, columns] * (1.0 if scale is None else scale)

            _side_by_side(blocks, scores, weights, add)

        if exact:
            pl.when(flags & PARTIAL != 0)(functools.partial(work, True))
            pl.when(flags & PARTIAL == 0)(functools.partial(work, False))
        else:
            work(False)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            for head in range(per):
                rows, total = _rows(head, width), sum_acc[head].sum(0, keepdims=True)
                out_acc[rows] = out_acc[rows] / total
                lse = jnp.log2(total)
                lse_ref[0, head : head + 1] = lse + top_acc[head, :1] if exact else lse
            out_ref[...] = out_acc[...].T.astype(out_ref.dtype)

    tables, specs = _tables(mask, blocks.block)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((length, heads * width), q.dtype),
            jax.ShapeDtypeStruct((heads // per, per, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads // per, pairs.count),
            in_specs=[
                _folded(0, blocks.block, per * LANES),
                _folded(1, blocks.block, keys_per * LANES),
                _folded(1, blocks.block, keys_per * width),
                *specs,
            ],
            out_specs=[_folded(0, blocks.block, per * width), _by_query(blocks, per)],
            scratch_shapes=[
                pltpu.VMEM((per * width, blocks.block), jnp.float32),
                pltpu.VMEM((per, SUBLANES, blocks.block), jnp.float32),
                pltpu.VMEM((keys_per * width, blocks.block), v.dtype),
                pltpu.VMEM((per if exact else 1, SUBLANES, blocks.block), jnp.float32),
            ],
        ),
        compiler_params=_compiler_params(blocks),
        name=f"packed_fwd_{'exact' if exact else 'lanes'}",
        interpret=interpret,
    )(*pairs[:3], q, k, v, *tables)


def backward(
    q: Float[Array, "S H*lanes"],
    k: Float[Array, "S K*lanes"],
    v: Float[Array, "S K*width"],
    gradient: Float[Array, "S H*width"],
    sums: Float32[Array, "groups 2*heads S"],
    pairs: Pairs,
    blocks: Blocks,
    mask: Mask | None = None,
    *,
    width: int,
    row: int,
    interpret: Any = False,
) -> tuple[Float32[Array, "H*width S"], Float32[Array, "S K*width"], Float[Array, "S K*width"]]:
    """Gradients of `forward`, its scores computed anew.

    Args:
      gradient: of the output.
      sums: of each query, heads in groups of `blocks.heads`: what `forward` returned, then output times gradient.
      pairs: those of a key block side by side, row after row.
      row: positions of a row; gradients of a row's queries are held in VMEM, `blocks.heads * width * row` numbers.

    Returns:
      Gradients of queries, turned, and of keys, both but for a factor ln 2 that the base brings; and of values.
    """
    length, heads = q.shape[0], q.shape[1] // LANES
    per, sharing, block = blocks.heads, heads // (v.shape[1] // width), blocks.block
    keys_per, dtype = per // sharing, q.dtype
    exact = mask is not None

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, sums_ref: Any, *refs: Any) -> None:
        ids, (dq_ref, dk_ref, dv_ref), scratch = refs[:-11], refs[-11:-8], refs[-8:]
        dq_acc, dk_acc, dv_acc, keys, queries, gradients, v_acc, copied = scratch
        group = pl.program_id(0)
        query, key, flags = (ref[pl.program_id(1)] for ref in (query_ref, key_ref, flags_ref))
        start, here = (pl.multiple_of(jax.lax.rem(number * block, row), block) for number in (query, key))

        @pl.when((flags & FIRST != 0) & (here == 0))
        def _() -> None:
            dq_acc[...] = jnp.zeros_like(dq_acc)

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)
            for head in range(keys_per):
                keys[_rows(head, width)] = k_ref[:, _lanes(head)].T[:width]
                v_acc[:, _lanes(head)] = _alone(v_ref, head, width)

        for head in range(per):
            queries[_rows(head, width)] = q_ref[:, _lanes(head)].T[:width]
        gradients[...] = g_ref[...].T

        def work(partial: bool) -> None:
            def products(head: int, columns: slice) -> tuple[jax.Array, jax.Array]:
                s = _dot(k_ref[:, _lanes(head // sharing)], q_ref[columns, _lanes(head)], _NT)
                if partial:
                    s = jnp.where(_sees(mask, ids, columns, query, key, blocks), s, MASKED)
                return s, _dot(v_acc[:, _lanes(head // sharing)], g_ref[columns, _tile(head, width)], _NT)

            def slopes(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                s, dp = given
                p = jnp.exp2(s - sums_ref[0, head : head + 1, columns])
                inner = sums_ref[0, per + head : per + head + 1, columns]
                return p.astype(dtype), (p * (dp - inner)).astype(dtype)

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> None:
                p, ds = given
                mine, shared = _rows(head, width), _rows(head // sharing, width)
                dv_acc[shared] += _dot(gradients[mine, columns], p, _NT)
                dk_acc[shared] += _dot(queries[mine, columns], ds, _NT)
                there = pl.ds(pl.multiple_of(start + columns.start, blocks.tile), blocks.tile)
                dq_acc[mine, there] += _dot(keys[shared], ds, _NN)

            _side_by_side(blocks, products, slopes, add)

        if exact:
            pl.when(flags & PARTIAL != 0)(functools.partial(work, True))
            pl.when(flags & PARTIAL == 0)(functools.partial(work, False))
        else:
            work(False)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            dk_ref[...] = dk_acc[...].T
            dv_ref[...] = dv_acc[...].T.astype(dv_ref.dtype)

        @pl.when((flags & LAST != 0) & (here == row - block))
        def _() -> None:
            target = dq_ref.at[pl.ds(group * per * width, per * width), pl.ds(key * block - here, row)]
            copy = pltpu.make_async_copy(dq_acc, target, copied)
            copy.start()
            copy.wait()

    tables, specs = _tables(mask, block)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((heads * width, length), jnp.float32),
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(heads // per, pairs.count),
            in_specs=[
                _folded(0, block, per * LANES),
                _folded(1, block, keys_per * LANES),
                _folded(1, block, keys_per * width),
                _folded(0, block, per * width),
                _by_query(blocks, 2 * per),
                *specs,
            ],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), *(_folded(1, block, keys_per * width),) * 2],
            scratch_shapes=[
                pltpu.VMEM((per * width, row), jnp.float32),
                *(pltpu.VMEM((keys_per * width, block), jnp.float32),) * 2,
                pltpu.VMEM((keys_per * width, block), dtype),
                *(pltpu.VMEM((per * width, block), dtype),) * 2,
                pltpu.VMEM((block, keys_per * LANES), dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=_compiler_params(blocks),
        name=f"packed_bwd_{'exact' if exact else 'lanes'}",
        interpret=interpret,
    )(*pairs[:3], q, k, v, gradient, sums, *tables)


def _side_by_side(blocks: Blocks, *stages: Callable[..., Any]) -> None:
    """Runs the stages for every head and tile, each stage one tile behind the one before it.

    Example: stages a b, tiles 0 1 2 -> a0 a1 b0 a2 b1 b2
    """
    tiles = [
        (head, slice(start, start + blocks.tile))
        for head in range(blocks.heads)
        for start in range(0, blocks.block, blocks.tile)
    ]
    made: list[dict[int, Any]] = [{} for _ in stages]
    for step in range(len(tiles) + len(stages) - 1):
        for number, stage in enumerate(stages):
            at = step - number
            if 0 <= at < len(tiles):
                given = (made[number - 1].pop(at),) if number else ()
                made[number][at] = stage(*tiles[at], *given)


def _lanes(head: int) -> slice:
    return slice(head * LANES, (head + 1) * LANES)


def _rows(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _tile(head: int, width: int) -> slice:
    """The lanes of the registers that hold a head of `width` features; other heads may stand beside it."""
    first = head * width // LANES * LANES
    return slice(first, first + LANES)


def _alone(ref: Any, head: int, width: int) -> jax.Array:
    """A head's registers with zeros in the place of other heads."""
    values, first = ref[:, _tile(head, width)], head * width % LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.where((lane >= first) & (lane < first + width), values, jnp.zeros_like(values))


def _sees(mask: Mask, ids: Sequence[Any], columns: slice, query: jax.Array, key: jax.Array, blocks: Blocks) -> jax.Array:
    """[keys, queries of a tile]: whether the query sees the key."""
    of_queries, of_keys = ids
    sees = jnp.tile(of_keys[...], (1, blocks.tile // LANES)) == of_queries[:1, columns]
    if mask.causal:
        position = functools.partial(jax.lax.broadcasted_iota, jnp.int32, sees.shape)
        sees &= key * blocks.block + position(0) <= query * blocks.block + columns.start + position(1)
    return sees


def _tables(mask: Mask | None, block: int) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Segment ids of queries along lanes and of keys along sublanes, as the exact way reads them."""
    if mask is None:
        return [], []
    ids = mask.segment_ids
    tables = [jnp.broadcast_to(ids, (SUBLANES, ids.size)), jnp.broadcast_to(ids[:, None], (ids.size, LANES))]
    by_query = pl.BlockSpec((SUBLANES, block), lambda group, n, query, key, flags: (0, query[n]))
    by_key = pl.BlockSpec((block, LANES), lambda group, n, query, key, flags: (key[n], 0))
    return tables, [by_query, by_key]


def _folded(side: int, block: int, lanes: int) -> pl.BlockSpec:
    """Positions of a pair's query block (side 0) or key block (1), lanes of the step's heads."""
    return pl.BlockSpec((block, lanes), lambda group, n, *pairs: (pairs[side][n], group))


def _by_query(blocks: Blocks, numbers: int) -> pl.BlockSpec:
    """So many numbers for each query."""
    return pl.BlockSpec((1, numbers, blocks.block), lambda group, n, query, key, flags: (group, 0, query[n]))


def _compiler_params(blocks: Blocks) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem)
