"""What all scorers share: a line, its score, what a judge says of it, and the record that describes a benchmark."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Line = Mapping[str, Any]  # a question with its answers and the model's `prediction`
# A number; "random" where the reference code draws by chance; "error:X" where it raises X.
Score = float | str
Scorer = Callable[[Line], Score]
Total = Callable[[Sequence[Line], Sequence[Score]], Any]

RANDOM = "random"
API_FAILURE = "Failed to obtain answer via API"  # what the toolkits hand on when their judge cannot be reached
VLMEVALKIT = ("vlmevalkit_2505", "vlmevalkit_head")  # May 2025, the time of the paper, and August 2026


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One reference implementation: how it scores a line, and how it makes a total of scores.

    Attributes:
      total: of lines and scores; those of "random" are left out, "error:X" counts 0 unless the code leaves it out.
    """

    score: Scorer
    total: Total


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: what its lines hold, and how each reference implementation scores them.

    Attributes:
      name: as in `--benchmark`.
      primary: the protocol that reports of the InternVL family use; its totals are compared with the paper's.
      keys: what a line must hold, beside `id` and `prediction` -> what that is, a key of `KINDS`.
      protocols: by name, of scores.
      totals: names of the protocols whose totals a report shows.
      scale: unit of the total.
      expected: the score of a line by the primary protocol, with the judge's replies where a line has them, and by a
        near relative where the primary code raises.
      extras: further totals of a report, of lines and expected scores.
      aliases: other names of protocols.
      optional: as `keys`, for what may be missing or null.
      also: more `keys` that a line needs, as it has these.
      left_out: whether totals leave a line out, which a report counts.
    """

    name: str
    primary: str
    keys: Mapping[str, str]
    protocols: Mapping[str, Protocol]
    scale: str
    expected: Scorer | None = None
    extras: Callable[[Sequence[Line], Sequence[Score]], dict[str, Any]] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    totals: tuple[str, ...] = ()
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    also: Callable[[Line], Mapping[str, str]] = lambda line: {}
    left_out: Callable[[Line], bool] = lambda line: False

    def expect(self, line: Line) -> Score:
        """The score of a line where no protocol is named."""
        return (self.expected or self.protocols[self.primary].score)(line)

    def protocol(self, name: str) -> str:
        """The full name of a protocol. Raises KeyError."""
        name = {"vlmevalkit": VLMEVALKIT[0], **self.aliases}.get(name, name)
        if name not in self.protocols:
            raise KeyError(name)
        return name


class Replies:
    """What a judge answers to one question, call after call.

    Args:
      replies: what it has said, of which the last answer repeats, and none is a judge that fails; or what asks it, from
        the number of the call, from 1.
    """

    def __init__(self, replies: Sequence[str] | Callable[[int], str | None]) -> None:
        self._replies, self._calls = replies, 0

    def __call__(self) -> str | None:
        self._calls += 1
        if callable(self._replies):
            return self._replies(self._calls)
        return self._replies[min(self._calls, len(self._replies)) - 1] if self._replies else None


def numbers(scores: Sequence[Score]) -> list[float]:
    """Scores with 0 for a line at which the reference code raises; without those that are drawn by chance."""
    return [0.0 if isinstance(score, str) else float(score) for score in scores if score != RANDOM]


def percent(scores: Sequence[Score]) -> float:
    """100 times the mean of the sum, as loops compute it."""
    values = numbers(scores)
    return sum(values) / len(values) * 100 if values else 0.0


def numpy_percent(scores: Sequence[Score]) -> float:
    """100 times the mean, as NumPy and pandas compute it: other last digits than `percent`."""
    values = numbers(scores)
    return float(np.mean(values)) * 100 if values else 0.0


def grouped(lines: Sequence[Line], scores: Sequence[Score], key: Callable[[Line], Any]) -> dict[Any, list[Score]]:
    """Scores by a property of their lines, in order of first appearance."""
    groups: dict[Any, list[Score]] = {}
    for line, score in zip(lines, scores, strict=True):
        groups.setdefault(key(line), []).append(score)
    return groups


_HEADLINES = ("mean_of_both", "Final Score", "sum", "Overall", "overall", "relaxed_overall", "accuracy", "total")


def headline(total: Any) -> float:
    """The number of a total that papers print: 0..100, of 2800 for MME, of 1000 for OCRBench."""
    if not isinstance(total, Mapping):
        return float(total)
    if "final_over_1000" in total:
        return float(total["final_over_1000"]) * 1000
    found = total if "num" in total else total[next(key for key in _HEADLINES if key in total)]
    if isinstance(found, Mapping):
        return float(found["acc"]) * (100 if "num" in found else 1)  # with `num`, codes print shares
    return float(found)


def plain(compute: Callable[[Sequence[Score]], Any]) -> Total:
    """A total of the scores alone."""
    return lambda lines, scores: compute(scores)


def overall(scores: Sequence[Score]) -> dict[str, float]:
    """The table of VLMEvalKit where lines have no category."""
    return {"Overall": numpy_percent(scores)}


def letters(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Example: ["cat", "dog"] -> {"A": "cat", "B": "dog"};  {"A": "cat", "C": "dog"}, as B is missing, stays"""
    if isinstance(options, Mapping):
        return dict(options)
    return {chr(ord("A") + number): option for number, option in enumerate(options)}


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(right) + 1))
    for i, one in enumerate(left, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def parsed(convert: Callable[[str], float], text: str) -> float | None:
    """A number that Python reads in a text, or None."""
    try:
        return convert(text)
    except ValueError:
        return None
