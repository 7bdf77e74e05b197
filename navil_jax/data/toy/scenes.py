"""Generated pictures of shapes, words and numbers, with captions, questions and true answers.

A scene is a pure function of (seed, split, index): `plan` says what is in it, `render` draws it, `caption` and
`questions` speak about it. Four layouts: a pair of shapes in a spatial relation, a group of 1 to 5 equal shapes (up to
two of another kind among them), a word, a number. 62 to 160 pixels a side, from tall to wide.

Made so that a model of 2M parameters learns it in minutes: sides are just below multiples of 32, a merged unit of
patches, so that little is padding; text is bright on dark and starts on a grid of `GRID` pixels, a patch.

Held out: what only pictures of the test split have.
  - Sides: multiples of 4 in training, other even lengths in the test split. So no picture is ever in both.
  - `HELD_OUT` pairs of shape and colour: training neither shows them nor asks for them.
  - One colour of each word and number (`held_out_color`).
Words, numbers, colours, shapes and forms of question are the same in both splits.
"""

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from navil_jax.data.sample import CAPTION_PROMPT, Sample, Split, Turn, check_index

RGB = tuple[int, int, int]
Layout = Literal["pair", "group", "word", "number"]

COLORS: dict[str, RGB] = {
    "red": (215, 35, 35),
    "green": (35, 155, 55),
    "blue": (35, 80, 225),
    "yellow": (235, 205, 20),
    "orange": (245, 130, 15),
    "purple": (135, 45, 185),
    "pink": (250, 135, 195),
    "teal": (20, 175, 180),
}
WORDS = (
    *("apple", "bird", "boat", "book", "bread", "cake", "car", "cat", "chair", "cloud"),
    *("cup", "dog", "door", "duck", "egg", "fish", "fox", "game", "hand", "house"),
    *("jump", "key", "king", "lamp", "leaf", "lion", "milk", "moon", "nest", "open"),
    *("queen", "rain", "road", "ship", "snow", "stop", "tree", "van", "wind", "zoo"),
)
NUMBERS = tuple(str(n) for n in range(100))
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # steps (x, y) from the other shape
COUNTS = ("one", "two", "three", "four", "five")
LAYOUTS: dict[str, tuple[Layout, ...]] = {  # where a question of this kind can be asked
    "caption": ("pair", "group", "word", "number"),
    "color": ("pair", "group", "word", "number"),
    "shape": ("pair", "group"),
    "count": ("group",),
    "relation": ("pair",),
    "presence": ("pair", "group"),
    "word": ("word",),
    "number": ("number",),
}
KINDS = tuple(LAYOUTS)

SIDES: dict[Split, tuple[int, ...]] = {
    "train": (64, 88, 92, 96, 120, 124, 128, 152, 156, 160),
    "test": (62, 90, 94, 122, 126, 154, 158),
}
TEXT_HEIGHT = 16  # pixels of the font's letter d
MAX_AREA = 12_800  # pixels
GRID = 16
CELL = 30  # least side of the cell that a shape of a group stands in
MIN_RADIUS = 12
MOST_SHAPES = 6  # in one picture
MARGIN = 3  # least pixels between things, and from a thing to the edge
TOKENIZER_SCENES = 4000  # show every word and number dozens of times


def _star(points: int, inner: float) -> tuple[complex, ...]:
    """Corners of a star that points up, as x + iy with y down; `inner` is how far its dents are from the centre."""
    corners = range(2 * points)
    return tuple((inner if k % 2 else 1.0) * -1j * math.e ** (1j * math.pi * k / points) for k in corners)


