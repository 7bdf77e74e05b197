"""NaViL-9B, stage S1.2: 59M samples of better captions; the text's attention is trained too (docs/recipe.md)."""

import navil_9b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_9B, S1_2


def get_config() -> Config:
    return S1_2.config(navil_9b.get_config(), "navil_9b", NAVIL_9B[S1_2])
