"""Pillow's bicubic resize, bit for bit and several times as fast, and the cutting of patches; compiled by Numba.

Pixels are 4 bytes, red, green, blue and one that does not count, in the first to the fourth byte of a uint32; so they
are moved as one number and weighed as bytes. As in Pillow, the width is resized first and rounded to whole bytes, and
then the height; the weights are whole numbers, so the order of additions does not matter. Nothing here holds Python's
lock, so threads run side by side.
"""

import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_BITS = 22  # binary places of the weights
_STRIP = 64  # rows that are turned at a time, so that they stay in the cache

assert sys.byteorder == "little"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder where compiled code could be kept: every process compiles it, in seconds
        return numba.njit(nogil=True)(function)


def resize(pixels: np.ndarray, height: int, width: int, canvas: np.ndarray) -> None:
    """Writes a bicubic copy, with antialias, of height x width pixels into the upper left of `canvas`.

    Equal to `pillow_resampling.resize` in every byte that counts.

    Args:
      pixels: [h, w] uint32, contiguous.
      canvas: [H, W] uint32, contiguous, at least height x width; what lies beyond stays as it is.
    """
    if width != pixels.shape[1]:
        pixels = _resample_columns(pixels, width)
    if height != len(pixels):
        _weigh_rows(pixels.view(np.uint8), *_weights(len(pixels), height), canvas.view(np.uint8))
    else:
        canvas[:height, :width] = pixels


@compiled
def cut(canvas: np.ndarray, order: np.ndarray, merge: int, side: int, patches: np.ndarray) -> None:
    """Cuts a padded image into patches.

    Args:
      canvas: [rows * side, cols * side] uint32.
      order: [units] int64, the raster number of each merged unit, in the order in which they shall stand.
      merge: side of a merged unit in patches; side: of a patch in pixels.
      patches: [units * merge**2, 3 * side**2] uint8, written: a unit's patches row by row, each patch channel first.

    Example: 2 x 4 patches, merge 2, order 1 0 -> patches at (row, column) 02 03 12 13 00 01 10 11
    """
    unit_cols = canvas.shape[1] // (merge * side)
    area = side * side
    for place in range(len(order)):
        unit_row, unit_col = divmod(order[place], unit_cols)
        for part in range(merge * merge):
            top = (unit_row * merge + part // merge) * side
            left = (unit_col * merge + part % merge) * side
            patch = patches[place * merge * merge + part]
            for y in range(side):
                row = canvas[top + y, left : left + side]
                red = patch[y * side : (y + 1) * side]
                green = patch[area + y * side : area + (y + 1) * side]
                blue = patch[2 * area + y * side : 2 * area + (y + 1) * side]
                for x in range(side):
                    red[x] = np.uint8(row[x])
                for x in range(side):
                    green[x] = np.uint8(row[x] >> 8)
                for x in range(side):
                    blue[x] = np.uint8(row[x] >> 16)


@compiled
def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each of `after` pixels takes from the `before` ones along one side.

    Returns:
      starts [after] int64, the first pixel; counts [after] int64, how many; weights [after, most] int32, in 2**-22.
    """
    scale = before / after
    stretch = max(scale, 1.0)  # of the kernel, whose half width is 2
    starts, counts = np.empty(after, np.int64), np.empty(after, np.int64)
    kernel = np.zeros(2 * int(np.ceil(2 * stretch)) + 1)
    weights = np.zeros((after, len(kernel)), np.int32)
    for i in range(after):
        centre = (i + 0.5) * scale
        start = max(int(centre - 2 * stretch + 0.5), 0)
        count = min(int(centre + 2 * stretch + 0.5), before) - start
        total = 0.0
        for j in range(count):
            x = abs((j + start - centre + 0.5) * (1.0 / stretch))
            if x < 1:
                kernel[j] = (1.5 * x - 2.5) * x * x + 1
            elif x < 2:
                kernel[j] = (((x - 5) * x + 8) * x - 4) * -0.5
            else:
                kernel[j] = 0.0
            total += kernel[j]
        for j in range(count):
            weight = kernel[j] / total * (1 << _BITS)
            weights[i, j] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        starts[i], counts[i] = start, count
    return starts, counts, weights


@compiled
def _weigh_rows(
    source: np.ndarray, starts: np.ndarray, counts: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """out[i, :n] = sum over j < counts[i] of weights[i, j] * source[starts[i] + j], rounded and clipped to a byte.

    Args:
      source: [rows, n] uint8; out: [at least the length of starts, at least n] uint8, written.
    """
    n = source.shape[1]
    sums = np.empty(n, np.int32)
    for i in range(len(starts)):
        sums[:] = 1 << (_BITS - 1)
        j, start = 0, starts[i]
        while j + 4 <= counts[i]:  # four rows in one sweep: fewer visits to the sums
            a, b, c, d = source[start + j], source[start + j + 1], source[start + j + 2], source[start + j + 3]
            wa, wb, wc, wd = weights[i, j], weights[i, j + 1], weights[i, j + 2], weights[i, j + 3]
            for x in range(n):
                sums[x] += np.int32(a[x]) * wa + np.int32(b[x]) * wb + np.int32(c[x]) * wc + np.int32(d[x]) * wd
            j += 4
        while j < counts[i]:
            a, wa = source[start + j], weights[i, j]
            for x in range(n):
                sums[x] += np.int32(a[x]) * wa
            j += 1
        row = out[i]
        for x in range(n):
            row[x] = min(max(sums[x] >> np.int32(_BITS), np.int32(0)), np.int32(255))


@compiled
def _transpose(source: np.ndarray, out: np.ndarray) -> None:
    """out[j, i] = source[i, j], in blocks."""
    rows, cols = np.uint64(source.shape[0]), np.uint64(source.shape[1])  # indices without a sign are checked less
    zero, block = np.uint64(0), np.uint64(32)
    for top in range(zero, rows, block):
        for left in range(zero, cols, block):
            for j in range(left, min(left + block, cols)):
                for i in range(top, min(top + block, rows)):
                    out[j, i] = source[i, j]


@compiled
def _resample_columns(pixels: np.ndarray, width: int) -> np.ndarray:
    """[h, w] uint32 -> [h, width] uint32. Turned, so that whole rows are weighed there, too."""
    height, before = pixels.shape
    starts, counts, weights = _weights(before, width)
    out = np.empty((height, width), np.uint32)
    for top in range(0, height, _STRIP):
        rows = min(_STRIP, height - top)
        strip, narrow = np.empty((before, rows), np.uint32), np.empty((width, rows), np.uint32)
        _transpose(pixels[top : top + rows], strip)
        _weigh_rows(strip.view(np.uint8), starts, counts, weights, narrow.view(np.uint8))
        _transpose(narrow, out[top : top + rows])
    return out
