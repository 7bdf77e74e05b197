"""The five findings at a size for two CPU cores: about 90 minutes with --jobs 2.

Language models of three sizes learn from a book. Then they learn to describe generated scenes of shapes, words and
numbers, and to read pages of the book that they have not seen. All weights are trained; the learning
rate stays constant, so that every evaluation of a run is a run of that many samples.

  (1) initialised against scratch      (2) no experts, FFN experts, attention + FFN experts
  (3) depth x width at about 150,000 encoder parameters
  (4), (5) three LLM sizes with five encoder sizes, about a doubling apart
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
from navil_jax.study.grid import Run, Study, grid, union

ALL, FFN, NONE = (True, True), (True, False), (False, False)
SIZES = [(3, 32), (3, 48), (3, 64), (3, 96), (3, 128)]
SHAPES = [(1, 112), (2, 80), (3, 64), (6, 48), (12, 32)]
LLMS = {"s": (2, 64), "m": (2, 128), "l": (2, 192)}  # depth, width


def decoder(depth: int, width: int) -> DecoderConfig:
    return DecoderConfig(
        depth=depth,
        width=width,
        mlp_dim=2 * width,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        vocab_size=544,
        rope_theta=10_000.0,
        max_positions=4096,
    )


def base() -> Config:
    return Config(
        steps=400,
        model=ModelConfig(
            vision=VisionConfig(depth=3, width=64, mlp_dim=256, num_heads=4, layer_scale_init=1.0),
            special_token_ids=(),
            compute_dtype="float32",
            remat="none",
        ),
        images=ImageConfig(min_patches=16, max_patches=1024, multiscale=False),
        data=DataConfig(
            sources=(SourceConfig("scenes_captions"), SourceConfig("pages")),
            rows=4,
            visual_slots=64,
            text_slots=208,
            patch_slots=240,
            packing_lookahead=64,
            tokenizer_size=512,
            loss_weight="token",
        ),
        optimizer=OptimizerConfig(algorithm="muon", peak_learning_rate=1e-3, warmup_steps=32),
        log_every=32,
        eval_every=40,
        checkpoint_every=200,
        keep_checkpoints=1,
        eval_baseline_samples=100,
    )


def language() -> Config:
    settings = base()
    return Config(
        steps=320,
        model=settings.model,
        data=DataConfig(
            rows=8, visual_slots=2, text_slots=512, patch_slots=4, packing_lookahead=32, loss_weight="token"
        ),
        optimizer=settings.optimizer,
        log_every=50,
        checkpoint_every=160,
        keep_checkpoints=1,
        eval_baseline_samples=100,
    )


def all_runs() -> tuple[Run, ...]:
    return union(
        grid(["m"], [(3, 64)], initialised=(True, False), seeds=(0, 1, 2)),
        grid(["m"], [(3, 64)], experts=(ALL, FFN, NONE), seeds=(0, 1, 2)),
        grid(["m"], SHAPES, seeds=(0, 1)),
        grid(LLMS, SIZES, seeds=(0, 1)),
    )


def get_study() -> Study:
    llms = {name: decoder(*shape) for name, shape in LLMS.items()}
    return Study("small", base(), llms, all_runs(), language(), text_bytes=2_000_000)
