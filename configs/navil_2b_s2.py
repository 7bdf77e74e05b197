"""NaViL-2B, stage S2: 67M samples of instructions; everything is trained (docs/recipe.md)."""

import navil_2b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_2B, S2


def get_config() -> Config:
    return S2.config(navil_2b.get_config(), "navil_2b", NAVIL_2B[S2])
