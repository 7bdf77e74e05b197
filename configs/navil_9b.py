"""NaViL-9B as the paper states it (9.2B active, 16.4B parameters), with the first stage's settings."""

from navil_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    VisionConfig,
)

QWEN3_VOCABULARY = 151_936
FIRST_ADDED_ID = 151_669  # the Qwen3 tokenizer's length; its table has room for the special tokens beyond it


def get_config() -> Config:
    return Config(
        steps=50_000,
        model=ModelConfig(
            vision=VisionConfig(depth=32, width=1792, mlp_dim=7168, num_heads=28),
            decoder=DecoderConfig(  # Qwen3-8B
                family="qwen3",
                depth=36,
                width=4096,
                mlp_dim=12288,
                num_heads=32,
                num_kv_heads=8,
                vocab_size=QWEN3_VOCABULARY,
                norm_eps=1e-6,
                max_positions=40960,
                qk_norm=True,
                serial_visual_output=False,
            ),
            special_token_ids=tuple(range(FIRST_ADDED_ID, FIRST_ADDED_ID + 12)),
        ),
        images=ImageConfig(max_patches=4096, multiscale=False),
        data=DataConfig(template="qwen3-chat"),
        optimizer=OptimizerConfig(peak_learning_rate=5e-5, weight_decay=0.05),
    )
