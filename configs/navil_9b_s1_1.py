"""NaViL-9B, stage S1.1: 515M samples of captions; the visual weights are trained (docs/recipe.md)."""

import navil_9b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_9B, S1_1


def get_config() -> Config:
    return S1_1.config(navil_9b.get_config(), "navil_9b", NAVIL_9B[S1_1])
