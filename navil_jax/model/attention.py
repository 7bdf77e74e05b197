"""The one attention function of both towers, and its backends."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from navil_jax import sharding

Backend = Literal["auto", "xla", "splash"]
QUERY_CHUNK = 512  # the XLA backend never holds more than this many rows of scores of one head
SPLASH_BLOCK = 512


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, causal: bool, backend: Backend
) -> jax.Array:
    """Softmax attention inside segments, scores and softmax in float32, scaled by head_dim**-0.5.

    Args:
      q: [B, S, H, D].
      k, v: [B, S, K, D]; query head h reads key/value head h // (H / K).
      segment_ids: [B, S] int32. A token sees tokens of its own segment alone. Segment 0 is padding, its output is of
        no meaning but finite.
      causal: a token sees no later place of the row.
      backend: "auto" takes splash on TPU and XLA elsewhere, decided where the program is compiled for.

    Returns:
      [B, S, H, D] in q's dtype.

    Example: segment_ids 1 1 2 2, causal: place 3 sees places 2 and 3.
    """
    xla = functools.partial(_xla, causal=causal)
    tpu = functools.partial(_splash, causal=causal)
    if backend == "xla":
        return xla(q, k, v, segment_ids)
    if backend == "splash":
        return tpu(q, k, v, segment_ids)
    return jax.lax.platform_dependent(q, k, v, segment_ids, tpu=tpu, default=xla)


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attention of one new token per row over a cache. q: [B, 1, H, D]; k, v: [B, S, K, D]; lengths: [B] tokens."""
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, causal: bool) -> jax.Array:
    places = jnp.arange(q.shape[1])

    def attend(q: jax.Array, q_segments: jax.Array, q_places: jax.Array) -> jax.Array:
        mask = q_segments[:, :, None] == segment_ids[:, None, :]
        if causal:
            mask &= q_places[:, None] >= places
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")

    if q.shape[1] <= QUERY_CHUNK or q.shape[1] % QUERY_CHUNK:
        return attend(q, segment_ids, places)
    chunks = q.shape[1] // QUERY_CHUNK
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], chunks, QUERY_CHUNK, *x.shape[2:]), 1, 0)  # noqa: E731
    inputs = split(q), split(segment_ids), places.reshape(chunks, QUERY_CHUNK)
    out = jax.lax.map(jax.checkpoint(lambda chunk: attend(*chunk)), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, causal: bool, interpret: bool = False
) -> jax.Array:
    """Splash attention, padded to whole blocks of places; every device runs it on its own rows and heads."""
    length = q.shape[1]
    block = min(SPLASH_BLOCK, -(-length // 128) * 128)
    padding = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        size = (q.shape[2], q.shape[2])
        mask = splash_mask.CausalMask(size) if causal else splash_mask.FullMask(size)
        kernel = splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash.BlockSizes(*(block,) * 8, use_fused_bwd_kernel=False),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        one_row = lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s))  # noqa: E731
        return jax.vmap(one_row)(q, k, v, segment_ids)

    scaled = q * q.shape[-1] ** -0.5
    if not jax.sharding.get_abstract_mesh().empty:
        heads = sharding.partition_spec(("batch", "heads", "slots", "head_dim"))
        kv_heads = sharding.partition_spec(("batch", "kv_heads", "slots", "head_dim"))
        rows = sharding.partition_spec(("batch", "slots"))
        local = jax.shard_map(local, in_specs=(heads, kv_heads, kv_heads, rows), out_specs=heads, check_vma=False)
    return local(scaled, k, v, segment_ids).swapaxes(1, 2)[:, :length]
