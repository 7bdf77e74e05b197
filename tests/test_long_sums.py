"""Sums over many tokens in bfloat16 models: gradients, against float32, of every parameter; and the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_samples import make_features
from tiny import tiny_model

from navil_jax.batch import BatchSpec
from navil_jax.config import VisionConfig
from navil_jax.model import params as model_params
from navil_jax.model.params import bind, flatten
from navil_jax.train.loss import token_scores

ROWS, UNITS = 4, 512  # merged units of a row, each with its line break
MODEL = tiny_model(
    "internlm2",
    decoder={"depth": 1, "qkv_bias": True, "out_bias": True},
    vision=VisionConfig(
        depth=1, width=16, mlp_dim=24, num_heads=2, qkv_bias=True, full_attention_layers=(0,), window_size=4
    ),
)


@functools.cache
def gradients(dtype: str, sums: str = "compute") -> dict[str, np.ndarray]:
    model = dataclasses.replace(MODEL, compute_dtype=dtype, gradient_sums=sums)
    random = np.random.default_rng(0)
    samples = [[make_features(random, model, [(UNITS, 1)], 4, 24, number)] for number in range(ROWS)]
    spec = BatchSpec(ROWS, UNITS + 1, UNITS + 40, 4 * UNITS)
    batch = spec.build(samples, model.special_id("<IMG_CONTEXT>"))

    def loss(params):
        bound = bind(model, params)
        text = slice(batch.visual_slots, None)
        x, _ = bound(batch)
        scores = token_scores(*bound.head_inputs(x[:, text]), batch.targets[:, text], model.sum_dtype)
        return (scores.cross_entropy * batch.loss_weights[:, text]).sum() / batch.loss_weights.sum()

    found = flatten(jax.jit(jax.grad(loss))(model_params.initialise(MODEL, 3)))
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sums", ["compute", "float32"])
def test_no_gradient_is_lost_over_thousands_of_tokens(sums):
    """A sum in bfloat16 stops to grow after 256 equal terms: it would be half of the right one, or less."""
    right, found = gradients("float32"), gradients("bfloat16", sums)
    for name, gradient in right.items():
        size = np.linalg.norm(gradient)
        if size > 1e-6:
            assert np.linalg.norm(found[name] - gradient) < 0.05 * size, name
    row = MODEL.special_token_ids.index(MODEL.special_id("<IMG_LINE_BREAK>"))
    name = "decoder/special_embed/embedding"
    error = np.linalg.norm(found[name][row] - right[name][row]) / np.linalg.norm(right[name][row])
    assert error < 0.02


@pytest.mark.parametrize("special", [False, True])
def test_gradient_of_one_token_s_row_is_the_sum_over_its_places(special):
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    params = model_params.initialise(model, 0)
    token = model.special_id("<IMG_LINE_BREAK>") if special else 9
    random = np.random.default_rng(0)
    cotangent = jnp.asarray(1 + random.standard_normal((1, 8192, model.decoder.width)), jnp.bfloat16)
    tokens = np.full((1, 8192), token, np.int32)
    _, pull = jax.vjp(lambda params: bind(model, params).decoder.embed_prompt(tokens), params)
    table, row = ("special_embed", model.special_token_ids.index(token)) if special else ("embed", token)
    found = pull(cotangent)[0]["decoder"][table]["embedding"][row]
    np.testing.assert_allclose(found, np.asarray(cotangent, np.float64).sum((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_loss_keeps_its_digits_where_logits_share_an_offset(offset):
    random = np.random.default_rng(0)
    logits = np.float32(np.round(random.standard_normal((16, 64)) * 256) / 256)  # exact in float32 with the offset
    targets = random.integers(0, 64, (1, 16)).astype(np.int32)
    kernel = np.eye(64, dtype=np.float32)

    def loss(logits):
        return token_scores(logits, kernel, targets).cross_entropy.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits[None] + np.float32(offset)))
    exact = logits.astype(np.float64)
    chances = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    right = -np.log(chances[np.arange(16), targets[0]]).sum()
    np.testing.assert_allclose(value, right, rtol=2e-6)
    np.testing.assert_allclose(gradient[0], chances - np.eye(64)[targets[0]], atol=1e-6)
