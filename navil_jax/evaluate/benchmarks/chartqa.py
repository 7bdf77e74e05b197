"""ChartQA: relaxed accuracy, a number may be off by 5%; of which of the two numbers is where the codes differ."""

from collections.abc import Callable, Sequence

from navil_jax.evaluate.benchmarks.scoring import (
    Benchmark,
    Line,
    Protocol,
    Score,
    Total,
    grouped,
    numpy_percent,
    parsed,
    percent,
)

TOLERANCE = 0.05
HUMAN, AUGMENTED = "human_test", "augmented_test"


def number_of(text: str) -> float | None:
    """Example: "12%" -> 0.12;  "1e3" -> 1000.0;  "$5" -> None"""
    if text.endswith("%"):
        value = parsed(float, text.rstrip("%"))
        return None if value is None else value / 100
    return parsed(float, text)


def is_near(text: str, reference: str) -> bool:
    """Whether a number is within 5% of the reference, or texts are the same in lower case; a reference of 0 is text."""
    value, base = number_of(text), number_of(reference)
    if value is None or not base:
        return text.lower() == reference.lower()
    return abs(value - base) / abs(base) <= TOLERANCE


def of_answer(prediction: str, answer: str) -> bool:
    """Within 5% of the answer, as the metric is meant."""
    return is_near(prediction, answer)


def of_prediction(prediction: str, answer: str) -> bool:
    """Within 5% of the prediction: InternVL, and VLMEvalKit of May 2025, hand the arguments over swapped."""
    return is_near(answer, prediction)


def _scorer(is_right: Callable[[str, str], bool], total: Total) -> Protocol:
    def score(line: Line) -> Score:
        return float(is_right(line["prediction"].strip(), line["answer"]))

    return Protocol(score, total)


def _splits(mean: Callable[[Sequence[Score]], float], names: dict[str, str], both: str, overall: str) -> Total:
    """Means of the splits, the mean of both and the mean of all lines, under their names ("": not printed)."""

    def total(lines: Sequence[Line], scores: Sequence[Score]) -> dict[str, float]:
        groups = grouped(lines, scores, lambda line: line.get("type"))
        found = {printed: mean(groups[split]) for split, printed in names.items() if split in groups}
        if both and len(found) == len(names):
            found[both] = sum(found.values()) / len(found)
        return found | {overall: mean(scores)}

    return total


SPLITS = {HUMAN: HUMAN, AUGMENTED: AUGMENTED}
LMMS = {HUMAN: "relaxed_human_split", AUGMENTED: "relaxed_augmented_split"}
_VLMEVALKIT = _splits(numpy_percent, SPLITS, "", "overall")
CHARTQA = Benchmark(
    name="chartqa",
    primary="internvl",
    keys={"answer": "text"},
    optional={"type": "text"},
    protocols={
        "vlmevalkit_2505": _scorer(of_prediction, _VLMEVALKIT),
        "vlmevalkit_head": _scorer(of_answer, _VLMEVALKIT),
        "internvl": _scorer(of_prediction, _splits(percent, SPLITS, "mean_of_both", "overall")),
        "lmms_eval": _scorer(of_answer, _splits(percent, LMMS, "", "relaxed_overall")),
    },
    totals=("vlmevalkit_2505", "vlmevalkit_head", "internvl", "lmms_eval"),
    scale="0..100",
)
