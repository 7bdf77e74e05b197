"""MME: yes or no, two questions for an image; a category has its share of right answers and of right images."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks.scoring import Benchmark, Line, Protocol, Score, Total, grouped, numbers
from navil_jax.evaluate.benchmarks.textvqa import vlmevalkit_marks

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
START = 4  # characters of an answer that InternVL and lmms-eval look at


def internvl_label(answer: str) -> str:
    """Example: "是的" -> "yes";  "Not sure" -> "no";  "The answer is yes" -> "other" """
    answer = answer.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    answer = answer.lower().replace("true", "yes").replace("false", "no")
    return _by_start(re.sub("[\u4e00-\u9fa5]", "", answer))


def lmms_label(answer: str) -> str:
    answer = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(answer) or _by_start(answer)


def _by_start(answer: str) -> str:
    return next((label for label in ("yes", "no") if label in answer[:START]), "other")


def vlmevalkit_label(answer: str) -> str:
    words = vlmevalkit_marks(answer.lower()).split()
    found = [label for label in ("yes", "no") if label in words]
    return found[0] if len(found) == 1 else "unknown"


def _scorer(label: Callable[[str], str], total: Total) -> Protocol:
    def score(line: Line) -> Score:
        return float(label(line["prediction"]) == line["answer"].lower().strip().replace(".", ""))

    return Protocol(score, total)


def categories(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    """100 x share of right answers + 100 x share of images with both right, of those that have two questions."""
    found = {}
    images = grouped(lines, scores, lambda line: (line["category"], line["question_id"]))
    for name, of in grouped(lines, scores, lambda line: line["category"]).items():
        both = [sum(numbers(pair)) == 2 for (of_name, _), pair in images.items() if of_name == name and len(pair) == 2]
        found[name] = 100 * sum(numbers(of)) / len(of) + (100 * sum(both) / len(both) if both else 0)
    return found


def _total(second: str, listed: bool) -> Total:
    """
    Args:
      second: what the sum of the last four categories is called.
      listed: whether the categories are told, too.
    """

    def total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
        found = categories(lines, scores)
        sums = {
            "perception": sum(value for name, value in found.items() if name in PERCEPTION),
            second: sum(value for name, value in found.items() if name in COGNITION),
        }
        return {**sums, "sum": sum(sums.values()), **({"categories": found} if listed else {})}

    return total


MME = Benchmark(
    name="mme",
    primary="internvl",
    keys={"answer": "text", "category": "text", "question_id": "text or number"},
    protocols={
        "internvl": _scorer(internvl_label, _total("cognition", listed=True)),
        "vlmevalkit_2505": _scorer(vlmevalkit_label, _total("reasoning", listed=True)),
        "vlmevalkit_head": _scorer(vlmevalkit_label, _total("reasoning", listed=True)),
        "lmms_eval": _scorer(lmms_label, _total("cognition", listed=False)),
    },
    totals=("internvl", "vlmevalkit_2505", "vlmevalkit_head", "lmms_eval"),
    scale="per category acc + acc_plus, 0..200; sum 0..2800",
)
