"""A recipe that a CPU trains in seconds: name the colour of an image of 32 x 32 pixels."""

import dataclasses

from PIL import Image

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
from navil_jax.data.sample import Sample
from navil_jax.data.sources import SOURCES

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


@dataclasses.dataclass(frozen=True)
class Colors:
    split: str

    def __len__(self) -> int:
        return 64 if self.split == "train" else 12

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name, rgb = list(COLORS.items())[index % len(COLORS)]
        shade = tuple(c - index // len(COLORS) for c in rgb)
        image = Image.new("RGB", (32, 32), shade)
        return Sample(f"colors/{self.split}/{index}", (image,), (("Which color?", name),), "color")

    def texts(self):
        for name in COLORS:
            yield from ("Which color?", name)


def get_config() -> Config:
    SOURCES["colors"] = Colors
    return Config(
        steps=8,
        model=ModelConfig(
            vision=VisionConfig(depth=1, width=16, mlp_dim=32, num_heads=2),
            decoder=DecoderConfig(
                depth=2, width=32, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=400
            ),
            special_token_ids=(),
            compute_dtype="float32",
        ),
        images=ImageConfig(min_patches=4, max_patches=16, multiscale=False),
        data=DataConfig(
            sources=(SourceConfig("colors"),),
            rows=4,
            visual_slots=8,
            text_slots=96,
            patch_slots=8,
            packing_lookahead=4,
            tokenizer_size=320,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
        log_every=2,
        eval_every=3,
        eval_samples=4,
        checkpoint_every=3,
    )
