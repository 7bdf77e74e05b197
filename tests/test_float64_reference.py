"""Loss and gradients of the training step against an independent float64 computation, over meshes and microbatches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from float64_reference import value_and_gradients
from made_samples import uneven_rows
from tiny import tiny_model

from navil_jax.batch import BatchSpec
from navil_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, SourceConfig
from navil_jax.model import params as model_params
from navil_jax.model.params import flatten
from navil_jax.sharding import make_mesh
from navil_jax.train.step import global_batch, initial_state, make_train_step

MODELS = {
    "internlm2": tiny_model("internlm2"),
    "qwen3, tied": tiny_model("qwen3", decoder={"tie_embeddings": True}),
}
TOLERANCE = 1e-5  # of a gradient's largest entry; float32 gave 2.7e-6


@functools.cache
def expected(name: str) -> tuple[dict, float, dict[str, np.ndarray], float]:
    """Parameters with random norms, scales and biases; the right loss, gradients and their norm."""
    random = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * random.standard_normal(x.shape).astype(np.float32),
        model_params.initialise(MODELS[name], 7),
    )
    samples = [sample for row in uneven_rows(MODELS[name]) for sample in row]
    loss, gradients = value_and_gradients(params, MODELS[name], samples)
    flat = flatten(gradients)
    return params, loss, flat, float(np.sqrt(sum((g**2).sum() for g in flat.values())))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("mesh", "microbatches", "clip", "sums"),
    [
        (MeshConfig(data=1, fsdp=1), 1, None, "compute"),
        (MeshConfig(data=1, fsdp=1), 8, None, "float32"),
        (MeshConfig(data=2, fsdp=2), 2, None, "compute"),
        (MeshConfig(data=1, fsdp=4), 1, 0.5, "compute"),
        (MeshConfig(data=1, fsdp=2, tensor=2), 1, None, "float32"),
        (MeshConfig(data=1, fsdp=2, context=2), 1, None, "compute"),
    ],
    ids=["one device", "8 microbatches", "data x fsdp, 2 microbatches", "fsdp, clipped", "tensor", "context"],
)
def test_step_has_the_loss_and_the_gradients(name, mesh, microbatches, clip, sums):
    params, loss, gradients, norm = expected(name)
    model = dataclasses.replace(MODELS[name], gradient_sums=sums)
    config = Config(
        steps=100,
        model=model,
        data=DataConfig(sources=(SourceConfig("x"),), rows=8, visual_slots=80, text_slots=160, patch_slots=240),
        optimizer=OptimizerConfig(
            clip_norm=1e9 if clip is None else clip * norm, warmup_steps=0, microbatches=microbatches
        ),
        mesh=mesh,
    )
    batch = BatchSpec(8, 80, 160, 240).build(uneven_rows(model), model.special_id("<IMG_CONTEXT>"))
    devices = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.context])
    state = initial_state(config, devices, jax.device_put(params, model_params.shardings(model, devices)))
    after, metrics = make_train_step(config, devices)(state, global_batch(batch, devices))
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=2e-6)
    np.testing.assert_allclose(float(metrics["gradient_norm"]), norm, rtol=5e-6)
    for key, moment in flatten(after.optimizer[1].mu).items():
        found = np.asarray(moment, np.float64) / (1 - config.optimizer.b1) / (clip or 1.0)
        scale = max(np.abs(gradients[key]).max(), 1e-3 * norm / 50)
        assert np.abs(found - gradients[key]).max() <= TOLERANCE * scale, key
