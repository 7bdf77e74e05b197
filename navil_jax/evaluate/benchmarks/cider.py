"""CIDEr-D of captions against several references, as pycocoevalcap 1.2 computes it (Vedantam et al., arXiv 1411.5726).

Words are those of its Java tokenizer (Penn Treebank, in lower case, without its list of punctuation), remade as one
regular expression; `tests/test_cider.py` holds both to what pycocoevalcap gave.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length
SCALE = 10.0

_MARKS = str.maketrans("\u2018\u2019\u201c\u201d\u2026\u2013\u2014", "''\"\"   ")  # quotes, dots, dashes
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_SPLIT |= {"lemme": "lem me", "'tis": "'t is"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_LEFT_OUT = {"'", '"', "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_WORD = re.compile(
    r"""
      https?://\S+ | www\.\S+ | [\w.+-]+@\w[\w.-]*\w          # addresses
    | <[a-z/][^<>\s]*>                                        # tags
    | (?:mr|mrs|ms|dr|st|jr|sr|prof|vs|etc|inc|co)\.(?!\w)    # abbreviations keep their full stop
    | no\.(?=\s*\d) | (?:[a-z]\.){2,}
    | \w+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b           # parts of contractions
    | 'tis\b | 'n' | 'cause\b | '\d0s\b
    | \d+(?:[.,:/]\d+)+(?:-\w+)* | [od]'\w{2,}                # numbers, names
    | \w+(?:[-./]+\w+)*                                       # words, also joined ones
    | [?!]+ | \.{2,} | -{2,} | [^\w\s]                        # marks
    """,
    re.VERBOSE,
)


def words(caption: str) -> list[str]:
    """Example: "A man's dog, he says, doesn't run." -> a man 's dog he says does n't run"""
    found = (_SPLIT.get(token, _BRACKETS.get(token, token)) for token in _WORD.findall(_prepared(caption)))
    return [word for token in found for word in token.split() if word not in _LEFT_OUT and set(word) != {"."}]


def _prepared(caption: str) -> str:
    return caption.lower().translate(_MARKS)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of every caption, from 0 to 10; that of a set is their mean.

    How much an n-gram weighs follows from the images whose references have it, so that a score depends on the others of
    its set; of one image alone it is 0.

    Args:
      references: for every caption, one or more.
    """
    grams = [[_grams(reference) for reference in of] for of in references]
    frequency = Counter(gram for of in grams for gram in set().union(*of))
    weights = _Weights(frequency, len(references))
    scores = []
    for caption, of in zip(captions, grams, strict=True):
        own = _Vector(_grams(caption), weights)
        similar = [_similarity(own, _Vector(counts, weights)) for counts in of]
        scores.append(SCALE * sum(similar) / len(similar))
    return scores


def _grams(caption: str) -> Counter[tuple[str, ...]]:
    of = words(caption)
    return Counter(gram for length in range(1, LONGEST + 1) for gram in _windows(of, length))


def _windows(of: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(of[start : start + length]) for start in range(len(of) - length + 1))


class _Weights:
    """The inverse document frequency of n-grams; one that no reference has counts as one that one image has."""

    def __init__(self, frequency: Mapping[tuple[str, ...], int], images: int) -> None:
        self._frequency, self._most = frequency, math.log(images)

    def __getitem__(self, gram: tuple[str, ...]) -> float:
        return self._most - math.log(max(1, self._frequency.get(gram, 0)))


class _Vector:
    """A caption's n-grams weighted by tf-idf, by their length; and how many pairs of words it has."""

    def __init__(self, counts: Mapping[tuple[str, ...], int], weights: _Weights) -> None:
        self.of: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            self.of[len(gram) - 1][gram] = count * weights[gram]
        self.norms = [math.sqrt(sum(value * value for value in of.values())) for of in self.of]
        self.pairs = sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(caption: _Vector, reference: _Vector) -> float:
    """Mean over the lengths of n-grams of their clipped cosine, less the further the captions differ in length."""
    total = 0.0
    for own, true, norm in zip(
        caption.of, reference.of, map(math.prod, zip(caption.norms, reference.norms, strict=True)), strict=True
    ):
        common = sum(min(value, true[gram]) * true[gram] for gram, value in own.items() if gram in true)
        total += common / norm if norm else common
    return total / LONGEST * math.exp(-((caption.pairs - reference.pairs) ** 2) / (2 * SIGMA**2))
