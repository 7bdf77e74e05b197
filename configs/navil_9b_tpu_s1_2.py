"""NaViL-9B with an encoder of heads of 128, stage S1.2: all else as in navil_9b_s1_2.py."""

import navil_9b_tpu

from navil_jax.config import Config
from navil_jax.config.stages import NAVIL_9B, S1_2


def get_config() -> Config:
    return S1_2.config(navil_9b_tpu.get_config(), "navil_9b_tpu", NAVIL_9B[S1_2])
