"""NaViL-2B, stage S2: 67M samples of instructions; everything is trained (docs/recipe.md)."""

import navil_2b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s2(navil_2b.get_config(), "navil_2b", steps=30_000, batch_samples=2_234, rows=256)
