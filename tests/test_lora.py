"""Low-rank updates: a layer starts as without, computes what its merged kernel computes, and merges in every layout."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_model

from navil_jax.config import Config, DataConfig
from navil_jax.data.pipeline import batch_spec
from navil_jax.model import lora
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten, unflatten


def test_an_update_is_added_in_the_kernels_dtype():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 4, 6, 2)).astype("float32"), rng.normal(size=(5, 2, 3)).astype("float32")
    kernel = rng.normal(size=(5, 4, 6, 3)).astype("float32")
    wanted = kernel + 0.5 * np.einsum("lhdr,lro->lhdo", a, b)
    np.testing.assert_allclose(lora.update_of(kernel, a, b, 0.5, stacked=True), wanted, rtol=1e-5, atol=1e-6)
    alone = lora.update_of(kernel[0], a[0], b[0], 0.5, stacked=False)
    np.testing.assert_allclose(alone, wanted[0], rtol=1e-5, atol=1e-6)
    half = lora.update_of(kernel.astype("bfloat16"), a, b, 0.5, stacked=True)
    assert half.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["internlm2", "qwen3"])
def test_merged_parameters_compute_what_the_updates_compute(family):
    model = tiny_model(family, lora_rank=2)
    plain = dataclasses.replace(model, lora_rank=0)
    data = DataConfig(rows=1, visual_slots=12, text_slots=20, patch_slots=40)
    batch = batch_spec(Config(model=model, data=data)).fake(model)
    run = jax.jit(lambda config, params: model_params.bind(config, params)(batch)[0], static_argnums=0)
    flat = flatten(model_params.initialise(model, 0))
    fresh = {name: value for name, value in flat.items() if not name.endswith((lora.A, lora.B))}
    np.testing.assert_array_equal(run(model, unflatten(flat)), run(plain, unflatten(fresh)))
    trained = {
        name: jax.random.normal(jax.random.key(i), value.shape) * 0.1 if name.endswith(lora.B) else value
        for i, (name, value) in enumerate(flat.items())
    }
    ours = run(model, unflatten(trained))
    merged = lora.merged(unflatten(trained), model.lora_scale)
    assert not np.allclose(ours, run(plain, unflatten(fresh)), atol=1e-2)
    np.testing.assert_allclose(ours, run(plain, merged), atol=2e-4, rtol=1e-4)
