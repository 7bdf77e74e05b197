"""The one attention function of both towers, and its backends."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from navil_jax.model.blocks import needed_blocks
from navil_jax.model.kernels import wide
from navil_jax.model.kernels.flash import LANES, block_size
from navil_jax.model.xla_attention import MASKED, xla_attention
from navil_jax.sharding import constrain, partition_spec, shards

Backend = Literal["auto", "xla", "splash"]
SPLASH_BLOCK = 1024  # positions of a block of splash attention, in rows that are long enough
KEY_CHUNK = 512  # keys at a time inside a block of the forward kernel


@jax.named_scope("attention")
def attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    causal: bool,
    backend: Backend,
    longest: int | None = None,
) -> Float[Array, "B S H D"]:
    """Softmax attention inside segments, scores and softmax in float32, scaled by head_dim**-0.5.

    Where the mesh splits rows (context axis), heads are split during attention and every device sees whole rows.

    Args:
      k, v: query head h reads key/value head h // (H / K).
      segment_ids: a token sees tokens of its own segment alone. Segment 0 is padding, its output is of no
        meaning but finite.
      causal: a token sees no later position of the row.
      backend: "auto" takes kernels on TPU (our own for bfloat16 heads of 128, else splash) and XLA elsewhere,
        decided where the program is compiled for.
      longest: the most positions from the first to the last of one segment; None: a whole row. Lists of blocks are
        shorter then.

    Returns:
      In q's dtype.

    Example: segment_ids 1 1 2 2, causal: position 3 sees positions 2 and 3.
    """
    heads, devices = q.shape[2], shards("attention_heads")
    if heads == k.shape[2]:  # empty heads make them divide by the devices
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -heads % devices), (0, 0))) for x in (q, k, v))
    else:  # a key that queries on several devices read is on each of them
        k, v = (jnp.repeat(x, devices // math.gcd(k.shape[2], devices), axis=2) for x in (k, v))
    q, k, v = (whole_rows(x) for x in (q, k, v))
    xla = functools.partial(xla_attention, causal=causal)
    splash = functools.partial(splash_attention, causal=causal, longest=longest)
    if backend == "xla":
        out = xla(q, k, v, segment_ids)
    elif backend == "splash":
        out = splash(q, k, v, segment_ids)
    else:
        shape = wide_shape(q, k, causal, longest)
        tpu = functools.partial(wide_attention, shape=shape) if shape else splash
        out = jax.lax.platform_dependent(q, k, v, segment_ids, tpu=tpu, default=xla)
    return out[:, :, :heads]


def whole_rows(x: Float[Array, "B S H D"]) -> Float[Array, "B S H D"]:
    """Whole rows on every device, in attention, heads split over the mesh where they divide."""
    divides = x.shape[2] % shards("attention_heads") == 0
    return constrain(x, "batch", "positions", "attention_heads" if divides else None, "head_dim")


def wide_shape(
    q: Float[Array, "B S H D"], k: Float[Array, "B S K D"], causal: bool, longest: int | None = None
) -> wide.Shape | None:
    """How `model/kernels/wide` divides these rows on the mesh in scope; None where it does not serve."""
    devices = shards("attention_heads")
    if q.shape[3] != LANES or q.dtype != jnp.bfloat16 or q.shape[2] % devices or k.shape[2] % devices:
        return None
    length, heads, sharing = q.shape[1], q.shape[2] // devices, q.shape[2] // k.shape[2]
    block = block_size(length)
    row = -(-length // block) * block
    met = grid_width(row, block, longest)
    shape = wide.Shape(heads, sharing, causal, row, block, met, cores(), vmem_bytes())
    return shape if shape.blocks(LANES, backward=True) else None


def wide_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    shape: wide.Shape,
) -> Float[Array, "B S H D"]:
    """Our own kernels over pairs of blocks; every device runs them on its own rows and heads."""
    length = q.shape[1]
    padding = (0, shape.row - length)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        folded = (jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), padding, (0, 0))) for x in (q, k, v))
        ids = jnp.pad(segment_ids, ((0, 0), padding))
        out = wide.attend(*(x.reshape(-1, x.shape[2]) for x in folded), ids, shape)
        return out.reshape(len(q), shape.row, -1)[:, :length].reshape(q.shape)

    if not jax.sharding.get_abstract_mesh().empty:
        heads = partition_spec(("batch", "positions", "attention_heads", "head_dim"))
        rows = partition_spec(("batch", "positions"))
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, segment_ids)


def splash_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    segment_ids: Int[Array, "B S"],
    *,
    causal: bool,
    longest: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B S H D"]:
    """Splash attention; every device runs it on its own rows and heads.

    A device's rows stand one behind the other as one long row. Which pairs of blocks are computed is read from the
    segment ids (`needed_blocks`), so a packed row does not cost its square; the table of blocks is given to the kernel
    as data, where the library's own would be fixed when the program is compiled.
    """
    length = q.shape[1]
    block = splash_block(length)
    padding = -length % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        shape = q.shape
        joined = lambda x: x.reshape(-1, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
        needed = needed_blocks(segment_ids, block, causal)
        width = grid_width(segment_ids.shape[1], block, longest)
        positions = jnp.arange(segment_ids.size, dtype=jnp.int32) if causal else None
        by_query, by_key = (_mask_info(*visits(needed, width, axis), positions) for axis in (1, 0))
        kernel = splash.SplashAttentionKernel(
            by_query,
            by_query,
            by_key,
            block_sizes=_block_sizes(block),
            is_mqa=False,
            save_residuals=False,
            mask_value=MASKED,
            attn_logits_soft_cap=None,
            residual_checkpoint_name="attention",
            mask_function=_not_later if causal else None,
            interpret=interpret,
        )
        ids = segment_ids.reshape(-1)
        run = functools.partial(kernel, segment_ids=splash.SegmentIds(ids, ids))
        return on_cores(run, joined(q), joined(k), joined(v), cores()).swapaxes(0, 1).reshape(shape)

    scaled = q * q.shape[-1] ** -0.5
    if not jax.sharding.get_abstract_mesh().empty:
        heads = partition_spec(("batch", "positions", "attention_heads", "head_dim"))
        rows = partition_spec(("batch", "positions"))
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(scaled, k, v, segment_ids)[:, :length]


def on_cores(
    kernel: Callable[[Array, Array, Array], Any],
    q: Float[Array, "H S D"],
    k: Float[Array, "K S D"],
    v: Float[Array, "K S D"],
    count: int,
) -> Float[Array, "H S D"]:
    """Runs a kernel on so many cores of a device, equally many heads on each.

    The compiler divides a grid over cores along a dimension whose steps do not depend on each other; splash attention's
    backward kernels have none, so heads in groups are made one. An odd head more gets an empty one beside it; where
    queries share too few keys to divide, one core does it all.

    Example: 23 heads, 2 cores -> groups of 12 and of 11 and an empty one
    """
    heads = q.shape[0]
    if heads == k.shape[0]:
        q, k, v = (jnp.pad(x, ((0, -heads % count), (0, 0), (0, 0))) for x in (q, k, v))
    if count == 1 or k.shape[0] % count:
        return kernel(q, k, v)
    groups = (x.reshape(count, -1, *x.shape[1:]) for x in (q, k, v))
    return jax.vmap(kernel)(*groups).reshape(q.shape)[:heads]


def cores() -> int:
    """Cores of each device of the mesh in scope: two in v4 and v5p, else one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.num_cores if device is not None else None) or 1


