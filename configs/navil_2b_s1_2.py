"""NaViL-2B, stage S1.2: 185M samples of better captions; the text's attention is trained too (docs/recipe.md)."""

import navil_2b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_2B, S1_2


def get_config() -> Config:
    return S1_2.config(navil_2b.get_config(), "navil_2b", NAVIL_2B[S1_2])
