"""The main job: a small NaViL that learns to see on two CPU cores.

Plain drawings with questions in everyday words, and the images of easy-VQA. No download beyond the packages. Shapes
alone come first, then what they are and their colours, then everything: mixed from the start, shapes are not learned.
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
    WeightPoint,
)

LATER = WeightPoint(0, 0.0)


def get_config() -> Config:
    return Config(
        workdir="runs/demo",
        steps=2500,
        batch_samples=12,
        model=ModelConfig(
            vision=VisionConfig(depth=3, width=128, mlp_dim=256, num_heads=4, layer_scale_init=1.0, patch_waves=4),
            decoder=DecoderConfig(
                depth=2,
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
        images=ImageConfig(min_patches=16, max_patches=64, multiscale=False),
        data=DataConfig(
            sources=(
                SourceConfig("drawings_shapes", weight_points=(WeightPoint(300, 0.3), WeightPoint(600, 0.0))),
                SourceConfig("drawings_looks", weight_points=(LATER, WeightPoint(300, 1.0), WeightPoint(600, 0.2))),
                SourceConfig("drawings", weight_points=(LATER, WeightPoint(600, 1.0))),
                SourceConfig("easy_vqa", weight_points=(LATER, WeightPoint(600, 0.4))),
            ),
            rows=4,
            visual_slots=64,
            text_slots=240,
            patch_slots=192,
            packing_lookahead=64,
            tokenizer_size=512,
        ),
        optimizer=OptimizerConfig(algorithm="muon", peak_learning_rate=2e-3, schedule="cosine", warmup_steps=100),
        log_every=50,
        checkpoint_every=500,
    )
