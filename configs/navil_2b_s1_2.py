"""NaViL-2B, stage S1.2: 185M samples of better captions; the text's attention is trained too (docs/recipe.md)."""

import navil_2b
import stages

from navil_jax.config import Config


def get_config() -> Config:
    return stages.s1_2(navil_2b.get_config(), "navil_2b", steps=40_000, batch_samples=4_614, rows=384)
