"""What `data clean` finds of known copies, and how fast: `python -m benchmarks.near_duplicates [--originals 400]`.

Makes images (clouds of noise with the spectrum of photographs, drawings, scenes, pages of text) with captions, copies
of them that are resized, recompressed, cropped by 5% or differently worded, and samples that only look like copies: the
same image with another caption, the same caption with another image, the image in other colours. Prints recall by kind
of copy, precision by kind of image, how well the text area tells pages from other images, and the time of each step.
"""

import dataclasses
import functools
import io
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps

from navil_jax.config.ranges import Count, read_as
from navil_jax.console import table
from navil_jax.data.cleaning import near
from navil_jax.data.cleaning.image import text_area
from navil_jax.data.cleaning.measure import NOTE, Measure
from navil_jax.data.cleaning.near import Columns
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.images import load_image
from navil_jax.data.sample import CAPTION_PROMPT, Sample
from navil_jax.data.sources import open_source
from navil_jax.errors import Parser, report_user_errors

WORDS = """red blue green white black yellow grey brown orange pink
cat dog horse boat car bicycle woman man child bird tree house table chair bench train bus kite umbrella
street beach park river kitchen field mountain station market garden bridge room harbour forest lake
standing sitting running waiting resting walking sleeping turning"""
COLOURS, THINGS, PLACES, ACTIONS = (line.split() for line in WORDS.splitlines())
SYNONYMS = {
    "small": "little",
    "large": "big",
    "street": "road",
    "woman": "lady",
    "child": "kid",
    "car": "automobile",
    "bicycle": "bike",
    "near": "beside",
    "boat": "ship",
    "beach": "shore",
    "house": "home",
    "garden": "yard",
    "resting": "relaxing",
    "forest": "wood",
    "photo": "picture",
    "morning": "dawn",
}
KINDS = ("clouds", "drawings", "scenes", "pages")


def clouds(seed: int) -> Image.Image:
    """Noise with the spectrum of photographs, 1/f, in colours that go together."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(200, 500, 2).tolist()
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    layers = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency**1.1).real for _ in range(4)]
    pixels = np.stack([layers[3] + rng.uniform(0.5, 1.5) * layer for layer in layers[:3]], axis=-1)
    return Image.fromarray(((pixels - pixels.min()) / np.ptp(pixels) * 255).astype(np.uint8))


def originals(kind: str, count: int) -> list[Image.Image]:
    """So many images of one kind, no two of them equal."""
    if kind == "clouds":
        return [clouds(seed) for seed in range(count)]
    source = open_source(kind, "train")
    found: dict[bytes, Image.Image] = {}
    for index in np.linspace(0, len(source) - 1, 4 * count).astype(int).tolist():
        image = load_image(source[index].images[0], str(index))
        found.setdefault(image.tobytes(), image)
        if len(found) == count:
            break
    return list(found.values())


def caption(draw: random.Random) -> str:
    """Example: A large red boat is resting near an old bench at the lake in the morning."""
    first, second = draw.sample(THINGS, 2)
    size, age = draw.choice(("small", "large", "tall")), draw.choice(("old", "new", "wooden", "painted"))
    when = draw.choice(("in the morning", "at night", "in the rain", "on a sunny day", "in winter"))
    words = f"A {size} {draw.choice(COLOURS)} {first} is {draw.choice(ACTIONS)} near a {age} {draw.choice(COLOURS)}"
    return f"{words} {second} at the {draw.choice(PLACES)} {when}."


def other_words(text: str) -> str:
    """Synonyms where there are any, and the end put in front. Example: At the shore in the rain a little red cat ..."""
    words = [SYNONYMS.get(word, word) for word in text.rstrip(".").split()]
    cut = words.index("at") if "at" in words else len(words)
    moved = [*words[cut:], "there", *words[:cut]]
    return " ".join(word.lower() if number else word.capitalize() for number, word in enumerate(moved)) + "."


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def crop(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Without these shares of its sides."""
    width, height = image.size
    return image.crop(
        (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def resized(image: Image.Image, share: float) -> Image.Image:
    return image.resize([max(24, round(side * share)) for side in image.size], Image.Resampling.BICUBIC)


def same(image: Image.Image) -> Image.Image:
    return image


CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], Callable[[str], str]]] = {
    "resized to a half": (lambda image: resized(image, 0.5), str),
    "resized to 150%": (lambda image: resized(image, 1.5), str),
    "JPEG of quality 30": (lambda image: jpeg(image, 30), str),
    "cropped by 5%, centre": (lambda image: crop(image, 0.025, 0.025, 0.025, 0.025), str),
    "cropped by 5%, left": (lambda image: crop(image, 0.05, 0, 0, 0), str),
    "cropped by 5%, bottom": (lambda image: crop(image, 0, 0, 0, 0.05), str),
    "cropped by 5%, left and top": (lambda image: crop(image, 0.05, 0.05, 0, 0), str),
    "other words": (same, other_words),
    "resized, JPEG, other words": (lambda image: jpeg(resized(image, 0.6), 50), other_words),
    "cropped by 5%, other words": (lambda image: crop(image, 0, 0.05, 0, 0), other_words),
}
DECOYS = ("same image, another caption", "same caption, another image", "in other colours, same caption")


@dataclasses.dataclass(frozen=True)
class Made:
    """Samples of one kind, with what each is: ("original", number) or (change or decoy, number of its original)."""

    samples: tuple[Sample, ...]
    truth: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def texts(self) -> list[str]:
        return []


