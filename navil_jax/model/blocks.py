"""Which blocks of packed rows attention computes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from navil_jax.batch import AnyArray


def needed_blocks(segment_ids: Int[AnyArray, "B S"], block: int, causal: bool) -> Bool[Array, "n n"]:
    """Which pairs of blocks are computed: those whose ranges of segment ids meet, and every block with itself.

    Args:
      segment_ids: whole blocks, S = k * block; 0 = empty.

    Returns:
      n = B * k; query block by key block, the rows one behind the other.

    Example: ids 1 1 | 1 2 | 3 3 with block 2 -> query block 0 sees 0 1 -, block 1 sees 0 1 -, block 2 sees - - 2
    """
    first, last = block_ranges(segment_ids, block)
    number = jnp.arange(len(first))
    row = number // (segment_ids.shape[1] // block)
    needed = (first[:, None] <= last) & (first <= last[:, None]) & (row[:, None] == row)
    return needed & (number[:, None] >= number) if causal else needed


def block_ranges(segment_ids: Int[AnyArray, "B S"], block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the largest id of each block; its empty positions are a segment of their own."""
    ids = segment_ids.reshape(-1, block)
    empty = jnp.iinfo(jnp.int32).max - len(ids) + jnp.arange(len(ids))
    ids = jnp.where(ids == 0, empty[:, None], ids)
    return ids.min(axis=1), ids.max(axis=1)
