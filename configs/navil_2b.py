"""NaViL-2B as the paper states it (2.4B active, 4.04B parameters), with the first stage's settings."""

from navil_jax.config import Config, DecoderConfig, ImageConfig, ModelConfig, OptimizerConfig, VisionConfig


def get_config() -> Config:
    return Config(
        steps=70_000,
        model=ModelConfig(
            vision=VisionConfig(depth=24, width=1472, mlp_dim=5888, num_heads=23),
            decoder=DecoderConfig(rope_scaling="dynamic", rope_factor=2.0, pad_token_id=2),  # InternLM2-1.8B
        ),
        images=ImageConfig(max_patches=4096),
        optimizer=OptimizerConfig(peak_learning_rate=5e-5, weight_decay=0.05),
    )