def make(kind: str, count: int) -> Made:
    """Originals, then for each of them a copy of every kind, and decoys."""
    draw, images = random.Random(0), originals(kind, count)
    captions = [caption(draw) for _ in images]
    rows = [("original", number, image, captions[number]) for number, image in enumerate(images)]
    for number, image in enumerate(images):
        for name, (change, reword) in CHANGES.items():
            rows.append((name, number, change(image), reword(captions[number])))
        rows.append((DECOYS[0], number, image, caption(draw)))
        rows.append((DECOYS[1], number, crop(ImageOps.mirror(images[number - 1]), 0.1, 0.2, 0, 0), captions[number]))
        turned = Image.merge("RGB", [image.getchannel(channel) for channel in "GBR"])
        if turned != image:  # one without colours stays what it is
            rows.append((DECOYS[2], number, turned, captions[number]))
    samples = [
        Sample(f"{kind}/{name}/{number}", (image,), ((CAPTION_PROMPT, text),)) for name, number, image, text in rows
    ]
    return Made(tuple(samples), tuple((name, number) for name, number, _, _ in rows))


def columns_of(notes: np.ndarray) -> Columns:
    return {name: notes[name] for name in NOTE.names or ()} | {"planes": np.ascontiguousarray(notes["caption"].T)}


def left_out(columns: Columns, settings: Settings) -> np.ndarray:
    """[m, 2], a sample and the one that is kept for it."""
    rows = np.arange(len(columns["words"]))
    found = [
        near.find_near(columns, rows, settings, kind, number).pairs
        for kind, number, _, _ in near.tasks(len(rows), (settings.pair,))
    ]
    return near.resolve(
        np.unique(near.packed_pairs(np.concatenate(found))),
        functools.partial(near.is_near, columns, settings, settings.pair),
    )


def quality(count: int) -> None:
    """Prints recall and precision of all kinds."""
    made = {kind: make(kind, count) for kind in KINDS}
    measured = {kind: columns_of(Measure(made[kind], kind)(range(len(made[kind]))).table) for kind in KINDS}
    for pair in ("both", "image"):
        rows = {name: [name] for name in (*CHANGES, *DECOYS, "precision")}
        for kind in KINDS:
            found = recall(made[kind].truth, left_out(measured[kind], Settings(pair=pair)), pair)
            for name, row in rows.items():
                row.append(found.get(name, "-"))
        print(f"\nleft out with --pair {pair}, of {count} originals of each kind")
        print(table(("copies and decoys", *KINDS), list(rows.values())))


def recall(truth: Sequence[tuple[str, int]], pairs: np.ndarray, pair: str) -> dict[str, str]:
    """Share of each kind of copy and decoy that is left out, and the precision of all that is."""
    wanted = {*CHANGES, DECOYS[0]} if pair == "image" else {*CHANGES}
    right, total = Counter[str](), Counter(name for name, _ in truth)
    for sample, kept in pairs.tolist():
        if truth[sample][1] == truth[kept][1]:
            right[truth[sample][0]] += 1
    found = {name: f"{right[name] / total[name]:.1%}" for name in total if name != "original"}
    copies = sum(right[name] for name in wanted)
    return found | {"precision": f"{copies / max(1, len(pairs)):.1%}"}


def text_images(count: int) -> None:
    """Prints how the text area divides pages from other images."""
    areas = {
        kind: np.array([text_area(resized(image, 2).convert("L")) for image in originals(kind, count)])
        for kind in KINDS
    }
    rows = []
    for limit in (0.05, 0.1, 0.2, 0.3, 0.4):
        found, others = (
            np.count_nonzero(areas["pages"] > limit),
            [np.count_nonzero(areas[k] > limit) for k in KINDS[:3]],
        )
        precision = found / max(1, found + sum(others))
        rows.append((f"{limit}", f"{found / len(areas['pages']):.1%}", f"{precision:.1%}"))
    print("\npages of text told from clouds, drawings and scenes by the share of text")
    print(table(("above", "recall", "precision"), rows))


def speed(count: int) -> None:
    """Prints the time of measuring, and of comparing records that are made up."""
    image = jpeg(clouds(0).resize((1280, 960)), 90)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    draw = random.Random(0)
    samples = [Sample(str(n), (buffer.getvalue(),), ((CAPTION_PROMPT, caption(draw)),)) for n in range(50)]
    started = time.process_time()
    Measure(Made(tuple(samples), ()), "photos")(range(len(samples)))
    rows = [
        ("measuring a JPEG of 1280 x 960 and a caption", f"{50 / (time.process_time() - started):.0f} samples/s/core")
    ]
    notes = np.zeros(count, NOTE)
    rng = np.random.default_rng(0)
    notes["images"], notes["words"] = 1, 10
    notes["low"] = rng.integers(0, 2**63, count, dtype=np.uint64)
    for name in ("hashes", "caption"):
        notes[name] = rng.integers(0, 256, notes[name].shape, np.uint8)
    columns, order = columns_of(notes), np.arange(count)
    started = time.process_time()
    for number in range(4):
        near.find_near(columns, order, Settings(), "both", number)
    seconds = (time.process_time() - started) / 4 * near.TABLES
    rows.append((f"comparing {count:,} of them in {near.TABLES} tables", f"{count / seconds:,.0f} samples/s/core"))
    rows.append(("on disk", f"{NOTE.itemsize} bytes a sample in parts, {NOTE.itemsize + 64} in columns"))
    print()
    print(table(("what", "how much"), rows))


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.near_duplicates", description=__doc__)
    parser.add_argument("--originals", type=read_as(Count), default=400, help="of each kind (default: 400)")
    parser.add_argument("--records", type=read_as(Count), default=1_000_000, help="to compare (default: a million)")
    options = parser.parse_args(argv)
    quality(options.originals)
    text_images(options.originals)
    speed(options.records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
