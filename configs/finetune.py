"""Fine-tuning on one's own LLaVA-style JSON on one accelerator, by low-rank updates (docs/finetune.md)."""

from navil_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, SourceConfig


def get_config() -> Config:
    mine = SourceConfig("mine", kind="llava", path="data/train.json", held_out="data/held_out.json", root="data/images")
    return Config(
        workdir="runs/finetune",
        init_from="runs/navil-2b",  # python -m navil_jax.convert import NaViL-2B runs/navil-2b
        init_model=True,
        steps=500,
        batch_samples=32,
        model=ModelConfig(param_dtype="bfloat16", lora_rank=16),
        data=DataConfig(
            sources=(mine,),
            rows=4,
            visual_slots=6_144,
            text_slots=2_048,
            patch_slots=24_576,
            oversize="resize",
        ),
        optimizer=OptimizerConfig(
            peak_learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=20,
            weight_decay=0.0,
            microbatches=4,
            trainable=("**/lora_a", "**/lora_b"),
        ),
        eval_every=100,
        eval_samples=64,
        checkpoint_every=100,
    )
