"""MathVista: an answer is taken out of the response, by rules or by a judge, and compared."""

import re
from collections.abc import Sequence
from typing import Any

from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.scoring import (
    API_FAILURE,
    VLMEVALKIT,
    Benchmark,
    Line,
    Protocol,
    Replies,
    Score,
    edit_distance,
    letters,
    parsed,
    percent,
    plain,
)

TRIES = 5
CHOICE = "multi_choice"


# VLMEvalKit: what the rules read is taken as it is, else what the judge says of it.


def _read(line: Line, text: str, parse: choices.Parse) -> tuple[Any, Any]:
    """What a text says and what it should say."""
    if line["question_type"] == CHOICE:
        return parse(text, letters(line["choices"])), line["answer_option"]
    convert = {"integer": int, "float": float}.get(line["answer_type"])
    if convert is None:
        return "None", str(line["answer"])  # as the code has it: such an answer is never right
    value = parsed(convert, text)
    answer = None if value is None else parsed(convert, line["answer"])
    return value, line["answer"] if answer is None else answer


def _prefetched(line: Line, parse: choices.Parse) -> bool:
    """Whether rules alone read the response: any option of a choice, or the right number if it is not 0."""
    said, truth = _read(line, line["prediction"], parse)
    return bool(said) and (line["question_type"] == CHOICE or said == truth)


def _vlmevalkit(parse: choices.Parse) -> Protocol:
    def score(line: Line) -> Score:
        text = line["prediction"] if _prefetched(line, parse) else _asked(Replies(line["judge_replies"]))
        said, truth = _read(line, text, parse)
        return float(said == truth)

    def total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for line, score in zip(lines, scores, strict=True):
            early = _prefetched(line, parse)
            for name in ("Overall", *(line.get("skills") or ()), *([line["task"]] if line.get("task") else [])):
                entry = found.setdefault(name, {"tot": 0, "prefetch": 0, "hit": 0, "acc": 0.0})
                entry["tot"] += 1
                entry["prefetch"] += early
                entry["hit"] += int(float(score))
                entry["acc"] = entry["hit"] / entry["tot"] * 100
        return found

    return Protocol(score, total)


def _asked(judge: Replies) -> str:
    """The first reply that is no failure, of five."""
    for _ in range(TRIES):
        said = judge()
        if said is not None and f"{API_FAILURE}." not in said:
            return said
    return ""


# The official code, and those that follow it: extract, normalise, compare texts.


def extracted(line: Line, response: str) -> str:
    """The answer in a response, by rules or by the judge."""
    if not response:
        return ""
    if line["question_type"] == CHOICE and response in line["choices"]:
        return response
    for kind, convert in (("integer", int), ("float", float)):
        if line["answer_type"] == kind and (value := parsed(convert, response)) is not None:
            return str(value)
    judge = Replies(line["judge_replies"])
    replies = (judge() for _ in range(TRIES))
    return next((said.strip() for said in replies if said and said.strip()), "")


def normal(line: Line, text: str, precision: float | None) -> str | None:
    """An answer in the form of the question's answers.

    Args:
      precision: decimals of an answer that is a float; None: the code fails on it.
    """
    if line["question_type"] == CHOICE:
        return _nearest(text.strip(), line["choices"])
    try:
        if line["answer_type"] == "integer":
            return str(int(float(text)))
        if line["answer_type"] == "float":
            return None if precision is None else str(round(float(text), int(precision)))
    except (ValueError, OverflowError):
        return None
    return text


def _nearest(text: str, options: Sequence[str]) -> str:
    """The option of a letter, else the one that is most like the text."""
    if letter := re.search(r"\(([a-zA-Z])\)", text):
        text = letter[1].upper()
    return letters(options).get(text) or min(options, key=lambda option: edit_distance(text, option))


def _internvl(line: Line) -> Score:
    found = extracted(line, line["prediction"])
    return float(normal(line, found, line.get("precision")) == line["answer"])


def _lmms(line: Line) -> Score:
    """lmms-eval hands the precision over as a float, at which Python's round fails: no float is ever right."""
    found = normal(line, extracted(line, line["prediction"].strip()), None)
    return float(str(found).strip() == line["answer"].strip())


PROTOCOLS = {
    **{name: _vlmevalkit(parse) for name, parse in choices.VLMEVALKIT_PARSERS.items()},
    "internvl_mathvista": Protocol(_internvl, plain(percent)),
    "lmms_eval": Protocol(_lmms, plain(percent)),
}
MATHVISTA = Benchmark(
    name="mathvista",
    primary=VLMEVALKIT[0],
    keys={"question_type": "text", "answer_type": "text", "answer": "text", "judge_replies": "texts, or []"},
    optional={
        "choices": "texts, or []",
        "answer_option": "text",
        "precision": "number",
        "task": "text",
        "skills": "texts, or []",
    },
    also=lambda line: {"choices": "texts", "answer_option": "text"} if line["question_type"] == CHOICE else {},
    protocols=PROTOCOLS,
    totals=tuple(PROTOCOLS),
    scale="0..100",
    aliases={"internvl": "internvl_mathvista", "official": "internvl_mathvista"},
)
