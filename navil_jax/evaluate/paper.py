"""The paper's table of the benchmarks, and its averages."""

from collections.abc import Mapping, Sequence

_SEVEN = ("mmvet", "mmmu", "mmbench", "mme", "mathvista", "ocrbench", "ccbench")
_OTHERS = ("textvqa", "scienceqa", "gqa", "docvqa", "ai2d", "chartqa", "infovqa")
_2B = (78.3, 41.8, 71.2, 1822, 50.0, 796, 83.9, 76.9, 95.0, 59.8, 85.4, 74.6, 78.0, 56.0)
_9B = (79.6, 54.7, 76.5, 2225, 66.7, 837, None, 77.2, None, None, 90.6, 82.4, 85.4, 70.2)


def _figures(values: Sequence[float | None]) -> dict[str, float]:
    named = zip((*_SEVEN, *_OTHERS), values, strict=True)
    return {name: float(value) for name, value in named if value is not None}


FIGURES: Mapping[str, Mapping[str, float]] = {"NaViL-2B": _figures(_2B), "NaViL-9B": _figures(_9B)}
FULL_SCORES = {"mme": 2800.0, "ocrbench": 1000.0}  # of those whose scale is not 0..100
AVERAGES: Mapping[str, Sequence[str]] = {
    "first seven": _SEVEN,
    "last seven": _OTHERS,
    "eleven of both models": tuple(FIGURES["NaViL-9B"]),
}


def average(scores: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Mean of scores on the scale 0..100; None if one of them is missing."""
    if any(name not in scores for name in names):
        return None
    return sum(100 * scores[name] / FULL_SCORES.get(name, 100) for name in names) / len(names)
