"""The training step: loss, one normaliser, frozen parameters, donation and one compilation; grouping of evaluations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from navil_jax.batch import BatchSpec
from navil_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    VisionConfig,
)
from navil_jax.generate.programs import Programs
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh, named
from navil_jax.train.held_out import Row, SampleScore, accuracies, learned, losses, score_samples, token_accuracies
from navil_jax.train.loss import weighted_mean
from navil_jax.train.profiling import compilations
from navil_jax.train.step import (
    EvalScores,
    abstract_state,
    initial_params,
    initial_state,
    make_eval_step,
    make_train_step,
)

CONFIG = Config(
    steps=10,
    model=ModelConfig(
        vision=VisionConfig(depth=1, width=16, mlp_dim=16, num_heads=2),
        decoder=DecoderConfig(depth=2, width=16, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=48),
        special_token_ids=tuple(range(36, 48)),
        compute_dtype="float32",
    ),
    data=DataConfig(
        sources=(SourceConfig("a"), SourceConfig("b")), rows=2, visual_slots=8, text_slots=16, patch_slots=16
    ),
    optimizer=OptimizerConfig(
        peak_learning_rate=1e-2,
        warmup_steps=0,
        trainable=("**/visual/**", "vision/**", "connector/**"),
        no_decay=(),
    ),
)
SPEC = BatchSpec(rows=2, visual_slots=8, text_slots=16, patch_slots=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float32_model_multiplies_in_float32(dtype):
    """On TPUs and GPUs too: the programs say of every product how exact it must be, those of gradients among them."""
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, compute_dtype=dtype))
    state, batch = abstract_state(config, mesh), SPEC.abstract(named(mesh, "batch"))
    compiled = Programs(config.model, None, mesh)
    programs = compiled.lower(SPEC, 4) | {
        "train": make_train_step(config, mesh).lower(state, batch),
        "evaluate": make_eval_step(config, mesh).lower(state.params, batch),
    }
    for name, program in programs.items():
        products = [line for line in program.as_text().splitlines() if "dot_general" in line]
        exact = [line for line in products if "HIGHEST" in line]
        assert len(products) > 5, name
        assert len(exact) == (len(products) if dtype == "float32" else 0), name


def make_sample(seed, source=0, sample=0, answer=2):
    """`<img>`, two merged units, then a text of five tokens of which the last `answer` predict a target."""
    random = np.random.default_rng(seed)
    config = CONFIG.model
    text = random.integers(0, 36, 5)
    weights = np.zeros(5, np.float32)
    weights[-1 - answer : -1] = random.uniform(0.5, 2, answer)
    return {
        "visual_tokens": np.array([config.special_id("<img>")] + [config.special_id("<IMG_CONTEXT>")] * 2),
        "visual_positions": np.arange(3),
        "text_tokens": text,
        "text_positions": np.arange(3, 8),
        "text_targets": np.append(text[1:], -1),
        "text_weights": weights,
        "text_source_ids": np.full(5, source),
        "text_sample_ids": np.full(5, sample),
        "patches": random.integers(0, 256, (8, 768)),
        "patch_coords": np.array([(r, 2 * u + c) for u in range(2) for r in range(2) for c in range(2)]),
        "patch_blocks": np.ones(8, np.int32),
    }


def make_batch(rows):
    return SPEC.build(rows, CONFIG.model.special_id("<IMG_CONTEXT>"))


BATCH = make_batch([[make_sample(1, 0, 7), make_sample(2, 1, 8, answer=3)], [make_sample(3, 1, 9)]])


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(CONFIG.mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def steps(mesh):
    return make_train_step(CONFIG, mesh), make_eval_step(CONFIG, mesh)


@functools.cache
def start(mesh):
    return jax.device_get(initial_state(CONFIG, mesh, initial_params(CONFIG, mesh)))


def fresh(mesh):
    """A state of its own, as steps donate theirs."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh))
    return jax.tree.map(jnp.copy, jax.device_put(start(mesh), shardings))


def test_abstract_state_is_that_of_the_initial_one(mesh):
    state, wanted = fresh(mesh), abstract_state(CONFIG, mesh)
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), wanted)


