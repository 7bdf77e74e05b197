"""What is measured of an image: sides, grey levels, a perceptual hash, colours, and how much of it looks like text."""

from typing import Any

import numpy as np
from PIL import Image

HASH_SIDE, LOW_SIDE = 16, 8  # of the perceptual hash in bits, and of its part of low frequencies
HASH_BYTES = HASH_SIDE**2 // 8
SHOWN = 256  # pixels of the longer side of the copy that colours and grey levels are measured on
BLOCK, TEXT_SIDE = 16, 768  # pixels: side of what is taken for text or not, and most of an image's longer side


def image_measures(image: Image.Image) -> dict[str, Any]:
    """Of an RGB image: `hash` [32] uint8, `low` (63 bits of low frequencies), `colours` [14] uint8, deviation, text."""
    import imagehash

    small = image.copy()
    small.thumbnail((SHOWN, SHOWN), Image.Resampling.BOX)
    bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
    low = np.packbits(np.concatenate([[False], bits[:LOW_SIDE, :LOW_SIDE].ravel()[1:]]))
    return {
        "hash": np.packbits(bits),
        "low": int.from_bytes(low.tobytes(), "big"),
        "colours": imagehash.colorhash(small, binbits=3).hash.reshape(-1, 3) @ np.array([4, 2, 1], np.uint8),
        "deviation": float(np.asarray(small.convert("L")).std()),
        "text_area": text_area(image),
    }


def text_area(image: Image.Image) -> float:
    """Share of an image that looks like lines of text: blocks of two levels, many strokes across, few along.

    A guess without a model; `benchmarks/near_duplicates.py` says how good it is.
    """
    grey = image.convert("L")
    if max(grey.size) > TEXT_SIDE:
        grey.thumbnail((TEXT_SIDE, TEXT_SIDE), Image.Resampling.BOX)
    rows, cols = grey.height // BLOCK, grey.width // BLOCK
    if not rows or not cols:
        return 0.0
    pixels = np.asarray(grey, np.int16)[: rows * BLOCK, : cols * BLOCK]
    blocks = pixels.reshape(rows, BLOCK, cols, BLOCK).transpose(0, 2, 1, 3)
    low, high = np.percentile(blocks, (2, 98), axis=(2, 3))
    contrast = high - low
    middle = ((low + high) / 2)[..., None, None]
    dark = blocks < middle
    across = np.count_nonzero(dark[..., 1:] != dark[..., :-1], axis=(2, 3)) / BLOCK  # changes in a row of pixels
    along = np.count_nonzero(dark[..., 1:, :] != dark[..., :-1, :], axis=(2, 3)) / BLOCK
    grey_share = np.mean(np.abs(blocks - middle) < contrast[..., None, None] / 6, axis=(2, 3))
    is_text = (contrast > 64) & (across > 1.6) & (along > 0.8) & (grey_share < 0.25)
    return float(is_text.mean())
