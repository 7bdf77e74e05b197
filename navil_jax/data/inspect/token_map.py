"""A drawing of where the tokens of an image sit, and how many a packed row takes."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from navil_jax.config import Config, VisionConfig
from navil_jax.data.images import Scale, window_order
from navil_jax.data.pillow_resampling import resize_image
from navil_jax.data.prompt import image_tokens
from navil_jax.errors import UserError


def row_budgets(config: Config) -> dict[str, int]:
    """The most that a packed row takes, by the name of the field of `ImageTokens`."""
    data = config.data
    return {"visual_tokens": data.visual_slots, "text_tokens": data.text_slots, "patches": data.patch_slots}


PAGE = 1600  # pixels that every drawing is wide
_MARGIN, _SPACE = 32, 24  # pixels around the page, and between panels
_INNER = PAGE - 2 * _MARGIN
_LARGEST, _HIGHEST = 768, 2000  # pixels, longer side of small images' largest scale; most that a scale is high
_NUMBERED = 28  # pixels of a window that has room for a number
_LINE = 180  # characters of a line
_PATCH, _UNIT, _WINDOW, _EDGE = (255, 255, 255, 70), (255, 255, 255, 190), (255, 140, 0, 255), (0, 220, 255, 255)
_LEGEND: dict[str, tuple[int, ...]] = {
    "patches (thin) and merged units, one visual token each": _UNIT,
    "windows, with the number of their first visual token": _WINDOW,
    "end of the image: what lies beyond is padding": _EDGE,
}


def draw_tokens(path: str | Path, images: Mapping[str, Image.Image], config: Config) -> None:
    """Draws each image's scales side by side, one image below the other, into a PNG of `PAGE` pixels' width.

    Numbers count the image's `<IMG_CONTEXT>` tokens from 0, in the order in which the encoder's outputs stand.

    Args:
      images: RGB images by the name that stands above them.

    Raises:
      UserError: as `image_tokens`, or the file cannot be written.
    """
    parts = [part for name, image in images.items() for part in (_text(name, (0, 0, 0), 20), _scales(image, config))]
    drawing = _stack([*parts, _legend()], vertical=True)
    page = Image.new("RGB", (PAGE, drawing.height + 2 * _MARGIN), "white")
    page.paste(drawing, (_MARGIN, _MARGIN))
    try:
        page.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _scales(image: Image.Image, config: Config) -> Image.Image:
    """The panels of one image, beside one another as far as the page is wide enough."""
    counts, vision = image_tokens(image.width, image.height, config), config.model.encoder
    rows, cols = max(scale.rows for scale in counts.scales), max(scale.cols for scale in counts.scales)
    side = max(vision.patch_size, _LARGEST // max(rows, cols))
    side = max(1, min(side, _INNER // cols, _HIGHEST // rows))
    panels, first = [], 0
    for scale in counts.scales:
        units = scale.rows * scale.cols // vision.unit_patches
        caption = f"{scale.width} x {scale.height} pixels, {scale.cols} x {scale.rows} patches, {units} tokens"
        panels.append(_titled(caption, _panel(image, scale, vision, side, first)))
        first += units
    return _flow(panels)


def _flow(panels: Sequence[Image.Image]) -> Image.Image:
    """The drawings in lines that are no wider than the page has room."""
    lines: list[list[Image.Image]] = [[]]
    for panel in panels:
        if lines[-1] and sum(one.width + _SPACE for one in lines[-1]) + panel.width > _INNER:
            lines.append([])
        lines[-1].append(panel)
    return _stack([_stack(line, vertical=False) for line in lines], vertical=True)


def _panel(image: Image.Image, scale: Scale, vision: VisionConfig, side: int, first: int) -> Image.Image:
    """One scale with its grids; `side` is that of a patch, `first` the number of its first visual token."""
    merge, zoom = vision.merge_size, side / vision.patch_size
    width, height = scale.cols * side, scale.rows * side
    panel = Image.new("RGBA", (width + 1, height + 1), "black")
    resized = resize_image(image, scale.width, scale.height)
    right, bottom = max(1, round(scale.width * zoom)), max(1, round(scale.height * zoom))
    panel.paste(resized.resize((right, bottom), Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX))
    for step, colour, line in ((1, _PATCH, 1), (merge, _UNIT, 1), (vision.window_size, _WINDOW, 3)):
        if step * side < 4:  # lines would hide the image
            continue
        layer = Image.new("RGBA", panel.size)
        pen = ImageDraw.Draw(layer)
        for col in [*range(0, scale.cols, step), scale.cols]:
            pen.line([(col * side, 0), (col * side, height)], colour, line)
        for row in [*range(0, scale.rows, step), scale.rows]:
            pen.line([(0, row * side), (width, row * side)], colour, line)
        panel.alpha_composite(layer)
    pen = ImageDraw.Draw(panel)
    pen.line([(right, 0), (right, bottom), (0, bottom)], _EDGE, 2)
    for row, col, number in _window_starts(scale, vision) if vision.window_size * side >= _NUMBERED else ():
        place = (col * side * merge + 4, row * side * merge + 4)
        text, font = str(first + number), ImageFont.load_default(13)
        pen.rectangle(pen.textbbox(place, text, font=font), (0, 0, 0, 255))
        pen.text(place, text, _WINDOW, font=font)
    return panel.convert("RGB")


def _window_starts(scale: Scale, vision: VisionConfig) -> list[tuple[int, int, int]]:
    """(row, column, number) of the unit in the upper left of each window, in merged units and the encoder's order."""
    merge = vision.merge_size
    rows, cols, window = scale.rows // merge, scale.cols // merge, vision.window_size // merge
    order = window_order(rows, cols, window) if vision.window_order else np.arange(rows * cols)
    places = [(*divmod(int(unit), cols), number) for number, unit in enumerate(order)]
    return [place for place in places if place[0] % window == 0 and place[1] % window == 0]