VMEM_MIB = {"TPU v4": 15, "TPU v5 lite": 100, "TPU v6 lite": 100}  # that a kernel may take; others: OTHER_VMEM_MIB
OTHER_VMEM_MIB = 58


def vmem_bytes() -> int:
    """What a kernel may take of VMEM on the devices of the mesh in scope."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return VMEM_MIB.get(device.device_kind if device is not None else "", OTHER_VMEM_MIB) * 2**20


def _block_sizes(block: int) -> splash.BlockSizes:
    """The forward pass takes keys by halves of a block: less waits for the matrix unit (5 to 11% fewer cycles)."""
    keys = KEY_CHUNK if block % KEY_CHUNK == 0 else block
    return splash.BlockSizes(block, block, keys, *(block,) * 5, use_fused_bwd_kernel=False)


def splash_block(length: int) -> int:
    """The length of a block for rows of `length`: whole lanes, few empty positions at the end, at most SPLASH_BLOCK."""
    blocks = -(-length // SPLASH_BLOCK)
    return -(-length // (128 * blocks)) * 128


def grid_width(length: int, block: int, longest: int | None) -> int:
    """The most blocks that the tokens of one block can see in a row of `length` positions.

    A block may hold the end of one segment of `longest` positions and the beginning of another.
    """
    blocks = length // block
    return blocks if longest is None else min(blocks, -(-2 * longest // block) + 2)


def visits(needed: Bool[Array, "n n"], width: int, axis: int) -> tuple[Int[Array, "1 _ _"], Int[Array, "1 _ _"]]:
    """The blocks that the kernel visits, in its order.

    Args:
      needed: query block by key block.
      width: the most that are visited for one block.
      axis: 1 = key blocks for every query block, 0 = query blocks for every key block.

    Returns:
      Which block, and whether to compute it (2) or to pass (0): [1, n, width] int32 for axis 1, [1, width, n] for 0.

    Example: needed 1 1 0 / 0 1 0 / 0 0 1, width 2, axis 1 -> blocks 0 1 / 1 1 / 2 2, compute 2 2 / 2 0 / 2 0
    """
    order = jnp.argsort(~needed, axis=axis, stable=True)
    count = needed.sum(axis=axis, keepdims=True)
    position = jnp.expand_dims(jnp.arange(width), 1 - axis)
    block = jnp.take_along_axis(order, jnp.minimum(position, count - 1), axis=axis)
    return block[None].astype(jnp.int32), jnp.where(position < count, 2, 0)[None].astype(jnp.int32)


def _mask_info(block: jax.Array, compute: jax.Array, positions: jax.Array | None) -> MaskInfo:
    return MaskInfo(
        data_next=block,
        mask_next=None,
        block_mask=compute,
        partial_mask_blocks=None,
        q_sequence=positions,  # type: ignore[arg-type]  # may be traced, as the other fields
        is_dynamic_mask=True,
    )


def _not_later(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    return query_positions >= key_positions
