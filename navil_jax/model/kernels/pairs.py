"""Which pairs of blocks an attention kernel computes, as a list that is data of the program."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32

from navil_jax.batch import AnyArray
from navil_jax.model.blocks import block_ranges, needed_blocks

FIRST, LAST, PARTIAL = 1, 2, 4  # first or last pair of its block; some of its queries do not see some of its keys


class Pairs(NamedTuple):
    """Pairs of a query block and a key block."""

    query: Int32[Array, " N"]
    key: Int32[Array, " N"]
    flags: Int32[Array, " N"]
    used: Int32[Array, ""]  # of the places; the others hold nothing


def block_pairs(
    segment_ids: Int[AnyArray, "B S"],
    block: int,
    *,
    causal: bool = False,
    by_key: bool = False,
    width: int | None = None,
) -> Pairs:
    """Lists the pairs of blocks, those of one query block (`by_key`: one key block) side by side.

    Args:
      segment_ids: whole blocks, S = k * block; 0 = empty.
      width: the most blocks that one block meets; None: all of its row.

    Example: ids 1 1 | 1 2 | 3 3 with block 2 -> (0, 0 first) (0, 1 last) (1, 0 first) (1, 1 last) (2, 2 first last)
    """
    length = segment_ids.shape[1]
    needed = needed_blocks(segment_ids, block, causal)
    blocks = len(needed)
    first, last = block_ranges(segment_ids, block)
    size = blocks * min(length // block, width or blocks)
    index = jnp.arange(blocks * blocks)
    order = jnp.sort(jnp.where((needed.T if by_key else needed).ravel(), index, index.size - 1))[:size]
    held, other = order // blocks, order % blocks
    count = needed.sum(dtype=jnp.int32)
    number = jnp.arange(size)
    changes = held[1:] != held[:-1]
    begins = jnp.concatenate([jnp.ones(1, bool), changes])
    ends = jnp.concatenate([changes, jnp.ones(1, bool)]) | (number == count - 1)
    whole = (first[held] == last[held]) & (first[other] == last[other])
    if causal:
        whole &= held != other
    flags = FIRST * begins + LAST * ends + PARTIAL * ~whole
    query, key = (other, held) if by_key else (held, other)
    return Pairs(query.astype(jnp.int32), key.astype(jnp.int32), flags.astype(jnp.int32), count)