def _titled(text: str, drawing: Image.Image) -> Image.Image:
    return _stack([_text(text, (0, 0, 0)), drawing], vertical=True)


def _legend() -> Image.Image:
    return _flow([_flow([_swatch(colour), _text(text, (60, 60, 60))]) for text, colour in _LEGEND.items()])


def _swatch(colour: tuple[int, ...]) -> Image.Image:
    """A line as it stands in the drawings, on their dark ground."""
    drawing = Image.new("RGB", (36, 18), "black")
    ImageDraw.Draw(drawing).line([(4, 9), (32, 9)], colour[:3], 3)
    return drawing


def _text(text: str, colour: tuple[int, int, int], size: int = 15) -> Image.Image:
    font = ImageFont.load_default(size)
    text = "\n".join(textwrap.wrap(text, _LINE * 15 // size)) or " "
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, font=font)
    drawing = Image.new("RGB", (round(right - left) + 2, round(bottom - top) + 4), "white")
    ImageDraw.Draw(drawing).text((1 - left, 2 - top), text, colour, font=font)
    return drawing


def _stack(drawings: Sequence[Image.Image], vertical: bool) -> Image.Image:
    """The drawings below or beside one another, on white."""
    gap = 8 if vertical else _SPACE
    lengths = [drawing.height if vertical else drawing.width for drawing in drawings]
    across = max(drawing.width if vertical else drawing.height for drawing in drawings)
    along = sum(lengths) + gap * len(lengths)
    sheet = Image.new("RGB", (across, along) if vertical else (along, across), "white")
    for drawing, end in zip(drawings, np.cumsum([length + gap for length in lengths]).tolist(), strict=True):
        start = end - gap - (drawing.height if vertical else drawing.width)
        sheet.paste(drawing, (0, start) if vertical else (start, 0))
    return sheet
