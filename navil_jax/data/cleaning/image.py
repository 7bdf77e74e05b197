"""What is measured of an image: how much it varies, a perceptual hash, colours, and how much of it looks like text."""

from typing import Any

import numpy as np
from PIL import Image

HASH_SIDE, LOW_SIDE = 16, 8  # of the perceptual hash in bits, and of its part of low frequencies
HASH_BYTES = HASH_SIDE**2 // 8
GREY_SIDE, COLOUR_SIDE = 640, 96  # pixels: no longer side is smaller than these when an image is reduced
HUES, COLOUR_SUM = 13, 255  # sectors of the colour circle; sum of a colour histogram
_PALE = 8.0  # chroma, 0 to 255, that counts as much as none
BLOCK = 16  # pixels: side of what is taken for text or not
_CONTRAST, _ACROSS, _ALONG, _BIMODAL = 80, 2.0, 1.5, 0.5  # of blocks with text


def image_measures(image: Image.Image) -> dict[str, Any]:
    """Of an RGB image: `hash` [32] uint8, `low` (63 bits of low frequencies), `colours` [14] uint8, deviation, text."""
    import imagehash

    grey, small = _reduced(image.convert("L"), GREY_SIDE), _reduced(image, COLOUR_SIDE)
    bits = imagehash.phash(grey, hash_size=HASH_SIDE).hash
    low = np.packbits(np.concatenate([[False], bits[:LOW_SIDE, :LOW_SIDE].ravel()[1:]]))
    return {
        "hash": np.packbits(bits),
        "low": int.from_bytes(low.tobytes(), "big"),
        "colours": colours(small),
        "deviation": float(np.asarray(small, np.float32).std((0, 1)).max()),
        "text_area": text_area(grey),
    }


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """The image with sides divided by a whole number, or as it is if its longer side is below twice the given one."""
    factor = max(image.size) // side
    return image.reduce(factor) if factor > 1 else image


def colours(image: Image.Image) -> np.ndarray:
    """Histogram of an RGB image's hues, weighted by chroma, in 255ths; the last number is of what is pale.

    A small red object on white counts as red, wherever it stands: that tells drawings of one shape apart, and a hash of
    grey levels does not. [14] uint8
    """
    red, green, blue = np.asarray(image, np.float32).reshape(-1, 3).T
    x, y = red - (green + blue) / 2, (green - blue) * np.float32(0.75**0.5)
    chroma, angle = np.hypot(x, y), np.arctan2(y, x) / (2 * np.pi) % 1 * HUES
    sector, share = np.floor(angle).astype(np.int64) % HUES, angle % 1
    found = np.bincount(sector, chroma * (1 - share), HUES) + np.bincount((sector + 1) % HUES, chroma * share, HUES)
    found = np.append(found, _PALE * len(red))
    return np.round(found * (COLOUR_SUM / found.sum())).astype(np.uint8)


def text_area(grey: Image.Image) -> float:
    """Share of a grey image that looks like text: blocks of two levels with several strokes, at the scale with most.

    A guess without a model. `benchmarks/near_duplicates.py` says how well it tells pages from other made images; nets,
    hatching and checks look like text, too.
    """
    areas = [0.0]
    for scale in (1, 2, 4):
        reduced = grey.reduce(scale) if scale > 1 else grey
        rows, cols = reduced.height // BLOCK, reduced.width // BLOCK
        if not rows or not cols:
            break
        pixels = np.asarray(reduced)[: rows * BLOCK, : cols * BLOCK].reshape(rows, BLOCK, cols, BLOCK)
        blocks = pixels.transpose(0, 2, 1, 3).reshape(-1, BLOCK, BLOCK)
        low, high = (take(blocks.reshape(-1, BLOCK**2), 1).astype(np.float32) for take in (np.min, np.max))
        some = np.flatnonzero(high - low > _CONTRAST)
        blocks, low, high = blocks[some], low[some], high[some]
        dark = blocks < ((low + high) / 2)[:, None, None]
        across = (dark[:, :, 1:] != dark[:, :, :-1]).sum((1, 2)) / BLOCK  # changes in a line of pixels
        along = (dark[:, 1:] != dark[:, :-1]).sum((1, 2)) / BLOCK
        bimodal = 2 * blocks.reshape(-1, BLOCK**2).std(1, np.float32) / (high - low)  # 1: two levels, equally often
        is_text = (across > _ACROSS) & (along > _ALONG) & (bimodal > _BIMODAL)
        areas.append(np.count_nonzero(is_text) / (rows * cols))
    return max(areas)
