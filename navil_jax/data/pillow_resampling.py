"""Pillow's bicubic resize with the width first, whatever Pillow is installed, and the cutting of patches by NumPy.

Newer Pillows (12.2 and later) resize the height first in some tall images, which rounds to other bytes. The released
weights were trained with versions that never do.
"""

import numpy as np
from PIL import Image


def resize_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """A bicubic copy, with antialias: first as wide as asked, then as high.

    Example: resize_image(image of 360 x 800, 64, 640) -> one of 64 x 640, by way of 64 x 800
    """
    narrow = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return narrow.resize((width, height), Image.Resampling.BICUBIC)


def resize(pixels: np.ndarray, height: int, width: int, canvas: np.ndarray) -> None:
    """`resampling.resize` without Numba: the same bytes, several times as slow."""
    image = Image.frombuffer("RGBX", pixels.shape[::-1], pixels, "raw", "RGBX", 0, 1)
    copy = resize_image(image, width, height)
    canvas[:height, :width] = np.frombuffer(copy.tobytes("raw", "RGBX"), np.uint32).reshape(height, width)


def cut(canvas: np.ndarray, order: np.ndarray, merge: int, side: int, patches: np.ndarray) -> None:
    """`resampling.cut` without Numba: the same bytes."""
    rows, cols = (length // (merge * side) for length in canvas.shape)
    colours = canvas.view(np.uint8).reshape(rows, merge, side, cols, merge, side, 4)[..., :3]
    units = colours.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * cols, -1)
    patches[:] = units[order].reshape(patches.shape)
