"""Attention on TPUs for heads of 128, inside segments, causal or not, whose keys several queries may share.

As `flash`, but arrays are positions by features, as projections write them: a head is a register of lanes. Scores are
masked by segment ids, and by positions where attention is causal, in pairs of blocks that need it, and a running
maximum keeps powers in range.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from navil_jax.model.kernels import flash
from navil_jax.model.kernels.flash import LANES, MASKED, NN, NT, SUBLANES, Blocks, dot, rows_of
from navil_jax.model.kernels.pairs import FIRST, LAST, Pairs, block_pairs

MOST_HEADS, MOST_BACKWARD_HEADS = 7, 4  # query heads of a grid step
OTHER_BYTES = 10 * 2**20  # of VMEM, beside the gradients of a row's queries


class Shape(NamedTuple):
    """The sizes that the kernels are made for."""

    heads: int  # of queries
    sharing: int  # queries that share a key
    causal: bool  # a position sees no later one
    row: int  # positions of a row, whole blocks
    block: int
    met: int  # blocks that one block meets at most
    cores: int  # of a device
    vmem: int  # bytes that a kernel may take
    interpret: bool = False

    def blocks(self, tile: int, *, backward: bool = False) -> Blocks | None:
        """How a kernel divides its work; None: the gradients of a row's queries are too many for its memory."""
        each = self.heads // self.cores if self.heads % self.cores == 0 else self.heads
        most = max(MOST_BACKWARD_HEADS if backward else MOST_HEADS, self.sharing)
        if backward:
            most = min(most, (self.vmem - OTHER_BYTES) // (4 * LANES * self.row))
        fitting = [n for n in range(self.sharing, most + 1, self.sharing) if each % n == 0]
        return Blocks(self.block, min(tile, self.block), max(fitting), self.vmem) if fitting else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "S H*lanes"],
    k: Float[Array, "S K*lanes"],
    v: Float[Array, "S K*lanes"],
    segment_ids: Int32[Array, "B row"],
    shape: Shape,
) -> Float[Array, "S H*lanes"]:
    """Every position sees those of its segment, up to itself where `shape.causal`; scores are scaled by LANES**-0.5.

    Args:
      q, k, v: rotated, rows one behind the other, heads side by side.
      segment_ids: whole blocks; 0 = empty.
    """
    return _forward(q, k, v, segment_ids, shape)[0]


def _scaled(q: jax.Array) -> jax.Array:
    return (q.astype(jnp.float32) * (LANES**-0.5 * math.log2(math.e))).astype(q.dtype)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, shape: Shape
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    blocks = shape.blocks(LANES)
    assert blocks is not None, shape
    pairs = block_pairs(segment_ids, shape.block, causal=shape.causal, width=shape.met)
    out, lse = forward(
        *(_scaled(q), k, v, pairs, blocks, segment_ids.reshape(-1)), causal=shape.causal, interpret=shape.interpret
    )
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, segment_ids, out, lse)


