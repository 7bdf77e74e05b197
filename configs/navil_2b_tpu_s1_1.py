"""NaViL-2B with an encoder of heads of 128, stage S1.1: all else as in navil_2b_s1_1.py."""

import navil_2b_tpu

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_2B, S1_1


def get_config() -> Config:
    return S1_1.config(navil_2b_tpu.get_config(), "navil_2b_tpu", NAVIL_2B[S1_1])
