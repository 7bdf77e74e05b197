"""Accumulated gradients, skipped steps, running averages and the clock of a run counted in samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from navil_jax.config import Config, DataConfig, OptimizerConfig, SourceConfig
from navil_jax.data.pipeline import batch_spec
from navil_jax.sharding import make_mesh
from navil_jax.train.optimizer import make_schedule, split_trainable
from navil_jax.train.step import (
    COUNTED,
    SPIKES_FROM,
    Running,
    TrainState,
    initial_params,
    initial_state,
    judge_step,
    make_train_step,
    next_average,
)

CONFIG = Config(
    steps=10,
    batch_samples=3,
    model=tiny_model(),
    data=DataConfig(
        sources=(SourceConfig("a"), SourceConfig("b")), rows=4, visual_slots=12, text_slots=20, patch_slots=40
    ),
    optimizer=OptimizerConfig(
        peak_learning_rate=1e-2,
        warmup_steps=2,
        schedule="cosine",
        eps=1e-4,  # below it, differences of rounding are not blown up to whole steps
        ema_decay=0.9,
        not_finite="skip",
        spikes="skip",
    ),
)
BATCH = batch_spec(CONFIG).fake(CONFIG.model)
SAMPLES = int(BATCH.segment_ids.max(axis=1).sum())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(CONFIG.mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def step(mesh):
    return make_train_step(CONFIG, mesh)


@pytest.fixture(scope="module")
def start(mesh):
    """The state before the first step, on the host; `put` makes one that a step may take."""
    state = initial_state(CONFIG, mesh, initial_params(CONFIG, mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    state = jax.device_get(state)
    return state, lambda state: jax.tree.map(jnp.copy, jax.device_put(state, shardings))


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(mesh, step, start):
    """Rows with few and many targets: a mean of the parts' means would be another loss."""
    state, put = start
    weights = np.array(BATCH.loss_weights)
    weights[::2] *= 0.01
    batch = dataclasses.replace(BATCH, loss_weights=weights)
    parts = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, microbatches=2))
    other = make_train_step(parts, mesh)
    whole, cut = put(state), put(state)
    for _ in range(3):
        whole, metrics = step(whole, batch)
        cut, metrics_of_parts = other(cut, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, metrics_of_parts)
    assert float(metrics["gradient_norm"]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), whole, cut)


@pytest.mark.slow
def test_schedule_and_average_follow_samples(step, start):
    state, put = start
    schedule = make_schedule(CONFIG.optimizer, CONFIG.steps)
    moving, mean = put(state), state.trainable
    for number in range(3):
        moving, metrics = step(moving, BATCH)
        assert int(metrics["samples"]) == SAMPLES > 4
        assert int(moving.running.samples_low) == (number + 1) * SAMPLES
        np.testing.assert_allclose(metrics["learning_rate"], schedule(number * SAMPLES / 3), rtol=1e-6)
        kept = (1 + number) / (10 + number)
        mean = jax.tree.map(lambda m, x, kept=kept: kept * m + (1 - kept) * x, mean, jax.device_get(moving.trainable))
    averages, _ = split_trainable(CONFIG.optimizer, moving.averaged_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), averages, mean)


@pytest.mark.parametrize("decay", [0.99, 0.9999, 0.99999])
def test_a_slow_average_reaches_parameters_that_stand_still(decay):
    """Each step moves it by less than half of the last digit of the parameters."""
    params, steps = {"x": jnp.float32([1.0, 300.0])}, round(3 / (1 - decay))
    moved = params["x"] * 3e-4  # the parameters' last step

    def step(number, ema):
        state = TrainState(10**7 + number, params, {}, (), ema, Running.after({}))
        return next_average(decay, state, params)

    ema = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, {"x": -moved}))()
    averages = TrainState(jnp.int32(0), params, {}, (), ema, Running.after({})).averaged_params["x"]
    gone = np.float64(averages - (params["x"] - moved)) / np.float64(moved)
    np.testing.assert_allclose(gone, 1 - np.exp(steps * np.log(decay)), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["not finite", "spike"])
