"""What is noted of one sample: sizes, shape of its images, a hash, and what is wrong with it."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.config import SPECIAL_TOKENS, Config
from navil_jax.data.features import Skipped, smaller_images
from navil_jax.data.formats.placeholders import placeholders
from navil_jax.data.grounding import MARKERS
from navil_jax.data.images import load_image
from navil_jax.data.prompt import PLACEHOLDER, encode_conversation, image_tokens
from navil_jax.data.sample import BadSample, Sample, Source, content_hash
from navil_jax.data.tokenizers import Tokenizer
from navil_jax.errors import UserError

UNREAD, GOOD, RESIZED, TOO_LONG, BAD = range(5)  # status; UNREAD is what a new table is filled with
LITERAL, EMPTY = 1, 2  # flags: the text has what marks an image or a turn, an answer is empty
NOTE = np.dtype(
    [
        ("status", "u1"),
        ("flags", "u1"),
        ("images", "u2"),
        ("visual_tokens", "u4"),  # before images are made smaller to fit a row
        ("text_tokens", "u4"),
        ("learnt_tokens", "u4"),
        ("patches", "u4"),
        ("characters", "u4"),  # of questions and answers
        ("narrowest", "f4"),  # width / height of the image where that is smallest
        ("widest", "f4"),
        ("hash", "u8"),  # of images and text; 0 of bad samples
    ]
)
SIZES = ("visual_tokens", "text_tokens", "patches")
_EMPTY_ANSWER = re.compile(r"answer( \d+)? is empty")


class Notes(NamedTuple):
    """What was noted of some samples."""

    table: np.ndarray  # [n] NOTE
    bad: list[Skipped]
    unused: Counter[str]  # fields of the records -> samples that are not made of them


@dataclasses.dataclass(frozen=True)
class Checkup:
    """Reads samples of one source as training would, all but cutting the patches. Picklable if the source is."""

    source: Source
    name: str
    config: Config  # as it holds for this source
    tokenizer: Tokenizer
    budgets: Mapping[str, int]  # feature -> most that fits in a row

    def __call__(self, indices: Sequence[int]) -> Notes:
        """Notes of these samples.

        Raises:
          UserError: the disk or the network failed.
          RuntimeError: the source failed in a way that says nothing about the sample.
        """
        notes, bad = np.zeros(len(indices), NOTE), list[Skipped]()
        unused = Counter[str]()
        for place, index in enumerate(indices):
            key = f"{self.name}/{index}"
            try:
                sample = self.source[index]
                key = sample.key
                notes[place] = self.note(sample)
                unused.update(sample.unused)
                continue
            except BadSample as error:
                key, reason = error.key, error.reason
            except UserError as error:
                reason = str(error)
            except OSError as error:
                raise UserError(
                    f"sample {index} of {self.name}: {error}; the same command goes on from here"
                ) from error
            except Exception as error:
                what = " ".join(f"{type(error).__name__}: {error}".split())
                raise RuntimeError(f"reading sample {index} of source {self.name} ({key}) failed: {what}") from error
            literal, empty = PLACEHOLDER in reason, _EMPTY_ANSWER.search(reason)
            notes[place]["status"] = BAD
            notes[place]["flags"] = (LITERAL if literal else 0) | (EMPTY if empty else 0)
            bad.append(Skipped(self.name, len(self.source), index, key, reason))
        return Notes(notes, bad, unused)

    def note(self, sample: Sample) -> np.ndarray:
        """One `NOTE`. Raises `UserError` for a bad sample."""
        config, vision = self.config, self.config.model.vision
        if sample.images and vision is None:
            raise UserError(f"{sample.key}: has images, but config.model.vision is None")
        sizes = self._image_sizes(sample)
        system = config.data.system_message if sample.system is None else sample.system
        tokens = encode_conversation(
            self.tokenizer,
            config.data.template,
            system,
            sample.turns,
            [()] * len(sizes),  # <img></img>: what stands between them needs no tokenizer to be counted
            config.data.loss_weight,
            grounded=sample.grounded,
        )
        lengths = np.array([len(tokens["visual_tokens"]), len(tokens["text_tokens"]), 0])
        lengths += _image_sizes(sizes, config) - len(sizes) * np.array([1, 1, 0])
        note = np.zeros((), NOTE)
        for name, length in zip(SIZES, lengths.tolist(), strict=True):
            note[name] = length
        note["learnt_tokens"] = np.count_nonzero(tokens["text_weights"])
        note["images"], note["hash"] = len(sizes), content_hash(sample)
        if sizes:
            ratios = [width / height for height, width in sizes]
            note["narrowest"], note["widest"] = min(ratios), max(ratios)
        note["characters"] = sum(len(text) for turn in sample.turns for text in turn)
        empty = not all(answer.strip() for _, answer in sample.turns)
        note["flags"] = (LITERAL if self.marks(sample) else 0) | (EMPTY if empty else 0)
        note["status"] = self._status(note, sizes)
        return note

    def _image_sizes(self, sample: Sample) -> list[tuple[int, int]]:
        """(height, width) of the images, all of which were decoded."""
        loaded = (
            load_image(content, f"{sample.key}, image {number}" if isinstance(content, bytes) else "")
            for number, content in enumerate(sample.images, 1)
        )
        return [(image.height, image.width) for image in loaded]

    def marks(self, sample: Sample) -> set[str]:
        """What stands in the text as plain text, and marks an image or a turn elsewhere: `<|image_pad|>`, `<img>`."""
        system = self.config.data.system_message if sample.system is None else sample.system
        texts = (system or "", *(text for turn in sample.turns for text in turn))
        if sample.grounded:
            texts = tuple(MARKERS.sub("", text) for text in texts)
        found = {mark for text in texts for mark in self._markers.findall(text)} | set(placeholders(texts))
        return found | {PLACEHOLDER for text in (system or "", *(a for _, a in sample.turns)) if PLACEHOLDER in text}

    def _status(self, note: np.ndarray, sizes: Sequence[tuple[int, int]]) -> int:
        if all(note[name] <= self.budgets[name] for name in SIZES):
            return GOOD
        if self.config.data.oversize != "resize" or not sizes:
            return TOO_LONG
        small = smaller_images(sizes, self.config, int(note["text_tokens"]), self.budgets)
        needed = np.array([note[name] for name in SIZES], np.int64)
        needed += _image_sizes(sizes, small) - _image_sizes(sizes, self.config)
        return RESIZED if all(needed <= [self.budgets[name] for name in SIZES]) else TOO_LONG

    @functools.cached_property
    def _markers(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, (*self.tokenizer.MARKERS, *SPECIAL_TOKENS))))


def _image_sizes(sizes: Sequence[tuple[int, int]], config: Config) -> np.ndarray:
    """What images of these (height, width) add to each of `SIZES`. [3] int64"""
    total = np.zeros(3, np.int64)
    for height, width in sizes:
        cost = image_tokens(width, height, config)
        total += [getattr(cost, name) for name in SIZES]
    return total
