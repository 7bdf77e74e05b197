"""MM-Vet: a judge gives each answer 0 to 1."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from navil_jax.evaluate.benchmarks.scoring import (
    VLMEVALKIT,
    Benchmark,
    Line,
    Protocol,
    Replies,
    Score,
    Total,
    numbers,
    parsed,
    percent,
)

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TRIES = 5


def vlmevalkit_grade(judge: Replies) -> float:
    """The first of five replies that is a number from 0 to 1 and nothing else; 0 without one. "nan" passes."""
    return _first_grade(judge, whole=True)


def official_grade(judge: Replies) -> float:
    """The first of five replies whose first word is a number from 0 to 1."""
    return _first_grade(judge, whole=False)


def _first_grade(judge: Replies, whole: bool) -> float:
    for _ in range(TRIES):
        said = judge()
        grade = None if said is None else parsed(float, said if whole else said.split(" ")[0].strip())
        if grade is not None and not grade < 0 and not grade > 1:
            return grade
    return 0.0


def lmms_grade(judge: Replies) -> float:
    """As the official one, but for every second reply after one that is no number, which is not read."""
    failed = 0
    for _ in range(100):  # replies out of range are asked for anew without end
        said = judge()
        if not said:
            return 0.0
        grade = parsed(float, said.split(" ")[0].strip())
        if grade is not None and 0 <= grade <= 1:
            return grade
        if grade is None:
            failed += 1
            judge()
            if failed == 4:
                return 0.0
    return 0.0


def capabilities(line: Line) -> list[str]:
    return line["capability"].split(",")


def _vlmevalkit_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    """Means x 100. A question that needs one capability alone counts twice there, as the code has it."""
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    kinds: dict[str, None] = {}
    for line, grade in zip(lines, numbers(scores), strict=True):
        kind = line["capability"].replace(",", "_")
        kinds[kind] = None
        for name in (*(one for one in CAPABILITIES if one in line["capability"]), "Overall", kind):
            sums[name] += grade
            counts[name] += 1
    found = {name: sums[name] / counts[name] * 100 for name in (*CAPABILITIES, "Overall") if counts[name]}
    return found | {"fine": {name: sums[name] / counts[name] * 100 for name in (*kinds, "Overall")}}


def _official_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, Any]:
    """Means x 100 with one decimal, of one run of the judge."""
    grades = numbers(scores)
    counts = Counter(name for line in lines for name in capabilities(line))
    found: dict[str, Any] = {}
    for name, count in counts.most_common():
        of = [grade for line, grade in zip(lines, grades, strict=True) if name in capabilities(line)]
        found[name] = round(sum(of) / count * 100, 1)
    total = round(percent(scores), 1)
    return {**found, "total": total, "std": 0.0, "runs": [total]}


def _lmms_total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
    return {"overall": percent(scores), "n": len(scores)}


def _graded(grade: Callable[[Replies], float], total: Total) -> Protocol:
    return Protocol(lambda line: grade(Replies(line["judge_replies"])), total)


MMVET = Benchmark(
    name="mmvet",
    primary=VLMEVALKIT[0],
    keys={"capability": "text", "judge_replies": "texts, or []"},
    protocols={
        **dict.fromkeys(VLMEVALKIT, _graded(vlmevalkit_grade, _vlmevalkit_total)),
        "official": _graded(official_grade, _official_total),
        "lmms_eval": _graded(lmms_grade, _lmms_total),
    },
    totals=(*VLMEVALKIT, "official", "lmms_eval"),
    scale="0..100",
)
