"""Settings of `data clean`: what each step leaves out, with its defaults; every field is an option of the command."""

import argparse
import dataclasses
import typing
from typing import Any, Literal

from navil_jax.config.ranges import Amount, Count, Factor, NotNegative, PositiveShare, Share, read_as

STEPS = {  # in the order in which they are taken: a sample is counted in the first one that leaves it out
    "unreadable": "samples that cannot be read, or whose images cannot be decoded",
    "captions": "length, repetition, markup, boilerplate, scripts of the text",
    "images": "sides, aspect ratio, blank, mostly text",
    "benchmarks": "images and questions of the benchmarks that --against names",
    "exact": "samples with the same images and text, to the byte",
    "near": "samples that are nearly the same",
    "sampling": "what --keep leaves of a source",
}
Pair = Literal["both", "image", "caption", "either"]


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Thresholds. Words are runs of letters and digits; in scripts without blanks between words, characters."""

    min_words: Amount = _field(3, "fewest words of a sample's text")
    max_words: Count = _field(20_000, "most words")
    max_word_share: Share = _field(0.4, "of all words that are the same one, from 10 words on")
    max_repeated_share: Share = _field(0.5, "of the word triples that stood before in the same text, from 10 words on")
    max_run: Count = _field(60, "characters in a row that are the same")
    max_markup_share: Share = _field(0.3, "of the characters that are tags, entities, addresses or file names")
    max_boilerplate_share: Share = _field(0.3, "of the characters that are phrases of web pages and of stock photos")
    scripts: str = _field("", "scripts of the text, such as latin,han; empty: any")
    min_script_share: Share = _field(0.7, "of the letters that must be of --scripts")
    min_side: Amount = _field(32, "pixels of the shorter side of every image")
    max_side: Count = _field(20_000, "pixels of the longer side")
    max_aspect: Factor = _field(10.0, "longer side against shorter side")
    min_deviation: NotNegative = _field(2.0, "deviation of red, green or blue of an image, 0 to 255; below: blank")
    max_text_area: PositiveShare = _field(1.0, "of an image that looks like lines of text; 1: any")
    pair: Pair = _field("both", "what must be near in two samples: both, image, caption, either")
    max_image_bits: Amount = _field(96, "of 256 bits of the perceptual hash, that may differ if texts are near, too")
    max_lone_image_bits: Amount = _field(72, "of 256 bits that may differ where texts do not count")
    max_colour_distance: Share = _field(0.25, "of the colours that may differ between near images")
    min_caption_similarity: PositiveShare = _field(0.5, "of the words that captions of near images share")
    min_text_similarity: PositiveShare = _field(0.8, "of the word triples that near texts with questions share")
    question_words: Count = _field(10, "in a row that a text shares with a benchmark's question")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds one option for each setting. Example: --min-words 5"""
    hints = typing.get_type_hints(Settings, include_extras=True)
    group = parser.add_argument_group("thresholds")
    for field in dataclasses.fields(Settings):
        hint, kind = hints[field.name], dict[str, Any]()
        if typing.get_origin(hint) is Literal:
            kind = {"choices": typing.get_args(hint)}
        elif hint is not str:
            kind = {"type": read_as(hint), "metavar": "N"}
        text = f"{field.metadata['help']} (default: {field.default or 'none'})"
        group.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **kind)


def given_settings(options: argparse.Namespace) -> Settings:
    """The settings of parsed options."""
    return Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
