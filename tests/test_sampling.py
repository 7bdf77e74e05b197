"""Sampling keeps what it promises, draws with the right frequencies, and repeats itself for a seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.errors import UserError
from navil_jax.generate.sampling import Sampler, keep_top_k, keep_top_p

logit_rows = st.lists(st.integers(-60, 60), min_size=8, max_size=8, unique=True).map(lambda x: jnp.array([x]) / 10)


def probabilities(logits: jax.Array) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)


@settings(deadline=None)
@given(logits=logit_rows, k=st.integers(1, 9))
def test_top_k_keeps_the_k_largest(logits: jax.Array, k: int):
    kept = np.isfinite(keep_top_k(logits, k))
    assert kept.sum() == min(k, 8)
    assert logits[kept].min() >= (logits[~kept].max() if k < 8 else -np.inf)


@settings(deadline=None)
@given(logits=logit_rows, p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: jax.Array, p: float):
    kept = np.isfinite(keep_top_p(logits, p))
    mass = probabilities(logits)[kept]
    assert mass.sum() >= p - 1e-6
    assert mass.sum() - mass.min() < p + 1e-6
    assert probabilities(logits)[~kept].max(initial=0) <= mass.min()


@pytest.mark.parametrize("p", [1e-6, 1e-37, 1e-38, 1e-40, 5e-324])
def test_the_likeliest_token_is_kept_whatever_top_p_is(p: float):
    logits = jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    np.testing.assert_array_equal(Sampler(temperature=1.0, top_p=p)(logits, 0), [1, 2])
    assert np.isfinite(keep_top_p(logits, p)).sum() == 2


def test_nothing_is_cut_without_limits():
    logits = jnp.array([[3.0, -50.0, 2.0]])
    assert np.isfinite(keep_top_k(keep_top_p(logits, 1.0), 0)).all()


def test_examples():
    np.testing.assert_array_equal(keep_top_k(jnp.array([[3.0, 1.0, 2.0]]), 2), [[3, -np.inf, 2]])
    kept = np.isfinite(keep_top_p(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), 0.6))
    np.testing.assert_array_equal(kept, [[True, False, True]])


def test_frequencies():
    """4000 rows of p^(1/T) with T = 2, cut to the three likeliest."""
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.tile(jnp.log(jnp.array(chances)), (4000, 1))
    tokens = np.asarray(Sampler(temperature=2.0, top_k=3, seed=7)(logits, 0))
    expected = np.sqrt(chances[:3]) / np.sqrt(chances[:3]).sum()
    found = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(found, [*expected, 0], atol=4 * np.sqrt(0.25 / len(tokens)))


def test_seed_step_and_row_decide_and_nothing_else():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    sampler = Sampler(temperature=1.5, top_p=0.9, seed=1)
    draws = np.array([sampler(logits, step) for step in range(20)])
    np.testing.assert_array_equal(draws, [sampler(logits, step) for step in range(20)])
    np.testing.assert_array_equal(draws[:, :1], [sampler(logits[:1], step) for step in range(20)])
    assert len(np.unique(draws[:, 0])) > 5
    assert not np.array_equal(draws, [Sampler(temperature=1.5, top_p=0.9, seed=2)(logits, i) for i in range(20)])
    same_rows = np.array([sampler(jnp.tile(logits[:1], (3, 1)), step) for step in range(20)])
    assert (same_rows[:, 0] != same_rows[:, 1]).any()


def test_temperature_0_and_a_tiny_one_take_the_likeliest():
    logits = jax.random.normal(jax.random.key(1), (5, 50))
    for sampler in (Sampler(), Sampler(temperature=1e-6), Sampler(temperature=3.0, top_k=1)):
        np.testing.assert_array_equal(sampler(logits, 3), np.argmax(logits, axis=-1))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_values_out_of_range(wrong: dict):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        Sampler(**wrong)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-44, 5e-324])
def test_tiny_temperatures_take_the_likeliest(temperature: float):
    logits = jax.random.normal(jax.random.key(1), (64, 50)) * 30
    tokens = Sampler(temperature=temperature, seed=3)(logits, 0)
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))
