"""Files to clean: samples that are good, and one or more with each fault."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from made_data import write_lines
from PIL import Image

from benchmarks.near_duplicates import caption, clouds, crop, jpeg, other_words, resized
from navil_jax.data.images import load_image
from navil_jax.data.sources import open_source

PACKAGES = all(map(importlib.util.find_spec, ("datasketch", "imagehash")))  # whether they are there
needs_packages = pytest.mark.skipif(
    not PACKAGES,
    reason="datasketch or imagehash is absent: pip install datasketch imagehash",
)
GOOD = 24  # samples without a fault, the first ones
# Fault -> its record, but for the image; {n} is a number of a good sample.
TEXTS = {
    "few_words": "red",
    "many_words": " ".join(f"word{number}" for number in range(300)),
    "one_word": "very " * 20,
    "repeats": "the cat sat on the mat and " * 6,
    "run": "A table of numbers ---------------------------------------------------------------------- here.",
    "markup": "<b>A cat</b> <a href='x'>there</a> https://example.com/a/b/c.jpg",
    "boilerplate": "Royalty free stock photo, all rights reserved, click here",
    "scripts": "Кошка сидит на столе перед окном",
}
SETTINGS = ["--max-words=200", "--scripts=latin,han", "--max-text-area=0.2"]


def write_faults(folder: Path) -> tuple[str, list[str]]:
    """A file of JSON lines with its images beside it, and the rule that leaves each sample out, "" for none."""
    draw = random.Random(1)
    images, captions = [clouds(seed) for seed in range(GOOD)], [caption(draw) for _ in range(GOOD)]
    records = []

    def add(rule: str, image: Image.Image | None, text: str) -> None:
        record = {"caption": text}
        if image is not None:
            name = f"{len(records)}.png"
            image.save(folder / name)
            record["image"] = name
        records.append((rule, record))

    for image, text in zip(images, captions, strict=True):
        add("", image, text)
    for number, (rule, text) in enumerate(TEXTS.items()):
        add(rule, clouds(100 + number), text)
    add("small", resized(clouds(200), 0.01).resize((20, 30)), "A small image of a cloud")
    add("aspect", clouds(201).resize((800, 40)), "A wide image of a cloud")
    add("blank", Image.new("RGB", (64, 64), "red"), "An image without anything in it")
    add("text_image", text_image(), "A page with many letters on it")
    records.append(("unreadable", {"caption": "A cat is not here", "image": "none.png"}))
    records.append(("exact", records[3][1]))
    add("near", resized(images[4], 0.5), captions[4])
    add("near", jpeg(images[5], 40), captions[5])
    add("near", crop(images[6], 0.05, 0, 0, 0), captions[6])
    add("near", images[7], other_words(captions[7]))
    add("", images[8], "Quite another text, of which no word stands in the first one")
    add("", Image.merge("RGB", [vivid(images[9]).getchannel(one) for one in "GBR"]), captions[9])
    path = write_lines(folder / "train.jsonl", [record for _, record in records])
    return path, [rule for rule, _ in records]


def vivid(image: Image.Image) -> Image.Image:
    """The image with a red half."""
    pixels = np.array(image)
    pixels[:, : image.width // 2, 0] = 255
    return Image.fromarray(pixels)


def text_image() -> Image.Image:
    line = load_image(open_source("pages", "train")[0].images[0])
    page = Image.new("RGB", (2 * line.width, 6 * line.height), "white")
    for row in range(6):
        for column in range(2):
            page.paste(line, (column * line.width, row * line.height))
    return page
