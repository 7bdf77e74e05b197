"""Tiny models for tests, one of each family, with their parameters and a compiled loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from navil_jax.batch import Batch
from navil_jax.config import DecoderConfig, ModelConfig, VisionConfig
from navil_jax.model import params as model_params

SPECIAL_IDS = tuple(range(84, 96))


def tiny_model(family: str = "internlm2", decoder: dict[str, Any] | None = None, **settings: Any) -> ModelConfig:
    """A model of a few thousand parameters in float32; keyword arguments change fields."""
    qwen = family == "qwen3"
    sizes = {"depth": 2, "width": 32, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 96}
    flavour = {"family": family, "qk_norm": qwen, "serial_visual_output": not qwen}
    fields = {
        "vision": VisionConfig(depth=2, width=16, mlp_dim=24, num_heads=2, full_attention_layers=(1,), window_size=4),
        "decoder": DecoderConfig(**{**sizes, **flavour, **(decoder or {})}),
        "special_token_ids": SPECIAL_IDS,
        "compute_dtype": "float32",
        "remat": "none",
    }
    return ModelConfig(**{**fields, **settings})


@functools.cache
def tiny_params(family: str):
    return model_params.initialise(tiny_model(family), 0)


@functools.cache
def summed_loss(family: str):
    """Compiled (params, batch) -> ((sum of weighted cross-entropies, logits [B, L, vocab]), gradients)."""

    def total(params, batch: Batch):
        model = model_params.bind(tiny_model(family), params)
        logits = model.logits(model(batch)[0])
        target_logits = jnp.take_along_axis(logits, jnp.maximum(batch.targets, 0)[..., None], -1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, -1) - target_logits) * batch.loss_weights), logits

    return jax.jit(jax.value_and_grad(total, has_aux=True))
