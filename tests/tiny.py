"""Tiny models for tests, one of each family."""

from typing import Any

from navil_jax.config import DecoderConfig, ModelConfig, VisionConfig

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