_ARM = 0.33
SHAPES: dict[str, tuple[complex, ...]] = {  # corners in the unit circle around the centre; the circle has none
    "circle": (),
    "square": tuple(complex(x, y) for x, y in ((-0.71, -0.71), (0.71, -0.71), (0.71, 0.71), (-0.71, 0.71))),
    "triangle": _star(3, 0.5),  # its dents lie on the straight sides
    "star": _star(5, 0.4),
    "cross": tuple(
        turn * c for turn in (1, 1j, -1, -1j) for c in (0.94 - _ARM * 1j, 0.94 + _ARM * 1j, _ARM + _ARM * 1j)
    ),
    "diamond": (-1j, 0.55 + 0j, 1j, -0.55 + 0j),
}
HELD_OUT = frozenset((list(SHAPES)[i % len(SHAPES)], color) for i, color in enumerate(COLORS))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A filled shape; x, y and radius in pixels, angle in degrees."""

    name: str
    color: str
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Text:
    """A word or a number; x: left of its ink, y: top of the font's letter d, in pixels."""

    text: str
    color: str
    rgb: RGB
    x: int
    y: int
    font: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is in a picture of `size` (width, height) pixels."""

    layout: Layout
    size: tuple[int, int]
    background: RGB
    shapes: tuple[Shape, ...] = ()  # pair: in `relation` the first to the second; group: the group, then the others
    relation: str = ""
    text: Text | None = None


def held_out_color(text: str) -> str:
    """The colour in which training never shows this word or number."""
    index = WORDS.index(text) if text in WORDS else int(text)
    return list(COLORS)[index % len(COLORS)]


def plan(rng: random.Random, split: Split, layout: Layout) -> Scene:
    """Draws a scene of a layout; colours, shapes, relations, counts, words and numbers are uniform."""
    if layout == "pair":
        return _plan_pair(rng, split)
    if layout == "group":
        return _plan_group(rng, split)
    return _plan_text(rng, split, layout)


def _plan_pair(rng: random.Random, split: Split) -> Scene:
    size = _size(rng, split)
    relation = rng.choice(list(RELATIONS))
    axis = 0 if RELATIONS[relation][0] else 1
    along, across = size[axis], size[1 - axis]
    limit = min(26.0, along / 4 - MARGIN, across / 2 - MARGIN)
    radii = [rng.uniform(MIN_RADIUS, limit) for _ in range(2)]
    free = along - 2 * sum(radii) - 3 * MARGIN
    before, between = (free * t for t in sorted((rng.random(), rng.random())))
    first = MARGIN + before + radii[0]
    second = first + radii[0] + MARGIN + (between - before) + radii[1]
    lean = (second - first) / 2  # how far the other axis may differ, so that the relation is clear
    edge = MARGIN + max(radii)
    aside = rng.uniform(edge, across - edge)
    other = rng.uniform(max(edge, aside - lean), min(across - edge, aside + lean))
    places = [(first, aside), (second, other)]
    if axis == 1:
        places = [(x, y) for y, x in places]
    if sum(RELATIONS[relation]) > 0:
        places.reverse()
        radii.reverse()
    looks = _two_looks(rng, split)
    shapes = tuple(_shape(rng, *look, *place, r) for look, place, r in zip(looks, places, radii, strict=True))
    return Scene("pair", size, _background(rng, dark=rng.random() < 0.5), shapes, relation)


def _plan_group(rng: random.Random, split: Split) -> Scene:
    count = rng.randint(1, len(COUNTS))
    others = rng.randint(0, min(2, MOST_SHAPES - count))
    size = _size(rng, split)
    while (size[0] // CELL) * (size[1] // CELL) < MOST_SHAPES:
        size = _size(rng, split)
    columns, rows = size[0] // CELL, size[1] // CELL
    width, height = size[0] / columns, size[1] / rows
    looks = _two_looks(rng, split)
    shapes = []
    for i, cell in enumerate(rng.sample(range(columns * rows), count + others)):
        room = min(width, height) / 2 - MARGIN / 2
        radius = rng.uniform(MIN_RADIUS, room)
        x = (cell % columns + 0.5) * width + rng.uniform(-1, 1) * (width / 2 - MARGIN / 2 - radius)
        y = (cell // columns + 0.5) * height + rng.uniform(-1, 1) * (height / 2 - MARGIN / 2 - radius)
        shapes.append(_shape(rng, *looks[i >= count], x, y, radius))
    return Scene("group", size, _background(rng, dark=rng.random() < 0.5), tuple(shapes))


def _plan_text(rng: random.Random, split: Split, layout: Layout) -> Scene:
    text = rng.choice(WORDS if layout == "word" else NUMBERS)
    font = rng.choice(FONTS)
    left, _, right, bottom = load_font(font).getbbox(text, anchor="ls")
    size = _size(rng, split)
    while GRID + right - left + MARGIN > size[0]:
        size = _size(rng, split)
    x = rng.randrange(GRID, size[0] - MARGIN - int(right - left) + 1, GRID)
    y = rng.randrange(GRID, size[1] - MARGIN - int(TEXT_HEIGHT + bottom) + 1, GRID)
    color = rng.choice([c for c in COLORS if split == "test" or c != held_out_color(text)])
    drawn = Text(text, color, _jitter(rng, COLORS[color]), x, y, font)
    return Scene(layout, size, _background(rng, dark=True), text=drawn)


def _size(rng: random.Random, split: Split) -> tuple[int, int]:
    one = rng.choice(SIDES[split])
    other = rng.choice([side for side in SIDES[split] if side * one <= MAX_AREA])
    return (one, other) if rng.random() < 0.5 else (other, one)


def _two_looks(rng: random.Random, split: Split) -> list[tuple[str, str]]:
    """Two (shape, colour) with different shapes and different colours."""
    looks: list[tuple[str, str]] = []
    while len(looks) < 2:
        color = rng.choice(list(COLORS))
        shape = rng.choice(list(SHAPES))
        new = all(shape != s and color != c for s, c in looks)
        if new and _allowed(split, shape, color):
            looks.append((shape, color))
    return looks


def _allowed(split: Split, shape: str, color: str) -> bool:
    return split == "test" or (shape, color) not in HELD_OUT


def _shape(rng: random.Random, name: str, color: str, x: float, y: float, radius: float) -> Shape:
    return Shape(name, color, _jitter(rng, COLORS[color]), x, y, radius, angle=rng.uniform(-15, 15))


def _jitter(rng: random.Random, rgb: RGB) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in rgb)
    return red, green, blue


def _background(rng: random.Random, dark: bool) -> RGB:
    low, high = (0, 35) if dark else (228, 255)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


@functools.cache
def load_font(name: str) -> ImageFont.FreeTypeFont:
    """A font of matplotlib in the size where the letter d is `TEXT_HEIGHT` pixels high."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    trial = ImageFont.truetype(path, 100.0, layout_engine=ImageFont.Layout.BASIC)
    return trial.font_variant(size=100.0 * TEXT_HEIGHT / -trial.getbbox("d", anchor="ls")[1])


