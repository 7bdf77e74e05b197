"""Sampling keeps what it promises, draws with the right frequencies, and repeats itself for a seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navil_jax.errors import UserError
from navil_jax.generate.sampling import MOST_LOGPROBS, Chosen, Sampler, Settings, choose, keep_top_k, keep_top_p

logit_rows = st.lists(st.integers(-60, 60), min_size=8, max_size=8, unique=True).map(lambda x: jnp.array([x]) / 10)


@functools.partial(jax.jit, static_argnames="measure")
def chosen(logits, settings, step, seen, measure):
    return choose(logits, settings, seen, jnp.full(len(logits), step), jnp.array(measure))


def tokens(
    sampler: Sampler | list[Sampler], logits: jax.Array, step: int = 0, seen: tuple[int, ...] = ()
) -> np.ndarray:
    """One token a row; one sampler is for all rows."""
    samplers = sampler if isinstance(sampler, list) else [sampler] * len(logits)
    mask = jnp.zeros(logits.shape, bool).at[:, jnp.array(seen, int)].set(True)
    return np.asarray(chosen(logits, Settings.of(samplers), step, mask, False).tokens)


def probabilities(logits: jax.Array) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)


@settings(deadline=None)
@given(logits=logit_rows, k=st.integers(1, 9))
def test_top_k_keeps_the_k_largest(logits: jax.Array, k: int):
    kept = np.isfinite(keep_top_k(logits, jnp.array([k])))
    assert kept.sum() == min(k, 8)
    assert logits[kept].min() >= (logits[~kept].max() if k < 8 else -np.inf)


@settings(deadline=None)
@given(logits=logit_rows, p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: jax.Array, p: float):
    kept = np.isfinite(keep_top_p(logits, jnp.array([p])))
    mass = probabilities(logits)[kept]
    assert mass.sum() >= p - 1e-6
    assert mass.sum() - mass.min() < p + 1e-6
    assert probabilities(logits)[~kept].max(initial=0) <= mass.min()


@pytest.mark.parametrize("p", [1e-6, 1e-37, 1e-38, 1e-40, 5e-324])
def test_the_likeliest_token_is_kept_whatever_top_p_is(p: float):
    logits = jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    np.testing.assert_array_equal(tokens(Sampler(temperature=1.0, top_p=p), logits), [1, 2])
    assert np.isfinite(keep_top_p(logits, jnp.full(2, p))).sum() == 2


def test_nothing_is_cut_without_limits():
    logits = jnp.array([[3.0, -50.0, 2.0]])
    assert np.isfinite(keep_top_k(keep_top_p(logits, jnp.ones(1)), jnp.zeros(1, int))).all()


def test_examples():
    np.testing.assert_array_equal(keep_top_k(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([2])), [[3, -np.inf, 2]])
    kept = np.isfinite(keep_top_p(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), jnp.array([0.6])))
    np.testing.assert_array_equal(kept, [[True, False, True]])


def test_frequencies():
    """4000 rows of p^(1/T) with T = 2, cut to the three likeliest."""
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.tile(jnp.log(jnp.array(chances)), (4000, 1))
    found = tokens([Sampler(temperature=2.0, top_k=3, seed=seed) for seed in range(4000)], logits)
    expected = np.sqrt(chances[:3]) / np.sqrt(chances[:3]).sum()
    found = np.bincount(found, minlength=4) / len(logits)
    np.testing.assert_allclose(found, [*expected, 0], atol=4 * np.sqrt(0.25 / len(logits)))


def test_seed_and_step_decide_and_not_the_row_or_its_neighbours():
    logits = jax.random.normal(jax.random.key(0), (3, 50))
    own = Sampler(temperature=1.5, top_p=0.9, seed=1)
    others = [Sampler(), own, Sampler(temperature=9.0, top_k=4, seed=5, repetition_penalty=3.0)]
    draws = np.array([tokens(own, logits[:1], step) for step in range(20)])[:, 0]
    for row in range(3):
        samplers = [*others[:row], own, *others[row:]][:3]
        moved = jnp.roll(logits, row, axis=0)
        np.testing.assert_array_equal(draws, [tokens(samplers, moved, step)[row] for step in range(20)])
    assert len(np.unique(draws)) > 5
    assert not np.array_equal(draws, [tokens(Sampler(1.5, top_p=0.9, seed=2), logits[:1], i)[0] for i in range(20)])


def test_temperature_0_and_a_tiny_one_take_the_likeliest():
    logits = jax.random.normal(jax.random.key(1), (5, 50))
    for sampler in (Sampler(), Sampler(temperature=1e-6), Sampler(temperature=3.0, top_k=1)):
        np.testing.assert_array_equal(tokens(sampler, logits, 3), np.argmax(logits, axis=-1))


def test_the_repetition_penalty_makes_seen_tokens_less_likely():
    """A positive logit is divided, a negative one multiplied: 3 / 2 < 2, and -0.5 * 2 < -0.6."""
    assert tokens(Sampler(repetition_penalty=2.0), jnp.array([[3.0, 2.0]]), seen=(0,)).tolist() == [1]
    assert tokens(Sampler(repetition_penalty=2.0), jnp.array([[-0.5, -0.6]]), seen=(0,)).tolist() == [1]
    assert tokens(Sampler(repetition_penalty=1.4), jnp.array([[3.0, 2.0]]), seen=(0,)).tolist() == [0]


def test_log_probabilities_are_the_models_own():
    logits = jax.random.normal(jax.random.key(2), (2, 50))
    settings = Settings.of([Sampler(temperature=5.0, seed=3), Sampler()])
    found: Chosen = chosen(logits, settings, 0, jnp.zeros((2, 50), bool), True)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(found.logprobs, expected[[0, 1], np.asarray(found.tokens)], rtol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-expected)[:, :MOST_LOGPROBS], rtol=1e-6)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-expected, kind="stable")[:, :MOST_LOGPROBS])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"repetition_penalty": 0},
        {"top_k": 2**31},
    ],
)
def test_values_out_of_range(wrong: dict):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        Sampler(**wrong)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-44, 5e-324])
def test_tiny_temperatures_take_the_likeliest(temperature: float):
    logits = jax.random.normal(jax.random.key(1), (64, 50)) * 30
    np.testing.assert_array_equal(tokens(Sampler(temperature, seed=3), logits), jnp.argmax(logits, axis=-1))
