"""NaViL-9B, stage S1.1: 515M samples of captions; the visual weights are trained (docs/recipe.md)."""

import navil_9b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s1_1(
        navil_9b.get_config(), "navil_9b", steps=50_000, batch_samples=10_300, rows=512, multiscale=False
    )
