"""Attention in plain XLA: block by block on CPU, dense on GPU, and new tokens over a cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from navil_jax.model.blocks import needed_blocks
from navil_jax.sharding import partition_spec

BLOCK = 96  # on CPU a block has about so many positions
QUERY_CHUNK = 512  # dense attention never holds more than this many rows of scores of one head
LEAST_READ = 256  # positions of a cache that are read however few tokens it holds
MASKED = -0.7 * 3.4028235e38  # score of what a token does not see


def xla_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H D"]:
    """The XLA backend: by blocks where it is compiled for CPUs, else dense, as a GPU would wait for every block."""
    blocks, dense = (functools.partial(way, causal=causal) for way in (block_attention, dense_attention))
    return jax.lax.platform_dependent(q, k, v, segment_ids, cpu=blocks, default=dense)


def dense_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H D"]:
    """Scores of all pairs, `QUERY_CHUNK` queries at a time where rows are longer."""
    positions = jnp.arange(q.shape[1])
    k, v = (x.astype(jnp.float32) for x in (k, v))  # so that their gradients, sums over chunks, are float32 ones

    def attend(q: jax.Array, q_segments: jax.Array, q_positions: jax.Array) -> jax.Array:
        mask = q_segments[:, :, None] == segment_ids[:, None, :]
        if causal:
            mask &= q_positions[:, None] >= positions
        keys, values = (x.astype(q.dtype) for x in (k, v))
        return jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None], implementation="xla")

    length = q.shape[1]
    if length <= QUERY_CHUNK:
        return attend(q, segment_ids, positions)
    chunks = -(-length // QUERY_CHUNK)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * QUERY_CHUNK - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    inputs = split(q), split(segment_ids), split(positions[None])[:, 0]
    out = jax.lax.map(jax.checkpoint(lambda chunk: attend(*chunk)), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def block_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B S H D"]:
    """Only the pairs of blocks that hold tokens of one segment, heads first; every device its own rows and heads.

    Forward, blocks of keys are summed up as they come; the gradient knows the logarithms of the sums and computes the
    scores again. How many blocks are visited is read from the segment ids at run time. Output of segment 0 is 0.
    """
    length = q.shape[1]
    block = _block(length)
    padding = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        rows, positions, heads, dim = q.shape
        kv_heads = k.shape[2]
        blocks = rows * positions // block
        split = lambda x: x.reshape(blocks, block, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)  # noqa: E731
        out = _attend(causal, split(q), split(k)[:, :, 0], split(v)[:, :, 0], segment_ids)
        return out.transpose(0, 3, 1, 2, 4).reshape(rows, positions, heads, dim)

    if not jax.sharding.get_abstract_mesh().empty:
        heads = partition_spec(("batch", "positions", "attention_heads", "head_dim"))
        rows = partition_spec(("batch", "positions"))
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, segment_ids)[:, :length]


def _block(length: int) -> int:
    """The length of a block for rows of `length`: about BLOCK, whole vectors, few empty positions at the end."""
    return -(-length // (16 * -(-length // BLOCK))) * 16


class _Visits(NamedTuple):
    """For each block, in which order to visit the others, and how many of them."""

    order: Int[Array, "n n"]
    total: Int[Array, " n"]

    @classmethod
    def along(cls, needed: Bool[Array, "n n"], axis: int) -> "_Visits":
        needed = jnp.moveaxis(needed, axis, 1)
        return cls(jnp.argsort(~needed, axis=1, stable=True), needed.sum(axis=1))


def visited_blocks(causal: bool, segment_ids: jax.Array, block: int) -> Bool[Array, "n n"]:
    """Query block by key block; blocks of padding alone are not visited."""
    used = jnp.any(segment_ids.reshape(-1, block) > 0, axis=1)
    return needed_blocks(segment_ids, block, causal) & used[:, None] & used


def _seen(causal: bool, ids: Int[Array, "n b"], i: jax.Array, j: jax.Array) -> Bool[Array, "b b"]:
    """Which queries of block i see which keys of block j, in that order."""
    seen = (ids[i][:, None] == ids[j]) & (ids[j] > 0)
    if causal:
        within = jnp.arange(ids.shape[1])
        seen &= (i - j) * ids.shape[1] + within[:, None] >= within
    return seen


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    causal: bool,
    q: Float[Array, "n K G b D"],
    k: Float[Array, "n K b D"],
    v: Float[Array, "n K b D"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "n K G b D"]:
    """Attention of blocks of all rows, one row behind the other; n b = B S."""
    return _forward(causal, q, k, v, segment_ids)[0]


def _forward(
    causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    block, scale = q.shape[3], q.shape[-1] ** -0.5
    ids = segment_ids.reshape(-1, block)
    visits = _Visits.along(visited_blocks(causal, segment_ids, block), 1)

    def attend(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def visit(t: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, out = sums
            j = visits.order[i, t]
            scores = _product("kgqd,kcd->kgqc", q[i], k[j]) * scale
            scores = jnp.where(_seen(causal, ids, i, j), scores, MASKED)
            new = jnp.maximum(largest, scores.max(axis=-1))
            shares = jnp.exp(scores - new[..., None])
            before = jnp.exp(largest - new)
            found = _product("kgqc,kcd->kgqd", shares.astype(v.dtype), v[j])
            return new, total * before + shares.sum(axis=-1), out * before[..., None] + found

        zeros = jnp.zeros(q.shape[1:4], jnp.float32)
        nothing = zeros + MASKED, zeros, jnp.zeros(q.shape[1:], jnp.float32)
        largest, total, out = jax.lax.fori_loop(0, visits.total[i], visit, nothing)
        used = ids[i] > 0
        out = jnp.where(used[:, None], out / total[..., None], 0.0)
        return out.astype(q.dtype), jnp.where(used, largest + jnp.log(total), 0.0)

    out, logsumexp = jax.lax.map(attend, jnp.arange(len(q)))
    out, logsumexp = checkpoint_name((out, logsumexp), "attention")
    return out, (q, k, v, segment_ids, out, logsumexp)


def _backward(
    causal: bool, kept: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Visits the query blocks of every key block; all sums are float32.

    Scores stand keys first here, and the gradient of queries features first: so no product transposes scores.
    """
    q, k, v, segment_ids, out, logsumexp = kept
    block, scale = q.shape[3], q.shape[-1] ** -0.5
    ids = segment_ids.reshape(-1, block)
    visits = _Visits.along(visited_blocks(causal, segment_ids, block), 0)
    shift = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)

    def keys(of_q: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def visit(t: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_q, of_k, of_v = sums
            i = visits.order[j, t]
            seen = _seen(causal, ids, i, j).T[:, None]
            scores = _product("kcd,kgqd->kcgq", k[j], q[i]) * scale
            shares = jnp.where(seen, jnp.exp(scores - logsumexp[i][:, None]), 0.0)
            of_shares = _product("kcd,kgqd->kcgq", v[j], gradient[i])
            of_scores = (shares * (of_shares - shift[i][:, None]) * scale).astype(q.dtype)
            of_v += _product("kcgq,kgqd->kcd", shares.astype(gradient.dtype), gradient[i])
            of_k += _product("kcgq,kgqd->kcd", of_scores, q[i])
            of_q = of_q.at[i].add(_product("kcd,kcgq->kdgq", k[j], of_scores))
            return of_q, of_k, of_v

        zeros = jnp.zeros(k.shape[1:], jnp.float32)
        of_q, of_k, of_v = jax.lax.fori_loop(0, visits.total[j], visit, (of_q, zeros, zeros))
        return of_q, (of_k.astype(k.dtype), of_v.astype(v.dtype))

    of_q, (of_k, of_v) = jax.lax.scan(keys, jnp.zeros_like(jnp.moveaxis(q, -1, 2), jnp.float32), jnp.arange(len(q)))
    return jnp.moveaxis(of_q, 2, -1).astype(q.dtype), of_k, of_v, None


_attend.defvjp(_forward, _backward)


@jax.named_scope("attention")
def cached_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "layers B K S D"],
    v: Float[Array, "layers B K S D"],
    layer: Int[Array, ""],
    positions: Int[Array, "B N"],
) -> Float[Array, "B N H D"]:
    """Attention of new tokens over a layer's cache, heads first, in which they are themselves.

    Of the cache no more than the furthest token needs is read, up to halvings; positions past its end do not count.
    """
    size = k.shape[3]
    sizes = [size]
    while sizes[-1] > LEAST_READ:
        sizes.append(-(-sizes[-1] // 2))
    needed = jnp.max(jnp.where(positions < size, positions, 0)) + 1
    ways = [functools.partial(_cached_attention, length) for length in sizes]
    return jax.lax.switch(jnp.sum(needed <= jnp.array(sizes[1:], jnp.int32)), ways, q, k, v, layer, positions)


def _cached_attention(
    length: int, q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, positions: jax.Array
) -> jax.Array:
    """Over the first `length` positions."""
    rows, kv_heads, dim = k.shape[1], k.shape[2], k.shape[4]
    k, v = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), (1, rows, kv_heads, length, dim))[0] for x in (k, v))
    queries = q.reshape(rows, -1, kv_heads, q.shape[2] // kv_heads, dim).transpose(0, 2, 1, 3, 4)
    merged = queries.reshape(rows, kv_heads, -1, dim)  # of all tokens that read the same keys
    scores = jnp.einsum("bkqd,bksd->bkqs", merged, k, preferred_element_type=jnp.float32) * dim**-0.5
    last = jnp.repeat(positions, queries.shape[3], axis=1)
    known = jnp.arange(length) <= last[:, None, :, None]
    shares = jax.nn.softmax(jnp.where(known, scores, MASKED)).astype(v.dtype)
    found = jnp.einsum("bkqs,bksd->bkqd", shares, v).reshape(queries.shape)
    return found.transpose(0, 2, 1, 3, 4).reshape(q.shape)
