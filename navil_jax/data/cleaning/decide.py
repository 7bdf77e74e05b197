"""The steps in their order: which samples to leave out, by which rule, and for which other sample."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from navil_jax.data.cleaning.compare import Compare
from navil_jax.data.cleaning.near import PARTITION, is_near, mixed, resolve
from navil_jax.data.cleaning.rules import LIMITS, judge
from navil_jax.data.cleaning.settings import Settings

Columns = Mapping[str, np.ndarray]
# Rule -> its step, in the order in which they are applied.
RULES = {
    "unreadable": "unreadable",
    **{limit.name: limit.step for limit in LIMITS},
    "benchmark_question": "benchmarks",
    "benchmark_image": "benchmarks",
    "exact": "exact",
    "near": "near",
    "sampling": "sampling",
}
_CODES = {name: number for number, name in enumerate(RULES, 1)}


@dataclasses.dataclass
class Verdicts:
    """What is left out of all sources, one behind the other."""

    codes: np.ndarray  # [n] uint8, 1 + place in RULES of the rule that leaves the sample out; 0: it stays
    pairs: dict[str, np.ndarray]  # rule -> [m, 2] int64, (sample, the other one that it repeats), by ascending sample
    uncompared: int = 0  # samples of crowded buckets that were not compared with all others there

    @classmethod
    def of(cls, samples: int) -> "Verdicts":
        return cls(np.zeros(samples, np.uint8), {})

    def leave_out(self, rule: str, rows: np.ndarray, others: np.ndarray | None = None) -> None:
        """Args: rows: [m], those that are out already stay with their rule; others: [m], what they repeat."""
        free = self.codes[rows] == 0
        self.codes[rows[free]] = _CODES[rule]
        if others is not None:
            self.pairs[rule] = np.stack([rows, others], axis=1)[free]

    def staying(self) -> np.ndarray:
        """[m] int64, ascending."""
        return np.flatnonzero(self.codes == 0)

    def left_out(self, rule: str, rows: slice = slice(None)) -> np.ndarray:
        """[m] int64, what a rule leaves out, ascending; rows: counts from their start."""
        return np.flatnonzero(self.codes[rows] == _CODES[rule])


def rule_of(code: int) -> str:
    return list(RULES)[code - 1]


def decide(
    columns: Columns,
    bounds: Sequence[int],
    references: int,
    settings: Settings,
    off: frozenset[str],
    keep: Mapping[int, float],
    compare: Compare,
) -> Verdicts:
    """Judges all samples. The result depends on neither processes nor the order in which they end.

    Args:
      columns: of the sources, and then of `references` samples of benchmarks.
      bounds: where each source begins, and the end of the last.
      off: rules and steps that are not applied.
      keep: number of a source -> samples to keep of it; below 1: the share of them.
    """
    verdicts = Verdicts.of(bounds[-1])
    for rule, rows in judge(columns, bounds[-1], settings, off):
        verdicts.leave_out(rule, rows)
    bad = columns["bad"][: bounds[-1]]
    if references and "benchmarks" not in off:
        _benchmarks(columns, verdicts, references, off, compare)
    if "exact" not in off:
        rows = verdicts.staying()
        pairs = _equal(columns["content"], rows[~bad[rows]])
        verdicts.leave_out("exact", pairs[:, 1], pairs[:, 0])
    if "near" not in off:
        rows = verdicts.staying()
        kinds = ("image", "caption") if settings.pair == "either" else (settings.pair,)
        found = compare(rows[~bad[rows]], kinds)
        pairs = resolve(found.packed, functools.partial(_near_in_any, columns, settings, kinds))
        verdicts.leave_out("near", pairs[:, 0], pairs[:, 1])
        verdicts.uncompared += found.uncompared
    if "sampling" not in off:
        for source, wanted in keep.items():
            rows = verdicts.staying()
            own = rows[(rows >= bounds[source]) & (rows < bounds[source + 1])]
            verdicts.leave_out("sampling", _surplus(columns["content"][own], own, wanted))
    return verdicts


def _benchmarks(columns: Columns, verdicts: Verdicts, references: int, off: frozenset[str], compare: Compare) -> None:
    begin = len(verdicts.codes)
    if "benchmark_question" not in off:
        rows = np.flatnonzero(columns["question"][:begin])
        verdicts.leave_out("benchmark_question", rows, begin + columns["question"][rows].astype(np.int64) - 1)
    if "benchmark_image" not in off:
        found = compare(verdicts.staying(), ("image",), (begin, begin + references))
        # The first sample of a pair is the lower one everywhere but here, where it is the reference.
        rows, first = np.unique(found.packed >> np.uint64(32), return_index=True)
        others = found.packed[first] & np.uint64(2**32 - 1)
        verdicts.leave_out("benchmark_image", rows.astype(np.int64), others.astype(np.int64))
        verdicts.uncompared += found.uncompared


def _equal(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(first, other) samples of one key, by ascending other; so many keys at a time as fit into memory. [m, 2]"""
    partitions = max(1, -(-len(rows) // PARTITION))
    found = []
    for partition in range(partitions):
        own = rows[keys[rows] % np.uint64(partitions) == partition]
        order = np.argsort(keys[own], kind="stable")
        ordered, sorted_rows = keys[own][order], own[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        first = np.searchsorted(ordered, ordered[again])
        found.append(np.stack([sorted_rows[first], sorted_rows[again]], axis=1))
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return pairs[np.argsort(pairs[:, 1])]


def _near_in_any(
    columns: Columns, settings: Settings, kinds: Sequence[str], a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    return np.any([is_near(columns, settings, kind, a, b) for kind in kinds], axis=0)


def _surplus(content: np.ndarray, rows: np.ndarray, wanted: float) -> np.ndarray:
    """What a source has beyond the samples to keep: those with the largest hashes of their content. Ascending."""
    hashes = mixed(content)
    if wanted < 1:
        return rows[hashes >= np.uint64(wanted * 2**64)]
    return np.sort(rows[np.lexsort((rows, hashes))[int(wanted) :]])
