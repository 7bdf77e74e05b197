"""DocVQA and InfoVQA: ANLS, one minus the normalised edit distance to the nearest answer, 0 below one half."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks.scoring import (
    Benchmark,
    Line,
    Protocol,
    Score,
    edit_distance,
    numbers,
    numpy_percent,
    percent,
    plain,
)

THRESHOLD = 0.5


def similarity(prediction: str, answers: Sequence[str]) -> float:
    """Score of a prediction.

    Texts are compared in lower case with single blanks; lengths are those of the raw texts, so blanks around a
    prediction count.
    """

    said = _plain(prediction)

    def distance(answer: str) -> float:
        longest, meant = max(len(answer.upper()), len(prediction.upper())), _plain(answer)
        if abs(len(meant) - len(said)) > longest * (1 - THRESHOLD):
            return 1.0  # too far, whatever the letters are
        return edit_distance(meant, said) / longest if longest else 0.0

    score = 1 - min(map(distance, answers))
    return score if score >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _raw(line: Line) -> Score:
    return similarity(line["prediction"], line["answers"])


def _stripped(line: Line) -> Score:
    return similarity(line["prediction"].strip(), line["answers"])


# InfoVQA: a key of a line -> name of the table -> its values as InternVL prints them.
TABLES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "answer_type": (
        "answer_types",
        {
            "image span": "Image-Span",
            "question span": "Question-Span",
            "multiple spans": "Multi-Span",
            "non span": "None span",
            "list": "List",
        },
    ),
    "evidence": (
        "evidence_types",
        {
            "table/list": "Table/list",
            "textual": "Text",
            "photo/pciture/visual_objects": "Visual/Layout",
            "figure": "Figure",
            "map": "Map",
        },
    ),
    "operation/reasoning": (
        "operation_types",
        {"comparison": "Sorting", "arithmetic": "Arithmetic", "counting": "Counting"},
    ),
}


def _by_type(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    """Means (0..1) of answer types, evidence and operations; a question counts in each that it has."""
    found: dict[str, dict[str, float]] = {}
    for key, (name, values) in TABLES.items():
        for value, printed in values.items():
            of = [score for line, score in zip(lines, scores, strict=True) if value in (line.get(key) or ())]
            if of:
                found.setdefault(name, {})[printed] = sum(numbers(of)) / len(of)
    return {"internvl_by_type": found} if found else {}


def _benchmark(name: str, extras: Callable | None) -> Benchmark:
    protocols = {
        "internvl": Protocol(_raw, plain(percent)),
        "vlmevalkit_2505": Protocol(_raw, plain(numpy_percent)),
        "vlmevalkit_head": Protocol(_raw, plain(numpy_percent)),
        "lmms_eval": Protocol(_stripped, plain(percent)),
    }
    return Benchmark(
        name=name,
        primary="internvl",
        keys={"answers": "texts"},
        optional=dict.fromkeys(TABLES, "texts, or []"),
        protocols=protocols,
        totals=tuple(protocols),
        scale="0..100 (the servers and papers print ANLS x 100)",
        extras=extras,
    )


DOCVQA, INFOVQA = _benchmark("docvqa", None), _benchmark("infovqa", _by_type)