def _backward(shape: Shape, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[Any, ...]:
    q, k, v, segment_ids, out, lse = kept
    blocks = shape.blocks(256 if shape.block % 256 == 0 else LANES, backward=True)
    assert blocks is not None, shape
    pairs = block_pairs(segment_ids, shape.block, causal=shape.causal, by_key=True, width=shape.met)
    products = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    inner = products.reshape(len(q), shape.heads, LANES).sum(-1).T
    sums = jnp.concatenate([x.reshape(-1, blocks.heads, len(q)) for x in (lse, inner)], axis=1)
    of_q, of_k, of_v = backward(
        *(_scaled(q), k, v, gradient, sums, pairs, blocks, segment_ids.reshape(-1)),
        causal=shape.causal,
        row=shape.row,
        interpret=shape.interpret,
    )
    return (of_q.T * LANES**-0.5).astype(q.dtype), (of_k * math.log(2)).astype(k.dtype), of_v, None


attend.defvjp(_forward, _backward)


def forward(
    q: Float[Array, "S H*lanes"],
    k: Float[Array, "S K*lanes"],
    v: Float[Array, "S K*lanes"],
    pairs: Pairs,
    blocks: Blocks,
    segment_ids: Int32[Array, " S"],
    *,
    causal: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "S H*lanes"], Float32[Array, "groups heads S"]]:
    """Attention of every query block over its key blocks.

    Args:
      q: scaled so that the power of two of a score is its weight; query head h reads key head h // (H / K).
      pairs: those of a query block side by side.

    Returns:
      Output, and log2 of the sum of each query's powers, heads in groups of `blocks.heads`.
    """
    (length, lanes), per, block = q.shape, blocks.heads, blocks.block
    sharing, groups = lanes // k.shape[1], lanes // LANES // per
    keys_per = per // sharing

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        out_ref, lse_ref, out_acc, sum_acc, top_acc, values = refs[2:]
        query, key, flags = (ref[pl.program_id(1)] for ref in (query_ref, key_ref, flags_ref))
        sees = functools.partial(_sees, refs[:2], query, key, blocks, causal)

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            out_acc[...] = jnp.zeros_like(out_acc)
            sum_acc[...] = jnp.zeros_like(sum_acc)
            top_acc[...] = jnp.full_like(top_acc, MASKED)

        values[...] = v_ref[...].T

        def work(partial: bool) -> None:
            def scores(head: int, columns: slice) -> jax.Array:
                s = dot(k_ref[:, rows_of(head // sharing, LANES)], q_ref[columns, rows_of(head, LANES)], NT)
                return jnp.where(sees(columns), s, MASKED) if partial else s

            def weights(head: int, columns: slice, s: jax.Array) -> tuple[jax.Array, jax.Array]:
                before = top_acc[head, :1, columns]
                top = jnp.maximum(before, s.max(0, keepdims=True))
                p, scale = jnp.exp2(s - top).astype(q_ref.dtype), jnp.exp2(before - top)
                part = p.astype(jnp.float32).reshape(-1, SUBLANES, p.shape[1]).sum(0)
                sum_acc[head, :, columns] = scale * sum_acc[head, :, columns] + part
                top_acc[head, :1, columns] = top
                return p, scale

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> None:
                (p, scale), rows = given, rows_of(head, LANES)
                out = dot(values[rows_of(head // sharing, LANES)], p, NN)
                out_acc[rows, columns] = out + out_acc[rows, columns] * scale

            flash.side_by_side(blocks, scores, weights, add)

        flash.where_needed(work, True, flags)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            for head in range(per):
                rows, total = rows_of(head, LANES), sum_acc[head].sum(0, keepdims=True)
                out_ref[:, rows] = (out_acc[rows] / total).T.astype(out_ref.dtype)
                lse_ref[0, head : head + 1] = jnp.log2(total) + top_acc[head, :1]

    tables, specs = flash.id_tables(segment_ids, block)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((groups, per, length), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(groups, pairs.used),
            in_specs=[_folded(0, per, block), _folded(1, keys_per, block), _folded(1, keys_per, block), *specs],
            out_specs=[_folded(0, per, block), flash.of_queries(per, blocks)],
            scratch_shapes=[
                pltpu.VMEM((per * LANES, block), jnp.float32),
                pltpu.VMEM((per, SUBLANES, block), jnp.float32),
                pltpu.VMEM((per, SUBLANES, block), jnp.float32),
                pltpu.VMEM((keys_per * LANES, block), v.dtype),
            ],
        ),
        compiler_params=flash.compiler_params(blocks),
        name="wide_fwd",
        metadata=flash.settings(width=LANES, block=block, tile=blocks.tile, heads=per, sharing=sharing, causal=causal),
        interpret=interpret,
    )(*pairs[:3], q, k, v, *tables)


def backward(
    q: Float[Array, "S H*lanes"],
    k: Float[Array, "S K*lanes"],
    v: Float[Array, "S K*lanes"],
    gradient: Float[Array, "S H*lanes"],
    sums: Float32[Array, "groups 2*heads S"],
    pairs: Pairs,
    blocks: Blocks,
    segment_ids: Int32[Array, " S"],
    *,
    causal: bool,
    row: int,
    interpret: bool = False,
) -> tuple[Float32[Array, "H*lanes S"], Float32[Array, "S K*lanes"], Float[Array, "S K*lanes"]]:
    """Gradients of `forward`, its scores computed anew; arguments as `flash.backward` has them, but for the layout.

    Returns:
      Gradients of queries, turned, and of keys, both but for a factor ln 2; and of values.
    """
    (length, lanes), per, block, dtype = q.shape, blocks.heads, blocks.block, q.dtype
    sharing, groups = lanes // k.shape[1], lanes // LANES // per
    keys_per = per // sharing

    def kernel(query_ref: Any, key_ref: Any, flags_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
        (g_ref, sums_ref, *ids), (dq_ref, dk_ref, dv_ref), scratch = refs[:4], refs[4:7], refs[7:]
        dq_acc, dk_acc, dv_acc, keys, queries, gradients, copied = scratch
        group, number = pl.program_id(0), pl.program_id(1)
        query, key, flags = (ref[number] for ref in (query_ref, key_ref, flags_ref))
        sees = functools.partial(_sees, ids, query, key, blocks, causal)
        start, here = (pl.multiple_of(jax.lax.rem(place * block, row), block) for place in (query, key))

        @pl.when((flags & FIRST != 0) & (here == 0))
        def _() -> None:
            dq_acc[...] = jnp.zeros_like(dq_acc)

        @pl.when(flags & FIRST != 0)
        def _() -> None:
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)
            keys[...] = k_ref[...].T

        queries[...] = q_ref[...].T
        gradients[...] = g_ref[...].T

        def work(partial: bool) -> None:
            def products(head: int, columns: slice) -> tuple[jax.Array, jax.Array]:
                own, shared = rows_of(head, LANES), rows_of(head // sharing, LANES)
                s = dot(k_ref[:, shared], q_ref[columns, own], NT)
                s = jnp.where(sees(columns), s, MASKED) if partial else s
                return s, dot(v_ref[:, shared], g_ref[columns, own], NT)

            def slopes(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                s, dp = given
                p = jnp.exp2(s - sums_ref[0, head : head + 1, columns])
                inner = sums_ref[0, per + head : per + head + 1, columns]
                return p.astype(dtype), (p * (dp - inner)).astype(dtype)

            def add(head: int, columns: slice, given: tuple[jax.Array, jax.Array]) -> None:
                (p, ds), own, shared = given, rows_of(head, LANES), rows_of(head // sharing, LANES)
                dv_acc[shared] += dot(gradients[own, columns], p, NT)
                dk_acc[shared] += dot(queries[own, columns], ds, NT)
                there = pl.ds(pl.multiple_of(start + columns.start, blocks.tile), blocks.tile)
                dq_acc[own, there] += dot(keys[shared], ds, NN)

            flash.side_by_side(blocks, products, slopes, add)

        flash.where_needed(work, True, flags)

        @pl.when(flags & LAST != 0)
        def _() -> None:
            dk_ref[...] = dk_acc[...].T
            dv_ref[...] = dv_acc[...].T.astype(dv_ref.dtype)

        @pl.when((flags & LAST != 0) & (here == row - block))
        def _() -> None:
            of_row = pl.ds(key * block - here, row)
            target = dq_ref.at[pl.ds(group * per * LANES, per * LANES), of_row]
            copy = pltpu.make_async_copy(dq_acc, target, copied)
            copy.start()
            copy.wait()

    tables, specs = flash.id_tables(segment_ids, block)
    by_query, by_key = _folded(0, per, block), _folded(1, keys_per, block)
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((lanes, length), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, jnp.float32),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(groups, pairs.used),
            in_specs=[by_query, by_key, by_key, by_query, flash.of_queries(2 * per, blocks), *specs],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), by_key, by_key],
            scratch_shapes=[
                pltpu.VMEM((per * LANES, row), jnp.float32),
                *(pltpu.VMEM((keys_per * LANES, block), jnp.float32),) * 2,
                pltpu.VMEM((keys_per * LANES, block), dtype),
                *(pltpu.VMEM((per * LANES, block), dtype),) * 2,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        compiler_params=flash.compiler_params(blocks),
        name="wide_bwd",
        metadata=flash.settings(width=LANES, block=block, tile=blocks.tile, heads=per, sharing=sharing, causal=causal),
        interpret=interpret,
    )(*pairs[:3], q, k, v, gradient, sums, *tables)


def _folded(side: int, heads: int, block: int) -> pl.BlockSpec:
    """Positions of a pair's query block (side 0) or key block (1), lanes of the step's heads."""
    return pl.BlockSpec((block, heads * LANES), lambda group, n, *pairs: (pairs[side][n], group))


def _sees(ids: Any, query: jax.Array, key: jax.Array, blocks: Blocks, causal: bool, columns: slice) -> jax.Array:
    """[keys, queries of a tile]: whether the query sees the key."""
    same = flash.same_segment(ids, columns, blocks)
    if not causal:
        return same
    position = functools.partial(jax.lax.broadcasted_iota, jnp.int32, same.shape)
    return same & (key * blocks.block + position(0) <= query * blocks.block + columns.start + position(1))
