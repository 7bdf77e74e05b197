"""What the vision encoder makes of pixels: the released preprocessing's numbers, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx
from tiny import tiny_model

from navil_jax.model.vision import VisionEncoder, pixel_values

LEVELS = np.arange(256, dtype=np.uint8)


def released(levels: np.ndarray) -> np.ndarray:
    """The released formula: scaled in double precision, rounded, then normalised in single precision."""
    scaled = (levels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


@pytest.mark.parametrize("how", [pixel_values, jax.jit(pixel_values)], ids=["eager", "jit"])
def test_every_level_has_the_released_bits(how) -> None:
    values = how(jnp.asarray(LEVELS))
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(values).view(np.int32), released(LEVELS).view(np.int32))


def test_every_level_has_the_released_bits_where_a_compiler_fuses() -> None:
    """A fused multiply-add rounds once: here each product is exact in double precision, and so is their sum."""
    large = 257 / 65536
    level, small = LEVELS.astype(np.float64), np.float64(np.float32(1 / 255 - large))
    for scaled in (level * large + level * small, level * large + (level * small).astype(np.float32)):
        scaled = scaled.astype(np.float32)
        np.testing.assert_array_equal((scaled - np.float32(0.5)) / np.float32(0.5), released(LEVELS))


def test_pixel_values_example() -> None:
    values = pixel_values(jnp.array([0, 127, 255], jnp.uint8))
    np.testing.assert_array_equal(values, np.array([-1, -0.0039215684, 1], np.float32))


def test_the_encoder_embeds_these_numbers() -> None:
    encoder = VisionEncoder(tiny_model(), nnx.Rngs(0))
    patches = np.random.default_rng(0).integers(0, 256, (1, 4, encoder.config.patch_dim), np.uint8)
    expected = encoder.patch_embed(jnp.asarray(released(patches)))
    np.testing.assert_array_equal(encoder.embed(jnp.asarray(patches)), expected)


def test_filters_to_start_from_hold_the_lowest_frequencies_of_a_patch_alone() -> None:
    vision = dataclasses.replace(tiny_model().encoder, patch_waves=3)
    kernel = VisionEncoder(tiny_model(vision=vision), nnx.Rngs(0)).patch_embed.kernel[...]
    side, width = vision.patch_size, vision.width
    assert kernel.shape == (vision.patch_dim, width)
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0).mean(), 1, rtol=0.1)
    spectrum = scipy.fft.dctn(np.asarray(kernel).reshape(3, side, side, width), axes=(1, 2), norm="ortho")
    assert np.abs(spectrum[:, :3, :3]).min(axis=(0, 1, 2)).max() > 0
    np.testing.assert_allclose(spectrum[:, 3:], 0, atol=1e-6)
    np.testing.assert_allclose(spectrum[:, :, 3:], 0, atol=1e-6)