def test_frozen_parameters_stay_and_trainable_ones_move(mesh, steps):
    before = start(mesh)
    state, metrics = steps[0](fresh(mesh), BATCH)
    assert int(state.step) == 1
    assert any("text" in name for name in flatten(before.frozen))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
    for name, value in flatten(state.trainable).items():
        assert "visual/" in name or name.startswith(("vision/", "connector/"))
        assert not np.array_equal(value, flatten(before.trainable)[name]), name
    assert float(metrics["gradient_norm"]) > 0


@pytest.mark.slow
def test_step_is_compiled_once_and_gives_its_buffers_back(mesh, steps):
    step = make_train_step(CONFIG, mesh)
    state = fresh(mesh)
    with compilations("train_step") as compiled:
        for _ in range(3):
            given = state
            state, _ = step(state, BATCH)
    assert len(compiled) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.trainable, given.optimizer, given.frozen)))


def test_metrics(mesh, steps):
    _, metrics = steps[0](fresh(mesh), BATCH)
    scores = jax.device_get(steps[1](start(mesh).params, BATCH))
    weights, losses_ = scores.loss_weights, scores.cross_entropy
    np.testing.assert_allclose(metrics["loss"], np.sum(losses_ * weights) / np.sum(weights), rtol=1e-5)
    for source in (0, 1):
        of_source = weights * (scores.source_ids == source)
        np.testing.assert_allclose(metrics["source_weight"][source], of_source.sum(), rtol=1e-6)
        np.testing.assert_allclose(
            metrics["source_loss"][source], (losses_ * of_source).sum() / of_source.sum(), rtol=1e-5
        )
    assert (int(metrics["tokens"]), int(metrics["images"]), int(metrics["patches"])) == (24, 3, 24)
    assert float(metrics["learning_rate"]) == np.float32(1e-2)
    right = ((scores.predictions == scores.targets) & (weights > 0)).sum() / (weights > 0).sum()
    np.testing.assert_allclose(metrics["text_accuracy"], right, rtol=1e-6)


def test_loss_does_not_depend_on_where_samples_are_packed(mesh, steps):
    samples = [make_sample(1, 0, 7), make_sample(2, 1, 8, answer=3), make_sample(3, 1, 9)]
    results = []
    for rows in ([samples[:2], samples[2:]], [samples[1:], samples[:1]], [samples[2:], [samples[1], samples[0]]]):
        metrics = steps[0](fresh(mesh), make_batch(rows))[1]
        results.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    np.testing.assert_allclose(results, [results[0]] * 3, rtol=1e-5)


def test_one_normaliser_over_the_batch(mesh, steps):
    """The loss of a batch is the weighted mean over all its targets, not the mean of its rows' means."""
    rows = [[make_sample(1)], [make_sample(2, answer=4)]]
    both = steps[0](fresh(mesh), make_batch(rows))[1]
    alone = [steps[0](fresh(mesh), make_batch([row]))[1] for row in rows]
    weights = [make_batch([row]).loss_weights.sum() for row in rows]
    expected = sum(float(m["loss"]) * w for m, w in zip(alone, weights, strict=True)) / sum(weights)
    np.testing.assert_allclose(float(both["loss"]), expected, rtol=1e-5)
    assert abs(expected - np.mean([float(m["loss"]) for m in alone])) > 1e-4


def test_empty_batch_has_no_loss_and_no_gradient(mesh, steps):
    _, metrics = steps[0](fresh(mesh), make_batch([]))
    assert float(metrics["loss"]) == 0
    assert float(metrics["gradient_norm"]) == 0


@pytest.mark.slow
def test_training_fits_one_batch(mesh):
    config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, peak_learning_rate=3e-2))
    step, state, history = make_train_step(config, mesh), fresh(mesh), []
    for _ in range(40):
        state, metrics = step(state, BATCH)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.5 * history[0]


