"""NaViL-9B, stage S1.2: 59M samples of better captions; the text's attention is trained too (docs/recipe.md)."""

import navil_9b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s1_2(navil_9b.get_config(), "navil_9b", steps=33_000, batch_samples=1_792, rows=128)
