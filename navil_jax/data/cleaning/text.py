"""What is measured of a sample's text: words, repetition, markup, scripts, and a MinHash of its words."""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import Sample, Turn

PERMUTATIONS = 64  # of a MinHash, of each of which a byte is kept
SHINGLE = 3  # words of a run that near texts share where their order counts
RARE = 10  # fewest words of which repetition says something
# Script -> first and last character of its ranges; letters of all others are "other".
SCRIPTS = {
    "latin": ((0x41, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A)),
    "han": ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "arabic": ((0x600, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "thai": ((0xE00, 0xE7F),),
    "other": (),
}
_SINGLE = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # written without blanks
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
_MARKUP = re.compile(
    r"</?[a-z][^<>]*>|&(?:#\d+|#x[\da-f]+|[a-z]{2,8});|!?\[[^\[\]]*\]\([^()\s]*\)"
    r"|(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.]+|\b\w+\.(?:jpe?g|png|gif|webp|bmp|tiff?)\b|\b(?:img|dsc)[_-]?\d+\b",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"click here[\w ]*|all rights reserved|(?:royalty.free )?stock (?:photos?|images?|illustrations?|vectors?)"
    r"|(?:image|photo|picture|content) (?:is )?(?:not|un)\s?available|no (?:image|photo) available"
    r"|lorem ipsum[\w ,]*|(?:add|added) to (?:cart|wishlist)|free shipping[\w ]*|buy now|read more"
    r"|sign (?:up|in) [\w ]*"
    r"|(?:accept|use of|we use) (?:all )?cookies[\w ]*|terms of (?:use|service)|privacy policy|page not found"
    r"|enable javascript[\w ]*|download (?:now|for free)|as an ai (?:language )?model[\w ,]*"
    r"|i'?m sorry,? but i can[\w' ]*",
    re.IGNORECASE,
)


def own_turns(sample: Sample, prompts: Iterable[str]) -> list[Turn]:
    """Its turns without `<image>`; a question that only asks for a caption is empty."""
    plain = [(question.replace(PLACEHOLDER, "").strip(), answer) for question, answer in sample.turns]
    known = set(prompts)
    return [("" if question in known else question, answer) for question, answer in plain]


def text_of(turns: Iterable[Turn]) -> str:
    """Questions and answers, one under the other."""
    return "\n".join(text for turn in turns for text in turn if text)


def words_of(text: str) -> list[str]:
    """Example: "Two cats, 3 dogs." -> two cats 3 dogs; a word of scripts without blanks is a character"""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def text_measures(text: str, words: Sequence[str]) -> dict[str, Any]:
    """The columns of `measure.NOTE` that are of the text."""
    length = max(1, len(text))
    triples = list(zip(words, words[1:], words[2:], strict=False)) if len(words) >= RARE else []
    counts = Counter(words)
    return {
        "characters": len(text),
        "words": len(words),
        "word_share": max(counts.values()) / len(words) if len(words) >= RARE else 0.0,
        "repeated_share": 1 - len(set(triples)) / len(triples) if triples else 0.0,
        "run": max((len(list(group)) for _, group in itertools.groupby("".join(text.split()))), default=0),
        "markup_share": sum(len(found[0]) for found in _MARKUP.finditer(text)) / length,
        "boilerplate_share": sum(len(found[0]) for found in _BOILERPLATE.finditer(text)) / length,
        "scripts": script_shares(text),
    }


def script_shares(text: str) -> np.ndarray:
    """Share of each of SCRIPTS in the letters, in 255ths; zeros without letters. [scripts] uint8"""
    letters = np.array([ord(letter) for letter in text if letter.isalpha()], np.uint32)
    counts = np.zeros(len(SCRIPTS))
    for number, ranges in enumerate(SCRIPTS.values()):
        counts[number] = sum(np.count_nonzero((letters >= low) & (letters <= high)) for low, high in ranges)
    counts[-1] = len(letters) - counts.sum()
    return np.round(255 * counts / max(1, len(letters))).astype(np.uint8)


def shingles(words: Sequence[str], in_order: bool) -> set[str]:
    """What two near texts share: words, or, where their order counts, runs of three."""
    if not in_order:
        return set(words)
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}


def signature(found: Iterable[str]) -> np.ndarray:
    """The lowest byte of each minimum of a MinHash of a set of texts (b-bit minwise hashing). [64] uint8"""
    sketch = _empty_sketch().copy()
    sketch.update_batch([one.encode() for one in sorted(set(found))])
    return (sketch.hashvalues & 0xFF).astype(np.uint8)


@functools.cache
def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, seed=1, scheme="affine32", gpu_mode="disable")


def ngrams(words: Sequence[str], length: int) -> list[int]:
    """64-bit hashes of all runs of so many words."""
    runs = (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
    return [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs]
