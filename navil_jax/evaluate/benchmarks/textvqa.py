"""TextVQA: VQA accuracy, the share of people who gave the same normalised answer, each left out once."""

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from navil_jax.evaluate.benchmarks.scoring import Benchmark, Line, Protocol, Score, numpy_percent, percent

ANSWERS = 10  # people asked for each question
MARKS = ';/[]"{}()=+\\_-><@`,?!'
MOST_PERIODS = 32  # so many are deleted at most: the reference code hands a flag over as a count
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}

# Spellings with their apostrophe; without it they are taken for the same.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
# Either apostrophe may be missing, not both.
_TWO_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""
_ODD = {
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    "somebody'd": "somebodyd",
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
}


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        first, second = word.index("'"), word.rindex("'")
        found |= {word[:place] + word[place + 1 :]: word for place in (first, second)}
    return found | _ODD


CONTRACTIONS = _contractions()


def internvl_normal(text: str) -> str:
    """An answer as InternVL and lmms-eval compare it.

    Example: "The Two  dogs." -> "2 dogs";  "1,000" -> "1000";  "rock-n-roll" -> "rock n roll"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(delete_marks(_one_line(text), re.compile(r"\.(?!\d)")))


def vlmevalkit_normal(text: str) -> str:
    """An answer as VLMEvalKit compares it: commas reach the rule of marks, and a period behind a digit stays."""
    return _words(vlmevalkit_marks(_one_line(text)))


def vlmevalkit_marks(text: str) -> str:
    """Deletes punctuation as VLMEvalKit does."""
    return delete_marks(text, re.compile(r"(?<!\d)\.(?!\d)"))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def delete_marks(text: str, period: re.Pattern) -> str:
    """Deletes a mark that stands beside a blank, or all marks where a comma parts digits; else a blank takes its place.

    Args:
      period: which periods are deleted.
    """
    out, grouped_digits = text, re.search(r"\d,\d", text)
    for mark in MARKS:
        out = out.replace(mark, "" if grouped_digits or f"{mark} " in text or f" {mark}" in text else " ")
    return period.sub("", out, count=MOST_PERIODS)


def _words(text: str) -> str:
    """Number words as digits, without articles, contractions with their apostrophe."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _shares(line: Line, normal: Callable[[str], str]) -> list[float]:
    """For each person: min(1, others who gave the prediction / 3)."""
    answers, prediction = [normal(answer) for answer in line["answers"]], normal(line["prediction"])
    matches = answers.count(prediction)
    return [min(1.0, (matches - (answer == prediction)) / 3) for answer in answers]


def _internvl(line: Line) -> Score:
    if len(line["answers"]) != ANSWERS:
        return "error:AssertionError"
    shares = _shares(line, internvl_normal)
    return sum(shares) / len(shares)


def _vlmevalkit(line: Line) -> Score:
    return float(np.mean(_shares(line, vlmevalkit_normal)))


def _lmms(line: Line) -> Score:
    return float(statistics.mean(_shares(line, internvl_normal)))


def _expected(line: Line) -> Score:
    return _internvl(line) if len(line["answers"]) == ANSWERS else _lmms(line)


def _of_ten(compute: Callable[[Sequence[Score]], float]) -> Callable[[Sequence[Line], Sequence[Score]], float]:
    """A total over the lines with ten answers."""

    def total(lines: Sequence[Line], scores: Sequence[Score]) -> float:
        return compute([score for line, score in zip(lines, scores, strict=True) if len(line["answers"]) == ANSWERS])

    return total


def _extras(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    full = sum(len(line["answers"]) == ANSWERS for line in lines)
    return {"n": full, "mean_of_expected_all_lines": percent(scores)}


TEXTVQA = Benchmark(
    name="textvqa",
    primary="internvl",
    keys={"answers": "texts"},
    protocols={
        "internvl": Protocol(_internvl, _of_ten(percent)),
        "vlmevalkit_2505": Protocol(_vlmevalkit, _of_ten(numpy_percent)),
        "vlmevalkit_head": Protocol(_vlmevalkit, _of_ten(numpy_percent)),
        "lmms_eval": Protocol(_lmms, _of_ten(percent)),
    },
    totals=("internvl", "vlmevalkit_2505", "vlmevalkit_head", "lmms_eval"),
    scale="0..100",
    expected=_expected,
    extras=_extras,
    left_out=lambda line: len(line["answers"]) != ANSWERS,
)
