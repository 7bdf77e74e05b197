"""MMMU: letters, and open answers; the reference codes differ most here."""

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.scoring import (
    RANDOM,
    VLMEVALKIT,
    Benchmark,
    Line,
    Protocol,
    Replies,
    Score,
    grouped,
    letters,
    numbers,
    numpy_percent,
    parsed,
)

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy"
    " Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power"
    " Materials Mechanical_Engineering",
}
OPEN, OTHER = "open", "Other Answers"
ENDS = (",", ".", "!", "?", ";", ":", "'")
# Behind the last of these an open answer stands; behind "=" too, in the last sentence.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def is_open(line: Line) -> bool:
    return line["question_type"] == OPEN


def answers_of(line: Line) -> list[str]:
    """All answers of a question: a list, or a text that is one.

    Example: "['1.06', '1.07']" -> ["1.06", "1.07"];  "24" -> ["24"]
    """
    answer = line["answer"]
    if isinstance(answer, str) and answer.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            answer = ast.literal_eval(answer)
    return [str(one) for one in answer] if isinstance(answer, list) else [str(line["answer"])]


# VLMEvalKit: an open question becomes a choice.


def _vlmevalkit(parse: choices.Parse, judge: bool) -> Protocol:
    def score(line: Line) -> Score:
        answer = line["answer"] if isinstance(line["answer"], str) else str(line["answer"])
        options = letters([answer, OTHER] if is_open(line) else line["options"])
        truth = answer if re.fullmatch("[A-Z]", answer) else "A"
        if judge and line.get("judge_replies") is not None:
            found: str | None = choices.judged(line["prediction"], options, parse, Replies(line["judge_replies"]))
        else:
            found = parse(line["prediction"], options)
        return RANDOM if found == RANDOM else float(found == truth)

    return Protocol(score, _by_subject)


def subject(line: Line) -> str:
    """Example: "validation_Art_Theory_12" -> "Art_Theory" """
    return "_".join(str(line["id"]).split("_")[1:-1])


def _by_subject(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    groups = grouped(lines, scores, subject)
    return {"Overall": numpy_percent(scores)} | {name: numpy_percent(groups[name]) for name in sorted(groups)}


# The official code, and those that follow it.


def _said(prediction: str) -> list[str]:
    """Parts of an open answer that may be the answer itself; all of it if nothing points to a part.

    Example: "It could be 24. Thus the result is 25" -> ["25"]
    """
    text = prediction.strip().strip(".").lower()
    sentences, found = text.split("\n"), []
    for number, sentence in enumerate(sentences):
        indicators = (*INDICATORS, "=") if number == len(sentences) - 1 else INDICATORS
        tail = ""
        for indicator in indicators:
            if indicator in sentence:
                other = sentence.rsplit(indicator, 1)[-1].strip()
                tail = other if not tail or len(other) < len(tail) else tail
        if tail and tail not in ENDS:
            found.append(tail)
    return found or [text]


def _normal(text: str) -> list[float | str]:
    """A number rounded to two decimals, or text in lower case; a lone character with a blank at either side."""
    text = text.strip()
    value = parsed(float, text.replace(",", ""))
    if value is not None:
        return [round(value, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_is_right(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a number of the prediction is one of the answers, or one of the answers is inside its text."""
    said = _said(prediction)
    found = [*said, *(number for part in said for form in NUMBERS for number in re.findall(form, part))]
    wanted = [value for answer in answers for value in _normal(answer)]
    for candidate in (value for text in found for value in _normal(text)):
        if isinstance(candidate, float) and candidate in wanted:
            return True
        if isinstance(candidate, str) and any(isinstance(one, str) and one in candidate for one in wanted):
            return True
    return False


def official_letter(prediction: str, options: Sequence[str] | Mapping[str, str], forms: Sequence[str]) -> str:
    """The letter that stands in brackets, else in one of the forms, else whose text is inside; the last of several.

    Returns:
      A letter, or "random" where the reference code draws one.
    """
    for mark in ENDS:
        prediction = prediction.strip(mark)
    text, by_letter = f" {prediction} ", letters(options)
    sought = {letter: f"({letter})" for letter in by_letter}
    found = [letter for letter in by_letter if sought[letter] in text]
    for form in forms:
        if not found:
            found = [letter for letter in by_letter if form.format(letter) in text]
            sought = {letter: f" {letter} " for letter in by_letter}
    if not found and len(text.split()) > 5:
        text, sought = text.lower(), {letter: option.lower() for letter, option in by_letter.items()}
        found = [letter for letter in by_letter if sought[letter] in text]
    return max(found, key=lambda letter: text.rfind(sought[letter])) if found else RANDOM


def _official(forms: Sequence[str], strip: bool, decimals: int | None) -> Protocol:
    def score(line: Line) -> Score:
        prediction = line["prediction"].strip() if strip else line["prediction"]
        if is_open(line):
            return float(open_is_right(prediction, answers_of(line)))
        found = official_letter(prediction, line["options"], forms)
        return RANDOM if found == RANDOM else float(found in answers_of(line))

    def total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
        values = numbers(scores)
        mean = sum(values) / len(values) if values else 0.0
        said = mean if decimals is None else round(mean, decimals)
        return {"acc": said, "num": len(values), "note": "over the lines whose outcome is not random"}

    return Protocol(score, total)


def _internvl(line: Line) -> Score:
    if is_open(line):
        return float(open_is_right(line["prediction"], answers_of(line)))
    try:
        options = {letter: option.strip() for letter, option in letters(line["options"]).items()}
        return float(choices.internvl(line["prediction"], options) in answers_of(line))
    except IndexError:
        return "error:IndexError"


def _internvl_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """By domain and subject, with three decimals; without the lines at which the script raises."""
    done = [(line, score) for line, score in zip(lines, scores, strict=True) if not isinstance(score, str)]
    groups = grouped([line for line, _ in done], [score for _, score in done], subject)

    def entry(names: Sequence[str]) -> dict[str, float]:
        values = [value for name in names for value in numbers(groups[name])]
        return {"num": len(values), "acc": round(sum(values) / len(values), 3) if values else 0}

    def entries() -> Iterator[tuple[str, dict[str, float]]]:
        for domain, subjects in DOMAINS.items():
            there = [name for name in subjects.split() if name in groups]
            yield f"Overall-{domain}", entry(there)
            yield from ((name, entry([name])) for name in there)
        yield "Overall", entry([name for names in DOMAINS.values() for name in names.split() if name in groups])

    return dict(entries())


PROTOCOLS = {
    **{name: _vlmevalkit(parse, judge=False) for name, parse in choices.VLMEVALKIT_PARSERS.items()},
    "internvl": Protocol(_internvl, _internvl_total),
    "lmms_eval": _official(("{} ", "{}."), strip=True, decimals=5),
    "official": _official((" {} ",), strip=False, decimals=None),
    **{f"{name}_judge": _vlmevalkit(parse, judge=True) for name, parse in choices.VLMEVALKIT_PARSERS.items()},
}
MMMU = Benchmark(
    name="mmmu",
    primary=VLMEVALKIT[0],
    keys={"id": "text", "question_type": "text", "options": "options", "answer": "text or texts"},
    optional={"judge_replies": "texts, or []"},
    protocols=PROTOCOLS,
    totals=(*VLMEVALKIT, "internvl", "lmms_eval", "official"),
    scale="vlmevalkit 0..100; the others 0..1",
    expected=PROTOCOLS[f"{VLMEVALKIT[0]}_judge"].score,
)
