"""Pictures of text with the text as the answer: pieces of a book (`data.book`) on small white pages.

Letters stand in a grid, `CELL` pixels each, so that a merged unit of patches shows two letters of one line. Reading and
knowing the language both help: a model that cannot see the letters still guesses the likelier words.
"""

import dataclasses
import functools
import hashlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from navil_jax.data.sample import SPLITS, Sample, Split, check_index
from navil_jax.data.toy.book import HELD_OUT_EVERY, pieces

PROMPT = "What is written?"
CELL = (16, 32)  # pixels of a letter: width, height
COLUMNS, LINES = 12, 2
TEXT_BYTES = 1_000_000
FOR_PAGES = range(1, 11)  # of every HELD_OUT_EVERY pieces, those whose pages are trained on; piece 0 is held out
HELD_OUT_PAGES = 400
TOKENIZER_PAGES = 4000


def is_for_pages(number: int) -> bool:
    """Whether a piece of the book is shown as pages, so that no language model should have read it."""
    return number % HELD_OUT_EVERY in FOR_PAGES


@functools.cache
def page_texts(split: Split) -> tuple[str, ...]:
    """Every page once, and none in both splits; lines are separated by a line break. Example: "In the\\nbeginning" """
    found: dict[str, None] = {}
    for number, piece in enumerate(pieces(TEXT_BYTES)):
        if is_for_pages(number) if split == "train" else number % HELD_OUT_EVERY == 0:
            words = " ".join(piece.split())
            lines = [line for line in textwrap.wrap(words, COLUMNS, break_long_words=False) if len(line) <= COLUMNS]
            starts = range(0, len(lines) - LINES + 1, LINES)
            found |= dict.fromkeys("\n".join(lines[start : start + LINES]) for start in starts)
    if split == "test":
        return tuple(found)[:: len(found) // HELD_OUT_PAGES][:HELD_OUT_PAGES]
    held_out = set(page_texts("test"))
    return tuple(text for text in found if text not in held_out)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono-Bold.ttf")
    return ImageFont.truetype(path, 26, layout_engine=ImageFont.Layout.BASIC)


def render(text: str) -> Image.Image:
    """Draws a page, black on white; RGB, as many cells as the text needs, an even number of columns."""
    lines = text.split("\n")
    columns = -(-max(map(len, lines)) // 2) * 2
    image = Image.new("RGB", (columns * CELL[0], len(lines) * CELL[1]), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        for column, letter in enumerate(line):
            draw.text((column * CELL[0], row * CELL[1] + 25), letter, fill="black", font=_font(), anchor="ls")
    return image


@dataclasses.dataclass(frozen=True)
class Pages:
    """One page a sample; those of the test split are of pieces that training never shows."""

    split: Split

    def __len__(self) -> int:
        return len(page_texts(self.split))

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        text = page_texts(self.split)[index]
        turn = (PROMPT, text.replace("\n", " "))
        return Sample(f"pages/{self.split}/{index}", (render(text),), (turn,), kind="page")

    def fingerprint(self) -> str:
        """The start of a checksum of the texts of all pages, of both splits."""
        texts = [text for split in SPLITS for text in page_texts(split)]
        return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16]

    def texts(self) -> Iterator[str]:
        yield PROMPT
        for text in page_texts(self.split)[:TOKENIZER_PAGES]:
            yield text.replace("\n", " ")
