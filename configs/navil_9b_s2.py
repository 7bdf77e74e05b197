"""NaViL-9B, stage S2: 21M samples of instructions; everything is trained (docs/recipe.md)."""

import navil_9b

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_9B, S2


def get_config() -> Config:
    return S2.config(navil_9b.get_config(), "navil_9b", NAVIL_9B[S2])
