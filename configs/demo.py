"""The main job: a small NaViL that learns to see on two CPU cores.

Real images with questions (easy-VQA) and generated scenes of shapes, words and numbers. No download beyond the
packages.
"""

from navil_jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ImageConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    VisionConfig,
)


def get_config() -> Config:
    return Config(
        workdir="runs/demo",
        steps=2750,
        model=ModelConfig(
            vision=VisionConfig(depth=3, width=128, mlp_dim=256, num_heads=4, layer_scale_init=1.0),
            decoder=DecoderConfig(
                depth=1,
                width=128,
                mlp_dim=256,
                num_heads=4,
                num_kv_heads=4,
                head_dim=32,
                vocab_size=530,
                rope_theta=10_000.0,
                max_positions=4096,
            ),
            special_token_ids=(),  # those of the tokenizer that is trained on the data
            compute_dtype="float32",  # CPUs are slower in bfloat16
            remat="none",
        ),
        images=ImageConfig(min_patches=16, max_patches=1024, multiscale=False),
        data=DataConfig(
            sources=(SourceConfig("easy_vqa_captions", 2.0), SourceConfig("easy_vqa"), SourceConfig("scenes")),
            rows=4,
            visual_slots=47,
            text_slots=272,
            patch_slots=156,
            packing_lookahead=64,
            tokenizer_size=512,
        ),
        optimizer=OptimizerConfig(algorithm="muon", peak_learning_rate=1e-3, schedule="cosine", warmup_steps=100),
        log_every=50,
        checkpoint_every=500,
    )
