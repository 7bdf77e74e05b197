"""easy-VQA: 5,000 pictures of one coloured shape with 48,248 questions, from the files of the PyPI package easy-vqa."""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path

import easy_vqa
from PIL import Image

from navil_jax.data.sample import CAPTION_PROMPT, Sample, Split, Turn, check_index

_COLOR = "(black|blue|brown|gray|green|red|teal|yellow)"
_SHAPE = "(circle|rectangle|triangle)"
_FORMS = {
    "color": rf"what (color is|is the color of) the ({_SHAPE}|shape)\?",
    "shape": rf"what shape (does the image contain|is in the image|is present)\?|what is the {_COLOR} shape\?",
    "is color": rf"(is|is there|does the image contain) a {_COLOR} shape( present| in the image)?\?",
    "is shape": rf"(is|is there|does the image contain) a {_SHAPE}( present| in the image)?\?",
    "not color": rf"(is no|is there not a|does the image not contain a) {_COLOR} shape( present| in the image)?\?",
    "not shape": rf"(is no|is there not a|does the image not contain a) {_SHAPE}( present| in the image)?\?",
}
KINDS = tuple(_FORMS)
VIEWS = (None, *Image.Transpose)  # a picture as it is, turned or mirrored: colour and shape stay the same


@functools.cache
def question_kind(question: str) -> str:
    """The kind of an easy-VQA question by its form; ValueError for a question of another data set.

    Example:
      "what color is the circle?" -> "color"        "what is the red shape?"  -> "shape"
      "is there a red shape?"     -> "is color"     "is no circle present?"   -> "not shape"   (both yes or no)
    """
    for kind, form in _FORMS.items():
        if re.fullmatch(form, question):
            return kind
    raise ValueError(f"not an easy-VQA question: {question!r}")


@functools.cache
def _conversations(split: Split, turns: int) -> list[tuple[int, tuple[Turn, ...]]]:
    """(image id, turns) of every sample: the image's questions in a shuffled order, cut into pieces of `turns`."""
    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    by_image: dict[int, list[Turn]] = {}
    for question, answer, image in zip(*read(), strict=True):
        by_image.setdefault(image, []).append((question, answer))
    conversations = []
    for image, pairs in by_image.items():
        random.Random(f"{split}/{image}").shuffle(pairs)
        conversations += [(image, tuple(pairs[i : i + turns])) for i in range(0, len(pairs), turns)]
    return conversations


@functools.cache
def _image_paths(split: Split) -> dict[int, str]:
    return easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()


def _picture(split: Split, image: int, view: int) -> Path | Image.Image:
    """A picture's file, or a view of the picture (an index into VIEWS)."""
    method = VIEWS[view]
    return Path(_image_paths(split)[image]) if method is None else _decoded(split, image).transpose(method)


@functools.cache
def _decoded(split: Split, image: int) -> Image.Image:
    """Kept, as each picture comes in seven views: 49 MB for all that are trained on."""
    with Image.open(_image_paths(split)[image], formats=("PNG",)) as picture:
        return picture.convert("RGB")


@dataclasses.dataclass(frozen=True)
class EasyVqa:
    """The package's own splits: 4,000 pictures, 38,575 questions to train on; 1,000 and 9,673 held out.

    A training sample has up to `turns` of its picture's questions in an order that depends on the picture alone, and
    an epoch asks every question once, each sample with another of the eight views of its picture. A test sample has
    one question, so that no earlier answer helps, and the picture as it is.
    """

    split: Split
    turns: int = 2  # of a training sample; 1: every question is a sample of its own

    def conversations(self) -> list[tuple[int, tuple[Turn, ...]]]:
        return _conversations(self.split, self.turns if self.split == "train" else 1)

    def __len__(self) -> int:
        return len(self.conversations())

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        image, turns = self.conversations()[index]
        kinds = {question_kind(question) for question, _ in turns}
        return Sample(
            key=f"easy_vqa/{self.split}/{index}",
            images=(_picture(self.split, image, index % len(VIEWS) if self.split == "train" else 0),),
            turns=turns,
            kind=kinds.pop() if len(kinds) == 1 else "",
        )

    def texts(self) -> Iterator[str]:
        for _, turns in self.conversations():
            for turn in turns:
                yield from turn


@functools.cache
def captions(split: Split) -> list[tuple[int, str]]:
    """(image id, caption) of the images whose questions tell both the colour and the shape."""
    found: dict[int, dict[str, str]] = {}
    for image, turns in _conversations(split, 1):
        for question, answer in turns:
            found.setdefault(image, {})[question_kind(question)] = answer
    both = {image: kinds for image, kinds in found.items() if "color" in kinds and "shape" in kinds}
    return [(image, f"A {kinds['color']} {kinds['shape']}.") for image, kinds in both.items()]


@dataclasses.dataclass(frozen=True)
class EasyVqaCaptions:
    """Pictures of easy-VQA with captions made of their answers ("A teal circle."), in the package's own splits.

    The training split has every picture in eight views, each a sample of its own.
    """

    split: Split

    def __len__(self) -> int:
        return len(captions(self.split)) * (len(VIEWS) if self.split == "train" else 1)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        view, place = divmod(index, len(captions(self.split)))
        image, caption = captions(self.split)[place]
        key = f"easy_vqa_captions/{self.split}/{index}"
        return Sample(
            key=key, images=(_picture(self.split, image, view),), turns=((CAPTION_PROMPT, caption),), kind="caption"
        )

    def texts(self) -> Iterator[str]:
        for _, caption in captions(self.split):
            yield from (CAPTION_PROMPT, caption)
