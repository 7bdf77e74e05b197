"""NaViL-2B, stage S1.1: 490M samples of captions; the visual weights are trained (docs/recipe.md)."""

import navil_2b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s1_1(navil_2b.get_config(), "navil_2b", steps=70_000, batch_samples=7_000, rows=384)
