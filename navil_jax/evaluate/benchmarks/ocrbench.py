"""OCRBench: hits of 1000; a hit is a prediction with one of the answers inside."""

from collections.abc import Callable, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks.scoring import Benchmark, Line, Protocol, Score, grouped, numbers

RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
FORMULAS = "Handwritten Mathematical Expression Recognition"
OTHERS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)
FORMULA_DATASET = "HME100k"
# Full-width forms of ASCII, and the blank that is as wide as an ideograph.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _is_hit(line: Line, normal: Callable[[str], str]) -> float:
    answers = [line["answer"]] if isinstance(line["answer"], str) else line["answer"]
    return float(any(normal(answer) in normal(line["prediction"]) for answer in answers))


def _vlmevalkit(line: Line) -> Score:
    return _is_hit(line, _formula if line["question_type"] == FORMULAS else _text)


def _lmms(line: Line) -> Score:
    """By the name of the data set; full-width forms are folded."""
    of_formulas = line.get("dataset", FORMULA_DATASET if line["question_type"] == FORMULAS else "") == FORMULA_DATASET
    return _is_hit(line, _formula if of_formulas else lambda text: _text(text.translate(_NARROW)))


def _sums(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    groups = grouped(lines, scores, lambda line: line["question_type"])
    return {name: sum(numbers(groups.get(name, []))) for name in (*RECOGNITION, *OTHERS)}


def _vlmevalkit_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    sums = _sums(lines, scores)
    found = {"Text Recognition": sum(sums[name] for name in RECOGNITION), **{name: sums[name] for name in OTHERS}}
    hits = sum(found.values())
    return {**found, "Final Score": hits, "Final Score Norm": hits / 10}


def _lmms_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    sums = _sums(lines, scores)
    return {"final_over_1000": sum(sums.values()) / 1000, "by_type": {name: int(hits) for name, hits in sums.items()}}


def _extras(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    groups = grouped(lines, scores, lambda line: line["question_type"])
    return {"expected_by_type": {name: [int(sum(numbers(of))), len(of)] for name, of in groups.items()}}


OCRBENCH = Benchmark(
    name="ocrbench",
    primary="vlmevalkit_2505",
    keys={"answer": "text or texts", "question_type": "text"},
    optional={"dataset": "text"},
    protocols={
        "vlmevalkit_2505": Protocol(_vlmevalkit, _vlmevalkit_total),
        "vlmevalkit_head": Protocol(_vlmevalkit, _vlmevalkit_total),
        "lmms_eval": Protocol(_lmms, _lmms_total),
    },
    totals=("vlmevalkit_2505", "vlmevalkit_head", "lmms_eval"),
    scale="count of hits (the real set has 1000)",
    extras=_extras,
)
