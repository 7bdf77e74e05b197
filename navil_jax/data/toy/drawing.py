"""What is in a plain drawing, and how it is drawn: one to five flat shapes, or a word, in one of two styles.

Colours, sizes, positions, fonts, backgrounds and forms of the canvas vary widely.
"""

import cmath
import dataclasses
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from navil_jax.data.toy import scenes

RGB = tuple[int, int, int]
SHADES: dict[str, tuple[tuple[RGB, ...], RGB]] = {  # of each colour: those that training uses, and one that it does not
    "red": (((255, 0, 0), (220, 20, 30), (200, 30, 30)), (230, 57, 70)),
    "green": (((0, 128, 0), (0, 200, 0), (0, 255, 0), (40, 160, 60)), (76, 175, 80)),
    "blue": (((0, 0, 255), (30, 80, 220), (0, 0, 180)), (33, 110, 243)),
    "yellow": (((255, 255, 0), (240, 210, 20)), (255, 235, 59)),
    "orange": (((255, 165, 0), (255, 128, 0)), (255, 145, 20)),
    "purple": (((128, 0, 128), (140, 50, 190)), (155, 39, 176)),
    "pink": (((255, 192, 203), (255, 130, 190), (255, 105, 180)), (250, 150, 190)),
    "brown": (((165, 42, 42), (139, 69, 19), (120, 72, 40)), (121, 85, 72)),
    "black": (((0, 0, 0), (25, 25, 25)), (15, 15, 20)),
    "gray": (((128, 128, 128), (150, 150, 150), (110, 110, 110)), (140, 140, 145)),
    "teal": (((0, 128, 128), (20, 175, 180)), (0, 150, 136)),
}
JITTER = 12  # of each channel
SHAPES = ("circle", "square", "triangle", "rectangle", "star", "diamond", "heart", "cross", "oval")
OFTEN = (6, 6, 5, 4, 4, 2, 2, 2, 1)  # how often each is drawn against the others, as people draw them
LONG = {"rectangle": (1.6, 3.0), "oval": (1.6, 2.4)}  # the longer side over the shorter
WORDS = (
    *scenes.WORDS,
    *("hello", "yes", "no", "love", "red", "blue", "green", "sun", "star", "home", "help", "exit", "sale", "open"),
    *("hi", "test", "name", "text", "word", "cold", "hot", "left", "right", "one", "two", "happy", "world", "good"),
    *("jax", "go", "end", "food", "play", "time", "water", "music", "apple", "horse", "baby", "girl", "boy", "day"),
)
MOST = 5  # shapes
MARGIN = 0.03  # of the canvas, between things and to its edge
RADII = {1: (0.2, 0.46), 2: (0.14, 0.3)}  # of the canvas' shorter side, by the number of things
RADII_OF_MORE = (0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Style:
    """What may differ between drawings of one content."""

    shade: Callable[[random.Random, str], RGB]
    fonts: tuple[str, ...]  # files of matplotlib; "" for Pillow's own
    canvas: Callable[[random.Random], tuple[int, int]]
    backgrounds: tuple[RGB, ...]


@dataclasses.dataclass(frozen=True)
class Thing:
    """A filled shape: centre, half width and half height in pixels, angle in degrees."""

    name: str
    color: str
    rgb: RGB
    x: float
    y: float
    wide: float
    high: float
    angle: float

    @property
    def area(self) -> float:
        return self.wide * self.high


@dataclasses.dataclass(frozen=True)
class Writing:
    """A word; x, y: the middle of its ink, in pixels."""

    text: str
    color: str
    rgb: RGB
    x: float
    y: float
    size: float
    font: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is in an image of `size` (width, height) pixels: things, or a word."""

    size: tuple[int, int]
    background: RGB
    things: tuple[Thing, ...] = ()
    writing: Writing | None = None


def _trained_shade(rng: random.Random, color: str) -> RGB:
    return _jittered(rng, rng.choice(SHADES[color][0]))


def _other_shade(rng: random.Random, color: str) -> RGB:
    return _jittered(rng, SHADES[color][1])


def _jittered(rng: random.Random, rgb: RGB) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-JITTER, JITTER))) for value in rgb)
    return red, green, blue


def _trained_canvas(rng: random.Random) -> tuple[int, int]:
    """Sides of 64 to 400 pixels, mostly below 180; 2:1 at most."""
    side = rng.randint(64, 180) if rng.random() < 0.7 else rng.randint(180, 400)
    other = max(64, round(side / rng.uniform(1, 2)))
    return (side, other) if rng.random() < 0.6 else (other, side)


def _other_canvas(rng: random.Random) -> tuple[int, int]:
    """Of usual screens and photographs, larger than any in training, and up to 2.4:1."""
    return rng.choice(((640, 480), (512, 512), (800, 600), (480, 640), (600, 250), (720, 405)))


TRAIN = Style(
    _trained_shade,
    ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSans-Oblique", "STIXGeneralBol", ""),
    _trained_canvas,
    (*((255, 255, 255),) * 6, (245, 245, 240), (0, 0, 0), (20, 20, 40), (225, 235, 250)),
)
OTHER = Style(
    _other_shade,
    ("DejaVuSansMono", "STIXGeneral", "cmss10"),
    _other_canvas,
    ((255, 255, 255), (250, 245, 225), (235, 250, 235), (40, 40, 40)),
)


def plan(rng: random.Random, style: Style, alone: bool = False) -> Drawing:
    """Draws what is in a drawing: a word (a sixth), one shape (a quarter), two (a third), or three to five.

    Args:
      alone: one shape, always.
    """
    size, background = style.canvas(rng), rng.choice(style.backgrounds)
    draw = rng.random()
    if draw < 1 / 6 and not alone:
        return Drawing(size, background, writing=_plan_writing(rng, style, size, background))
    count = 1 if draw < 5 / 12 or alone else 2 if draw < 9 / 12 else rng.randint(3, MOST)
    things: list[Thing] = []
    looks = _looks(rng, count, background)
    short = min(size)
    for tried in range(60 * count):
        if len(things) == count:
            break
        least, most = RADII.get(count, RADII_OF_MORE)
        most = max(least, most * (1 - tried / (100 * count)))
        thing = _placed(rng, style, looks[len(things)], size, rng.uniform(least, most) * short)
        if all(apart(thing, other, MARGIN * short) for other in things):
            things.append(thing)
    return Drawing(size, background, tuple(things))


def _looks(rng: random.Random, count: int, background: RGB) -> list[tuple[str, str]]:
    """(shape, colour) of each thing. Often of one shape, or of one colour; pairs differ in something."""
    colors = [color for color in SHADES if _contrasts(color, background)]
    shape, color, draw = _any_shape(rng), rng.choice(colors), rng.random()
    if count > 2 and draw < 0.35:  # equal ones, and perhaps another
        looks = [(shape, color)] * count
        if rng.random() < 0.6:
            looks[-1] = (_any_shape(rng), rng.choice(colors))
        return looks
    while True:
        looks = [
            (shape if 0.35 < draw < 0.5 else _any_shape(rng), color if draw > 0.85 else rng.choice(colors))
            for _ in range(count)
        ]
        if len(set(looks)) == count:
            return looks


def _any_shape(rng: random.Random) -> str:
    return rng.choices(SHAPES, OFTEN)[0]


def _contrasts(color: str, background: RGB) -> bool:
    return all(sum(abs(a - b) for a, b in zip(rgb, background, strict=True)) > 110 for rgb in SHADES[color][0])


def _placed(rng: random.Random, style: Style, look: tuple[str, str], size: tuple[int, int], radius: float) -> Thing:
    name, color = look
    wide = high = radius
    if name in LONG:
        high = wide / rng.uniform(*LONG[name])
        wide, high = (wide, high) if rng.random() < 0.7 else (high, wide)
    elif name not in ("circle", "square"):
        high *= rng.uniform(0.85, 1.15)
    edge = MARGIN * min(size)
    x, y = (
        rng.uniform(min(r + edge, s / 2), max(s - r - edge, s / 2)) for r, s in zip((wide, high), size, strict=True)
    )
    angle = 0.0 if rng.random() < 0.6 else rng.uniform(-12, 12)
    return Thing(name, color, style.shade(rng, color), x, y, wide, high, angle)


def apart(one: Thing, other: Thing, margin: float) -> bool:
    """Whether there are so many pixels between the boxes of two things."""
    return (
        abs(one.x - other.x) > one.wide + other.wide + margin or abs(one.y - other.y) > one.high + other.high + margin
    )


def _plan_writing(rng: random.Random, style: Style, size: tuple[int, int], background: RGB) -> Writing:
    text = rng.choice(WORDS) if rng.random() < 0.8 else str(rng.randrange(100))
    text = rng.choice((text, text, text.upper(), text.capitalize()))
    dark = sum(background) < 300
    colors = [color for color in SHADES if _contrasts(color, background)]
    color = rng.choice(colors) if dark or rng.random() < 0.5 else "black"
    font = rng.choice(style.fonts)
    left, top, right, bottom = _font(font, 100.0).getbbox(text, anchor="ls")
    fits = min(0.9 * size[0] / (right - left), 0.8 * size[1] / (bottom - top)) * 100
    size_of = min(fits, rng.uniform(0.25, 0.7) * min(size))
    wide, high = ((right - left) * size_of / 200, (bottom - top) * size_of / 200)
    x, y = (rng.uniform(r + 2, max(s - r - 2, r + 2)) for r, s in zip((wide, high), size, strict=True))
    return Writing(text, color, style.shade(rng, color), x, y, size_of, font)


@functools.lru_cache(64)
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    if not name:
        return ImageFont.load_default(size)  # type: ignore[return-value]
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _heart() -> tuple[complex, ...]:
    points = [
        complex(
            16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        )
        for t in (2 * math.pi * k / 24 for k in range(24))
    ]
    return tuple(complex(p.real / 16, (p.imag + 2.5) / 14.5) for p in points)


OUTLINES: dict[str, tuple[complex, ...]] = {  # corners in the square from -1-1j to 1+1j; y points down
    "circle": tuple(cmath.rect(1, 2 * math.pi * k / 40) for k in range(40)),
    "oval": tuple(cmath.rect(1, 2 * math.pi * k / 40) for k in range(40)),
    "square": (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j),
    "rectangle": (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j),
    "triangle": (-1j, 1 + 1j, -1 + 1j),
    "diamond": (-1j, 0.75 + 0j, 1j, -0.75 + 0j),
    "star": scenes.SHAPES["star"],
    "cross": scenes.SHAPES["cross"],
    "heart": _heart(),
}


def render(drawing: Drawing) -> Image.Image:
    """Draws it; RGB."""
    image = Image.new("RGB", drawing.size, drawing.background)
    draw = ImageDraw.Draw(image)
    for thing in drawing.things:
        turn = cmath.exp(1j * math.radians(thing.angle))
        points = [turn * complex(c.real * thing.wide, c.imag * thing.high) for c in OUTLINES[thing.name]]
        draw.polygon([(thing.x + p.real, thing.y + p.imag) for p in points], fill=thing.rgb)
    if writing := drawing.writing:
        font = _font(writing.font, round(writing.size, 1))
        left, top, right, bottom = font.getbbox(writing.text, anchor="ls")
        corner = writing.x - (left + right) / 2, writing.y - (top + bottom) / 2
        draw.text(corner, writing.text, fill=writing.rgb, font=font, anchor="ls")
    return image
