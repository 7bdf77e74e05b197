"""NaViL-9B as the paper states it (9.2B active, 16.4B parameters): the model; navil_9b_s1_1.py and so on train it."""

from navil_jax.config import Config, DataConfig, DecoderConfig, ModelConfig, VisionConfig

QWEN3_VOCABULARY = 151_936
FIRST_ADDED_ID = 151_669  # the Qwen3 tokenizer's length; its table has room for the special tokens beyond it


def get_config() -> Config:
    return Config(
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
        data=DataConfig(template="qwen3-chat"),
    )
