"""GQA: exact match of a short answer."""

from collections.abc import Callable, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks.scoring import (
    Benchmark,
    Line,
    Protocol,
    Score,
    Total,
    grouped,
    numpy_percent,
    percent,
    plain,
)
from navil_jax.evaluate.benchmarks.single_choice import without_marks


def _scorer(is_same: Callable[[str, str], bool], total: Total) -> Protocol:
    def score(line: Line) -> Score:
        return float(is_same(line["prediction"], line["answer"]))

    return Protocol(score, total)


def _internvl(prediction: str, answer: str) -> bool:
    return prediction.rstrip(".").lower() == answer


def _vlmevalkit(prediction: str, answer: str) -> bool:
    return prediction.strip().lower() == answer.strip().lower()


def _lmms(prediction: str, answer: str) -> bool:
    return without_marks(prediction.strip()) == without_marks(answer)


def _official(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    """The table of GQA's eval.py, with two decimals: yes/no questions, open ones, and by structure."""
    groups = grouped(lines, scores, lambda line: (line.get("types") or {}).get("structural"))
    groups.pop(None, None)
    parts = {
        "binary": [score for name, of in groups.items() if name != "query" for score in of],
        "open": groups.get("query", []),
    }
    found: dict[str, Any] = {name: round(percent(of), 2) for name, of in parts.items() if groups}
    found["accuracy"] = round(percent(scores), 2)
    if groups:
        found["structural"] = {name: round(percent(groups[name]), 2) for name in sorted(groups)}
    return found | {"note": "GQA eval.py prints two decimals"}


GQA = Benchmark(
    name="gqa",
    primary="internvl",
    keys={"answer": "text"},
    optional={"types": "object"},
    protocols={
        "internvl": _scorer(_internvl, _official),
        "vlmevalkit_2505": _scorer(_vlmevalkit, plain(numpy_percent)),
        "vlmevalkit_head": _scorer(_vlmevalkit, plain(numpy_percent)),
        "lmms_eval": _scorer(_lmms, plain(percent)),
    },
    totals=("internvl", "vlmevalkit_2505", "vlmevalkit_head", "lmms_eval"),
    scale="0..100",
)
