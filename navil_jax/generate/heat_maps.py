"""Attention over an image as drawings: one cell for each visual token, at its own patches; and curves by layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from navil_jax.batch import SampleFeatures
from navil_jax.config import ModelConfig
from navil_jax.data.images import Scale
from navil_jax.data.pillow_resampling import resize_image

SIDE = 384  # pixels, about the longer side of a drawing
SHARE = 0.6  # of the colour in a drawing; the rest is the image in grey
GREY = 190  # stands for the image where the colours are explained
COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)  # low to high
WIDTH, HEIGHT, MARGIN, TEXT = 560, 240, 56, 18  # pixels of curves
LINES = ((31, 95, 191), (200, 80, 20))


class Units(NamedTuple):
    """Where the merged units of a prompt's images are; K of them."""

    positions: np.ndarray  # [K] of their tokens in the prompt
    cells: np.ndarray  # [K, 2] row and column in their scale, in units
    scales: np.ndarray  # [K] number of the scale in the prompt, from 1


def units_of(prompt: SampleFeatures, model: ModelConfig) -> Units:
    """The units of all images; the k-th `<IMG_CONTEXT>` is the k-th unit of patches."""
    vision = model.encoder
    context = prompt["visual_tokens"] == model.special_id("<IMG_CONTEXT>")
    each = slice(None, None, vision.unit_patches)
    cells = prompt["patch_coords"][each] // vision.merge_size
    return Units(prompt["visual_positions"][context], cells, prompt["patch_blocks"][each])


def grids(units: Units, weights: np.ndarray) -> list[np.ndarray]:
    """Weights [S] of a prompt's tokens as [rows, columns] of units, for each scale in order."""
    found = []
    for scale in np.unique(units.scales):
        own = units.scales == scale
        cells = units.cells[own]
        grid = np.zeros(cells.max(axis=0) + 1, np.float64)
        grid[cells[:, 0], cells[:, 1]] = weights[units.positions[own]]
        found.append(grid)
    return found


def heat_map(image: Image.Image, scale: Scale, grid: np.ndarray, most: float, patch: int) -> Image.Image:
    """The image at one scale, with its padding, in grey under a colour for each unit.

    Args:
      most: the weight that has the highest colour.
      patch: pixels of a patch's side.
    """
    canvas = Image.new("L", (scale.cols * patch, scale.rows * patch))
    canvas.paste(resize_image(image, scale.width, scale.height).convert("L"))
    unit = patch * scale.cols // grid.shape[1]
    zoom = max(1, SIDE // max(canvas.size))
    grey = np.asarray(canvas.resize((canvas.width * zoom, canvas.height * zoom), Image.Resampling.NEAREST), np.float64)
    heat = np.kron(np.clip(grid / most if most else grid, 0, 1), np.ones((unit * zoom, unit * zoom)))
    return Image.fromarray((SHARE * _colour(heat) + (1 - SHARE) * grey[..., None]).round().astype(np.uint8))


def ramp() -> Image.Image:
    """The colours of drawings, from 0 to the largest weight."""
    colour = _colour(np.linspace(0, 1, 200)[None].repeat(20, axis=0))
    return Image.fromarray((SHARE * colour + (1 - SHARE) * GREY).round().astype(np.uint8))


def _colour(heat: np.ndarray) -> np.ndarray:
    """[...] from 0 to 1 -> [..., 3]"""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(heat, steps, COLOURS[:, channel]) for channel in range(3)], axis=-1)


def curves(title: str, lines: Mapping[str, Sequence[float] | np.ndarray]) -> Image.Image:
    """Values by layer as lines, from 0 on; each with its name at its end."""
    drawing = Image.new("RGB", (WIDTH + 4 * MARGIN, HEIGHT + 2 * MARGIN), "white")
    pen, font = ImageDraw.Draw(drawing), ImageFont.load_default(TEXT)
    most = max((value for values in lines.values() for value in values if np.isfinite(value)), default=1.0) or 1.0
    pen.text((4, 8), title, "black", font=font)
    pen.rectangle((MARGIN, MARGIN, MARGIN + WIDTH, MARGIN + HEIGHT), outline=(160, 160, 160))
    for share in (0, 0.5, 1):
        pen.text((MARGIN - 6, MARGIN + HEIGHT * (1 - share)), f"{most * share:.3g}", "black", font=font, anchor="rm")
    ends: list[tuple[float, str, tuple[int, int, int]]] = []
    for colour, (name, values) in zip(LINES, lines.items(), strict=False):
        across = np.linspace(MARGIN, MARGIN + WIDTH, len(values)) if len(values) > 1 else np.array([MARGIN])
        points = [(x, MARGIN + HEIGHT * (1 - y / most)) for x, y in zip(across, values, strict=True) if np.isfinite(y)]
        if points:
            pen.line(points, colour, 3)
            for x, y in points:
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            ends.append((points[-1][1], name, colour))
    lowest = 0.0  # where the next name may stand: names of lines that end alike go below each other
    for y, name, colour in sorted(ends):
        lowest = max(y, lowest)
        pen.text((MARGIN + WIDTH + 10, lowest), name, colour, font=font, anchor="lm")
        lowest += TEXT
    count = max(map(len, lines.values()))
    for number in sorted({0, (count - 1) // 2, count - 1}):
        x = MARGIN + WIDTH * number / max(1, count - 1)
        pen.text((x, MARGIN + HEIGHT + 6), str(number), "black", font=font, anchor="ma")
    pen.text((MARGIN + WIDTH + 10, MARGIN + HEIGHT + 6), "layer", "black", font=font)
    return drawing
