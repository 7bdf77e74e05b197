"""Attention in plain XLA: what blocks compute is what all pairs of tokens give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.model import xla_attention


def inputs(rows: int, length: int, heads: int, kv_heads: int, dim: int = 8) -> tuple[jax.Array, ...]:
    shapes = ((rows, length, count, dim) for count in (heads, kv_heads, kv_heads))
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 70),
    rows=st.integers(1, 2),
    groups=st.integers(1, 2),
    causal=st.booleans(),
    ids=st.lists(st.integers(0, 4), min_size=140, max_size=140),
    in_order=st.booleans(),
)
def test_blocks_give_what_all_pairs_give(
    length: int, rows: int, groups: int, causal: bool, ids: list[int], in_order: bool
):
    """Forward and backward, for segments in any order with padding anywhere."""
    q, k, v = inputs(rows, length, 2 * groups, 2)
    segments = np.array(ids, np.int32)[: rows * length].reshape(rows, length)
    segments = jnp.asarray(np.sort(segments) if in_order else segments)
    used = (segments > 0)[..., None, None]

    def total(attend, q, k, v):
        return jnp.sum(jnp.where(used, attend(q, k, v, segments, causal=causal), 0.0) ** 2)

    ways = (functools.partial(total, way) for way in (xla_attention.dense_attention, xla_attention.block_attention))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_attention, "BLOCK", 16)
        results = [jax.jit(jax.value_and_grad(way, argnums=(0, 1, 2)))(q, k, v) for way in ways]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), *results)


def test_padding_is_zero_and_gives_no_gradient():
    q, k, v = inputs(1, 40, 2, 2)
    segments = jnp.where(jnp.arange(40) < 21, 1, 0)[None]
    attend = functools.partial(xla_attention.block_attention, segment_ids=segments, causal=False)
    out, gradient = jax.vjp(attend, q, k, v)
    assert not jnp.any(out[:, 21:])
    for found in gradient(jnp.ones_like(out)):
        assert jnp.all(jnp.isfinite(found))
        assert not jnp.any(found[:, 21:])


@pytest.mark.parametrize(("causal", "visited"), [(False, 1 + 4 + 4), (True, 1 + 3 + 3)])
def test_blocks_that_share_no_segment_are_not_visited(causal: bool, visited: int):
    """Blocks of 16: a segment in the first one, two segments of two blocks each, then padding."""
    segments = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([16, 32, 32, 80]))[None]
    assert xla_attention.visited_blocks(causal, segments, 16).sum() == visited


def test_memory_grows_with_the_row_and_not_with_its_square():
    def temporary(length: int) -> int:
        q, k, v = inputs(1, length, 1, 1)
        segments = jnp.ones((1, length), jnp.int32)
        loss = lambda *qkv: jnp.sum(xla_attention.block_attention(*qkv, segments, causal=True) ** 2)  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 6 * temporary(1024)
