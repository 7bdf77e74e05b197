"""NaViL-2B as the paper states it (2.4B active, 4.04B parameters): the model; navil_2b_s1_1.py and so on train it."""

from navil_jax.config import Config, DecoderConfig, ModelConfig, VisionConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vision=VisionConfig(depth=24, width=1472, mlp_dim=5888, num_heads=23),
            decoder=DecoderConfig(rope_scaling="dynamic", rope_factor=2.0, pad_token_id=2),  # InternLM2-1.8B
        ),
    )