@pytest.mark.slow
def test_gradient_is_that_of_the_plain_loss(mesh, steps):
    """AdamW's first moment after one step shows the clipped gradient of the loss written out by hand."""

    def loss(trainable):
        model = model_params.bind(CONFIG.model, dataclasses.replace(start(mesh), trainable=trainable).params)
        logits = model.logits(model(BATCH)[0])
        chosen = jnp.take_along_axis(logits, jnp.maximum(BATCH.targets, 0)[..., None], axis=-1)[..., 0]
        return weighted_mean(jax.nn.logsumexp(logits, axis=-1) - chosen, BATCH.loss_weights)

    gradients = jax.jit(jax.grad(loss))(start(mesh).trainable)
    state, metrics = steps[0](fresh(mesh), BATCH)
    norm = float(metrics["gradient_norm"])
    np.testing.assert_allclose(norm, np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradients))), rtol=1e-4)
    moments = state.optimizer[1].mu
    scale = (1 - CONFIG.optimizer.b1) * min(1, CONFIG.optimizer.clip_norm / norm)
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, scale * g, rtol=1e-3, atol=1e-6), moments, gradients)


def test_samples_are_grouped():
    scores = EvalScores(
        cross_entropy=np.array([[1.0, 2, 3, 9], [4, 9, 9, 9]], np.float32),
        predictions=np.array([[5, 0, 7, 3], [8, 1, 1, 1]]),
        targets=np.array([[5, 6, 7, -1], [8, 2, -1, -1]]),
        loss_weights=np.array([[1, 0.5, 2, 0], [1, 0, 0, 0]], np.float32),
        segment_ids=np.array([[1, 1, 2, 0], [1, 1, 2, 0]]),
        source_ids=np.array([[0, 0, 1, 0], [1, 1, 1, 0]]),
        sample_ids=np.array([[11, 11, 12, 0], [13, 13, 14, 0]]),
    )
    samples = score_samples(scores)
    assert samples == [
        SampleScore(0, 11, False, 2.0, 1.5, (5, 0), (1, 2)),
        SampleScore(1, 12, True, 6.0, 2.0, (7,), (1, 1)),
        SampleScore(1, 13, True, 4.0, 1.0, (8,), (1, 1)),
    ]
    assert losses(samples, {0: "a", 1: "b"}) == {"eval/a/loss": 2 / 1.5, "eval/b/loss": 10 / 3}
    assert token_accuracies(samples, {0: "a", 1: "b"}) == {"eval/a/token_accuracy": 0.5, "eval/b/token_accuracy": 1.0}
    kinds = {(0, 11): "count", (1, 12): "count", (1, 13): "color"}
    assert accuracies(samples, kinds) == {(0, "count"): (0, 1), (1, "color"): (1, 1), (1, "count"): (1, 1)}


def test_right_under_teacher_forcing_is_right_under_greedy_decoding(mesh, steps):
    """The answer that greedy decoding writes is scored right; with any one token changed it is scored wrong."""
    params, config = start(mesh).params, CONFIG.model

    def score(answer):
        text = np.array([3, 4, *answer])
        targets = np.append(text[1:], -1)
        numbers = np.zeros(len(text), np.int32)
        sample = make_sample(5) | {
            "text_tokens": text,
            "text_positions": np.arange(3, 3 + len(text)),
            "text_targets": targets,
            "text_weights": ((np.arange(len(text)) > 0) & (targets >= 0)).astype(np.float32),
            "text_source_ids": numbers,
            "text_sample_ids": numbers,
        }
        scores = jax.device_get(steps[1](params, make_batch([[sample]])))
        return score_samples(scores), scores.predictions[0, len(text) - 1]

    written = []
    for _ in range(4):
        written.append(int(score(written)[1]))
    (greedy,) = score(written)[0]
    assert greedy.right
    assert greedy.answer == tuple(written)
    for place in range(4):
        changed = [*written[:place], (written[place] + 1) % config.decoder.vocab_size, *written[place + 1 :]]
        assert not score(changed)[0][0].right


def test_what_a_model_can_do_is_told_by_what_it_gains_on_the_baselines() -> None:
    rows = [
        Row("scenes", "color", 100, 0.9, 0.2, 0.1),
        Row("scenes", "is it", 100, 0.88, 0.88, 0.5),
        Row("scenes", "count", 100, 0.5, 0.25, 0.2),
        Row("words", "all", 100, 1.0, 1.0, 0.0),
        Row("words", "none", 100, 0.5, 1.0, 0.0),
    ]
    assert learned(rows) == [
        "It answers: scenes color (90%).",
        "It answers in part: scenes count (50%).",
        "It answers no better than without the image: scenes is it (88%), words all (100%), words none (50%).",
    ]
