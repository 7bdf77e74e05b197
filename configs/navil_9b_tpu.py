"""NaViL-9B with an encoder made for TPUs: 14 heads of 128, which fill a matrix unit, for the paper's 28 of 64.

Width, MLP and number of parameters are the paper's.
"""

import dataclasses

import navil_9b

from navil_jax.config import Config


def get_config() -> Config:
    config = navil_9b.get_config()
    vision = dataclasses.replace(config.model.encoder, num_heads=14)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
