"""Measures of samples: a record of 239 bytes for each, from which every rule is decided without reading it again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from navil_jax.data.cleaning.image import HASH_BYTES, HUES, image_measures
from navil_jax.data.cleaning.text import (
    PERMUTATIONS,
    SCRIPTS,
    ngrams,
    own_turns,
    shingles,
    signature,
    text_measures,
    text_of,
    words_of,
)
from navil_jax.data.images import load_image
from navil_jax.data.sample import CAPTION_PROMPT, BadSample, Sample, Source, content_hash
from navil_jax.errors import UserError

NOTE = np.dtype(
    [
        ("bad", "?"),
        ("images", "u2"),
        ("content", "u8"),  # hash of images and text
        ("low", "u8"),  # of the first image: bits of its hash that are of low frequencies
        ("hashes", "u1", (2, HASH_BYTES)),  # of the first and the last image
        ("colours", "u1", (2, HUES + 1)),
        ("asked", "?"),  # whether there are questions beside those that only ask for a caption
        ("caption", "u1", (PERMUTATIONS,)),  # MinHash of the words, or of word triples: see `text.shingles`
        ("characters", "u4"),
        ("words", "u4"),
        ("word_share", "f4"),
        ("repeated_share", "f4"),
        ("run", "u4"),
        ("markup_share", "f4"),
        ("boilerplate_share", "f4"),
        ("scripts", "u1", (len(SCRIPTS),)),
        ("least_side", "u4"),  # of all images
        ("most_side", "u4"),
        ("aspect", "f4"),
        ("deviation", "f4"),
        ("text_area", "f4"),
        ("question", "u4"),  # number of the benchmarks' question that the text shares words with, from 1; 0: none
    ]
)


class Measured(NamedTuple):
    """What was measured of some samples."""

    table: np.ndarray  # [n] NOTE
    said: list[tuple[str, str]]  # key of each sample, and why it cannot be read


@dataclasses.dataclass(frozen=True)
class Measure:
    """Measures samples of one source. A pure function of their indices; picklable if the source is.

    Args:
      prompt: question of samples that are a caption; is not counted as text.
      questions: hash of a run of words -> number of the question of a benchmark that has it, from 1.
      question_words: length of these runs.
    """

    source: Source
    name: str
    prompt: str = ""
    questions: Mapping[int, int] = dataclasses.field(default_factory=dict)
    question_words: int = 10

    def __call__(self, indices: Sequence[int]) -> Measured:
        """Raises `UserError` if the disk or the network failed."""
        table, said = np.zeros(len(indices), NOTE), list[tuple[str, str]]()
        for place, index in enumerate(indices):
            key, reason = f"{self.name}/{index}", ""
            try:
                sample = self.source[index]
                key = sample.key
                table[place] = self.note(sample)
            except BadSample as error:
                key, reason = error.key, error.reason
            except UserError as error:
                reason = str(error)
            except OSError as error:
                where = f"sample {index} of {self.name}"
                raise UserError(f"{where}: {error}; the same command goes on from here") from error
            table[place]["bad"] = bool(reason)
            said.append((key, reason))
        return Measured(table, said)

    def note(self, sample: Sample) -> np.ndarray:
        """One `NOTE`. Raises `UserError` for an image that cannot be decoded."""
        note = np.zeros((), NOTE)
        loaded = [
            load_image(content, f"{sample.key}, image {number}" if isinstance(content, bytes) else "")
            for number, content in enumerate(sample.images, 1)
        ]
        note["content"] = content_hash(sample)
        note["images"] = len(loaded)
        turns = own_turns(sample, (CAPTION_PROMPT, self.prompt))
        text = text_of(turns)
        words, asked = words_of(text), any(question for question, _ in turns)
        note["asked"] = asked
        note["caption"] = signature(shingles(words, in_order=asked or not loaded))
        for name, value in text_measures(text, words).items():
            note[name] = value
        if loaded:
            found = [image_measures(image) for image in loaded]
            note["low"] = found[0]["low"]
            for name, field in (("hashes", "hash"), ("colours", "colours")):
                note[name] = found[0][field], found[-1][field]
            note["least_side"] = min(min(image.size) for image in loaded)
            note["most_side"] = max(max(image.size) for image in loaded)
            note["aspect"] = max(max(image.size) / min(image.size) for image in loaded)
            note["deviation"] = min(one["deviation"] for one in found)
            note["text_area"] = max(one["text_area"] for one in found)
        if self.questions:
            shared = (self.questions.get(run, 0) for run in ngrams(words, self.question_words))
            note["question"] = next(filter(None, shared), 0)
        return note