def test_a_skipped_step_changes_nothing_but_the_counts(step, start, what):
    state, put = start
    batch = BATCH
    if what == "spike":
        running = Running(np.int32(1), np.int32(7), np.int32(SPIKES_FROM), np.float32(0.5), np.float32(1e-4))
        state = dataclasses.replace(state, step=np.int32(SPIKES_FROM), running=running)
    else:
        weights = np.array(BATCH.loss_weights)
        weights[0, np.flatnonzero(weights[0])[0]] = np.inf
        batch = dataclasses.replace(BATCH, loss_weights=weights)
    after, metrics = step(put(state), batch)
    assert (int(metrics["skipped"]), int(metrics["spike"])) == (1, what == "spike")
    assert np.isfinite(metrics["loss"]) == (what == "spike")
    counted = dataclasses.replace(state.running, samples_low=state.running.samples_low + SAMPLES)
    expected = dataclasses.replace(state, step=state.step + 1, running=counted)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def judge(policy, losses, **fields):
    """The verdicts over steps with these losses."""
    running, verdicts = Running.after({}), []
    for number, loss in enumerate(losses):
        state = TrainState(jnp.int32(number), {}, {}, (), {}, running)
        metrics = {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(1), "samples": jnp.int32(2)}
        running, verdict = judge_step(OptimizerConfig(**policy), state, metrics)
        verdicts.append((int(verdict["spike"]), int(verdict["skipped"])))
    return running, verdicts


def test_a_loss_far_above_the_last_ones_is_a_spike():
    usual = [2 + 0.1 * (-1) ** i for i in range(SPIKES_FROM)]
    running, verdicts = judge({}, [*usual, 2.5, 4.0, 2.0])
    assert verdicts[SPIKES_FROM:] == [(0, 0), (1, 0), (0, 0)]
    assert int(running.samples_low) == 2 * (SPIKES_FROM + 3)
    early = judge({}, [2.0, 2.0, 9.0])[1]
    assert early == [(0, 0)] * 3
    calm, verdicts = judge({"spikes": "skip", "not_finite": "skip"}, [*usual, 4.0, np.nan])
    assert verdicts[SPIKES_FROM:] == [(1, 1), (0, 1)]
    before, _ = judge({}, usual)
    assert (float(calm.loss_mean), float(calm.loss_variance)) == (float(before.loss_mean), float(before.loss_variance))
    np.testing.assert_allclose([before.loss_mean, before.loss_variance], [2.0, 0.01], atol=0.02)


def test_running_scalars_come_back_from_the_log_bit_for_bit():
    running = Running(jnp.int32(5), jnp.int32(7), jnp.int32(300), jnp.float32(1 / 3), jnp.float32(1e-7 / 3))
    logged = {name: float(value) for name, value in dataclasses.asdict(running).items()}
    logged["samples_seen"] = 5 * COUNTED + 7
    again = Running.after(logged)
    jax.tree.map(np.testing.assert_array_equal, again, running)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, running)


@pytest.mark.parametrize("first", [np.nan, 2.0])
def test_spikes_are_seen_whatever_became_of_the_first_step(first):
    usual = [2 + 0.1 * (-1) ** i for i in range(SPIKES_FROM + 1)]
    _, verdicts = judge({"not_finite": "skip"}, [first, *usual, 4.0])
    assert verdicts[-1] == (1, 0)


def test_samples_are_counted_beyond_two_to_the_31():
    running = Running.after({"samples_seen": 2**31 - 3})
    state = TrainState(jnp.int32(9), {}, {}, (), {}, running)
    metrics = {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1), "samples": jnp.int32(8)}
    after, _ = judge_step(OptimizerConfig(), state, metrics)
    assert int(after.samples_high) * COUNTED + int(after.samples_low) == 2**31 + 5
    np.testing.assert_allclose(after.samples_in(1000), (2**31 + 5) / 1000, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_what_trains_moves_though_parameters_are_bfloat16(algorithm):
    """In bfloat16 an update of the default size is rounded away; so what trains is float32."""
    model = dataclasses.replace(CONFIG.model, param_dtype="bfloat16")
    optimizer = OptimizerConfig(algorithm=algorithm, warmup_steps=0)
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = initial_state(config, mesh, initial_params(config, mesh))
    assert {x.dtype for x in jax.tree.leaves((state.trainable, state.optimizer)) if x.ndim} == {jnp.dtype("float32")}
    before = jax.device_get(state.trainable)
    state, _ = make_train_step(config, mesh)(state, BATCH)
    moved = [
        np.mean(a != b) for a, b in zip(*map(jax.tree.leaves, (before, jax.device_get(state.trainable))), strict=True)
    ]
    assert np.mean([share > 0.2 for share in moved]) > 0.8
