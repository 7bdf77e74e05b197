"""A language model and two runs that end in less than a minute: does everything work? Its losses say nothing."""

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
from navil_jax.study.grid import Study, grid


def get_study() -> Study:
    model = ModelConfig(
        vision=VisionConfig(depth=1, width=16, mlp_dim=64, num_heads=1, layer_scale_init=1.0),
        special_token_ids=(),
        compute_dtype="float32",
        remat="none",
    )
    data = DataConfig(
        sources=(SourceConfig("easy_vqa_captions"),),
        rows=2,
        visual_slots=40,
        text_slots=200,
        patch_slots=128,
        packing_lookahead=16,
        tokenizer_size=384,
        loss_weight="token",
    )
    optimizer = OptimizerConfig(algorithm="muon", peak_learning_rate=2e-3, warmup_steps=2)
    decoder = DecoderConfig(
        depth=1,
        width=32,
        mlp_dim=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=416,
        rope_theta=10_000.0,
        max_positions=4096,
    )
    base = Config(
        steps=8,
        model=model,
        images=ImageConfig(min_patches=16, max_patches=64, multiscale=False),
        data=data,
        optimizer=optimizer,
        log_every=2,
        eval_every=4,
        eval_samples=40,
        checkpoint_every=4,
        keep_checkpoints=1,
        eval_baseline_samples=100,
    )
    language = Config(
        steps=30,
        model=model,
        data=DataConfig(
            rows=2, visual_slots=2, text_slots=400, patch_slots=4, packing_lookahead=8, loss_weight="token"
        ),
        optimizer=optimizer,
        log_every=2,
        checkpoint_every=30,
        keep_checkpoints=1,
        eval_baseline_samples=100,
    )
    runs = grid(["s"], [(1, 16)], initialised=(True, False))
    return Study("tiny", base, {"s": decoder}, runs, language, text_bytes=40_000)
