"""NaViL-9B, stage S2: 21M samples of instructions; everything is trained (docs/recipe.md)."""

import navil_9b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s2(navil_9b.get_config(), "navil_9b", steps=6_000, batch_samples=3_520, rows=256)
