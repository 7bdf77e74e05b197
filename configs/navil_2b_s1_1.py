"""NaViL-2B, stage S1.1: 490M samples of captions; the visual weights are trained (docs/recipe.md)."""

import navil_2b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_2B, S1_1


def get_config() -> Config:
    return S1_1.config(navil_2b.get_config(), "navil_2b", NAVIL_2B[S1_1])
