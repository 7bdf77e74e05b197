"""A recipe for tests of planning: a model that compiles quickly for TPUs."""

from navil_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, ModelConfig, VisionConfig


def get_config() -> Config:
    vision = VisionConfig(depth=2, width=256, mlp_dim=512, num_heads=4)
    decoder = DecoderConfig(depth=2, width=512, mlp_dim=1024, num_heads=4, num_kv_heads=2, vocab_size=2012)
    return Config(
        steps=100,
        model=ModelConfig(vision=vision, decoder=decoder, special_token_ids=tuple(range(2000, 2012))),
        images=ImageConfig(max_patches=1024),
        data=DataConfig(rows=8, visual_slots=768, text_slots=256, patch_slots=3072),
    )
