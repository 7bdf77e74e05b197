"""NaViL-2B with an encoder of heads of 128, stage S1.2: all else as in navil_2b_s1_2.py."""

import navil_2b_tpu

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_2B, S1_2


def get_config() -> Config:
    return S1_2.config(navil_2b_tpu.get_config(), "navil_2b_tpu", NAVIL_2B[S1_2])
