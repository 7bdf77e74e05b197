"""AI2D and ScienceQA-IMG: one letter of two to five options."""

import re
import string
from collections.abc import Callable, Sequence

from navil_jax.evaluate.benchmarks import choices
from navil_jax.evaluate.benchmarks.scoring import (
    Benchmark,
    Line,
    Protocol,
    Score,
    grouped,
    letters,
    numbers,
    overall,
    percent,
    plain,
)

KEYS = {"options": "options", "answer": "text"}


def _vlmevalkit(parse: choices.Parse) -> Protocol:
    def score(line: Line) -> Score:
        return float(parse(line["prediction"], letters(line["options"])) == line["answer"])

    return Protocol(score, plain(overall))


VLMEVALKIT = {name: _vlmevalkit(parse) for name, parse in choices.VLMEVALKIT_PARSERS.items()}


def _by_rule(same: Callable[[str, str], bool]) -> Protocol:
    def score(line: Line) -> Score:
        return float(same(line["prediction"], line["answer"]))

    return Protocol(score, plain(percent))


def _same_letter(prediction: str, answer: str) -> bool:
    return prediction.strip().lower() == answer.strip().lower()


def _lmms_ai2d(prediction: str, answer: str) -> bool:
    start = re.match(r"\s*([A-Z])\.", prediction)
    return without_marks(start[1] if start else prediction.strip()) == without_marks(answer)


def without_marks(text: str) -> str:
    """Lower case, without ASCII punctuation: how lmms-eval compares texts."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


AI2D = Benchmark(
    name="ai2d",
    primary="internvl",
    keys=KEYS,
    protocols={"internvl": _by_rule(_same_letter), **VLMEVALKIT, "lmms_eval": _by_rule(_lmms_ai2d)},
    totals=("internvl", *VLMEVALKIT, "lmms_eval"),
    scale="0..100",
)


def _internvl_scienceqa(line: Line) -> Score:
    try:
        return float(internvl_letter(line["prediction"], letters(line["options"])) == line["answer"])
    except IndexError:
        return "error:IndexError"


def internvl_letter(prediction: str, options: dict[str, str]) -> str:
    """InternVL's clean-up for ScienceQA: `choices.internvl`, then "X. text" and "(X) text" become X.

    Raises:
      IndexError: two characters of which the first is a bracket.
    """
    answer = choices.internvl(prediction, options) if prediction.strip() else ""
    if answer[1:2] == ".":
        answer = answer[0]
    if len(answer) > 1 and answer[0] == "(" and answer[2] == ")":
        answer = answer[1]
    return answer


def _lmms_scienceqa(prediction: str, answer: str) -> bool:
    prediction, answer = prediction.strip(), answer.strip().lower()
    start = prediction[0] if prediction[:1].isupper() and prediction[1:2] == "." else prediction
    return answer in (prediction.lower(), start.lower())


def _llava(prediction: str, answer: str) -> bool:
    """The letter alone, "X. text", or one statement "The answer is X" with something behind it."""
    if prediction in ("A", "B", "C", "D", "E"):
        return prediction == answer
    if prediction[:1] in ("A", "B", "C", "D", "E") and prediction[1:3] == ". ":
        return prediction[0] == answer
    return re.findall(r"The answer is ([A-Z]).", prediction) == [answer]


def _by_subject(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, dict]:
    groups = grouped(lines, scores, lambda line: line.get("subject"))
    return {"expected_by_subject": {name: [sum(numbers(of)), len(of)] for name, of in groups.items() if name}}


def _expected(line: Line) -> Score:
    score = _internvl_scienceqa(line)
    return 0.0 if isinstance(score, str) else score


SCIENCEQA = Benchmark(
    name="scienceqa",
    primary="internvl",
    keys=KEYS,
    protocols={
        "internvl": Protocol(_internvl_scienceqa, plain(percent)),
        **VLMEVALKIT,
        "lmms_eval": _by_rule(_lmms_scienceqa),
        "llava": _by_rule(_llava),
    },
    totals=("internvl", *VLMEVALKIT, "lmms_eval", "llava"),
    scale="0..100",
    expected=_expected,
    extras=_by_subject,
    optional={"subject": "text"},
)