def render(scene: Scene) -> Image.Image:
    """Draws a scene; RGB."""
    image = Image.new("RGB", scene.size, scene.background)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        if corners := SHAPES[shape.name]:
            turn = shape.radius * math.e ** (1j * math.radians(shape.angle))
            points = [turn * corner for corner in corners]
            draw.polygon([(shape.x + p.real, shape.y + p.imag) for p in points], fill=shape.rgb)
        else:
            r = shape.radius
            draw.ellipse((shape.x - r, shape.y - r, shape.x + r, shape.y + r), fill=shape.rgb)
    if text := scene.text:
        font = load_font(text.font)
        left = font.getbbox(text.text, anchor="ls")[0]
        draw.text((text.x - left, text.y + TEXT_HEIGHT), text.text, fill=text.rgb, font=font, anchor="ls")
    return image


def _a(color: str, shape: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def _many(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def caption(scene: Scene) -> str:
    """The one true sentence about a scene: the left or upper shape first, the larger group first.

    Example: "A red circle left of a blue square."  "Three red circles and a star."  'The word "cat" in red.'
    """
    if scene.text:
        return f'The {scene.layout} "{scene.text.text}" in {scene.text.color}.'
    if scene.layout == "pair":
        step = RELATIONS[scene.relation]
        first, second = scene.shapes if sum(step) < 0 else scene.shapes[::-1]
        between = "left of" if step[0] else "above"
        sentence = f"{_a(first.color, first.name)} {between} {_a(second.color, second.name)}."
    else:
        groups = sorted((-n, *look) for look, n in Counter((s.color, s.name) for s in scene.shapes).items())
        parts = [_a(c, s) if n == -1 else f"{COUNTS[-n - 1]} {c} {_many(s)}" for n, c, s in groups]
        sentence = " and ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def questions(rng: random.Random, scene: Scene, split: Split) -> dict[str, Turn]:
    """One question with its answer for every kind (but caption) that the scene's layout allows."""
    if text := scene.text:
        return {
            scene.layout: (f"What {scene.layout} is written?", text.text),
            "color": (f"What color is the {scene.layout}?", text.color),
        }
    counts = Counter(shape.name for shape in scene.shapes)
    shape = rng.choice([next(s for s in scene.shapes if s.name == name) for name in counts])
    is_named = f"is the {shape.name}" if counts[shape.name] == 1 else f"are the {_many(shape.name)}"
    turns = {
        "color": (f"What color {is_named}?", shape.color),
        "shape": (f"Which shape is {shape.color}?", shape.name),
        "presence": _presence(rng, scene, split),
    }
    first, second = scene.shapes[0], scene.shapes[-1]
    if scene.layout == "group":
        return turns | {"count": (f"How many {_many(first.name)} are there?", str(counts[first.name]))}
    question = f"Where is the {first.color} {first.name} relative to the {second.color} {second.name}?"
    return turns | {"relation": (question, scene.relation)}


def _presence(rng: random.Random, scene: Scene, split: Split) -> Turn:
    """Half of the time a shape that is there, else one that differs from a present one in its colour or its name."""
    present = sorted({(s.name, s.color) for s in scene.shapes})
    name, color = rng.choice(present)
    if rng.random() < 0.5:
        return f"Is there {_a(color, name)}?", "yes"
    same = [(name, c) for c in COLORS] if rng.random() < 0.5 else [(n, color) for n in SHAPES]
    name, color = rng.choice([look for look in same if look not in present and _allowed(split, *look)])
    return f"Is there {_a(color, name)}?", "no"


@dataclasses.dataclass(frozen=True)
class Scenes:
    """`length` scenes of a split.

    A training sample has the scene's caption (if `caption`) and up to `questions` questions of different kinds, in
    random order. A test sample has one turn; its kind is that of the index, so that all kinds are equally frequent.
    """

    split: Split
    length: int | None = None  # 50,000 to train, 1,400 to test
    caption: bool = True
    questions: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.caption and not self.questions:
            raise ValueError("neither captions nor questions")

    def __len__(self) -> int:
        if self.length is None:
            return 50_000 if self.split == "train" else 1400
        return self.length

    def scene(self, index: int) -> tuple[Scene, dict[str, Turn]]:
        """The scene of an index with the sample's turns by kind."""
        check_index(index, len(self))
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        if self.split == "train":
            scene = plan(rng, self.split, rng.choice(LAYOUTS["caption"]))
            asked = list(questions(rng, scene, self.split).items())
            chosen = rng.sample(asked, min(self.questions, len(asked)))
            if self.caption:
                chosen.insert(rng.randint(0, len(chosen)), ("caption", (CAPTION_PROMPT, caption(scene))))
            return scene, dict(chosen)
        kinds = [kind for kind in KINDS if (self.caption if kind == "caption" else self.questions)]
        kind = kinds[index % len(kinds)]
        scene = plan(rng, self.split, rng.choice(LAYOUTS[kind]))
        if kind == "caption":
            return scene, {kind: (CAPTION_PROMPT, caption(scene))}
        return scene, {kind: questions(rng, scene, self.split)[kind]}

    def __getitem__(self, index: int) -> Sample:
        scene, turns = self.scene(index)
        key = f"scenes/{self.split}/{index}"
        return Sample(key, (render(scene),), tuple(turns.values()), next(iter(turns)) if len(turns) == 1 else "")

    def texts(self) -> Iterator[str]:
        for index in range(min(len(self), TOKENIZER_SCENES)):
            for turn in self.scene(index)[1].values():
                yield from turn


def captions(split: Split) -> Scenes:
    """Scenes whose one turn is a caption; 400 of them are held out."""
    return Scenes(split, length=None if split == "train" else 400, questions=0)
