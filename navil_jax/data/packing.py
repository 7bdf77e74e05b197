"""Which samples share a row, chosen among many that wait, and the iterator that hands out such rows.

A row has three budgets: visual slots, text slots and patch slots. Filling rows side by side in the order in which
samples come (as first-fit and best-fit packers do) ends as soon as one sample fits nowhere, and one huge image then
leaves all open rows half empty. Here some rows' worth of samples wait. Every row begins with the one that came first,
so that none waits long, and takes those that fill what is left best.
"""

import concurrent.futures
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from navil_jax.batch import BatchSpec, SampleFeatures
from navil_jax.data.features import Skipped, Usable
from navil_jax.data.quarantine import SampleWatch

SIZES = ("visual_tokens", "text_tokens", "patches")  # the features whose lengths are a sample's three sizes
MAX_WAITING = 2048  # samples, so that choosing is fast and their places stay small in a checkpoint
MOST_AHEAD = 16  # samples that few threads have ready; many hold one each
_UNIT = 1 << 16  # a whole budget in the integers that scores are made of, so that all machines choose alike
_TRIES = 8  # second samples that are tried
_GOOD = int(0.985 * _UNIT)  # of a budget: as much as this needs no other try


def sizes_of(features: SampleFeatures) -> tuple[int, int, int]:
    """Visual tokens, text tokens and patches of a sample."""
    visual, text, patches = (len(features[name]) for name in SIZES)
    return visual, text, patches


def choose_row(sizes: np.ndarray, budgets: np.ndarray) -> list[int]:
    """Which of the waiting samples share the next row.

    The first one always does. The others are taken one by one: of those that fit, the one whose sizes, as shares of the
    budgets, have the largest dot product with what is left (vector bin packing by dot products). If that leaves too
    much of the slots that the waiting samples need most, some other second samples are tried, and the fullest row wins.

    Args:
      sizes: [n, 3] integers, n > 0; each sample fits an empty row.
      budgets: [3] positive integers.

    Returns:
      Indices into `sizes`, in the order in which they were taken.

    Example: sizes (2 5 8), (3 3 12), (1 1 4), (1 4 4) and budgets (4 10 16) -> [0, 3, 2]
    """
    columns = np.ascontiguousarray(sizes.T)
    shares = columns * _UNIT // budgets[:, None]
    scarce = int(np.argmax(shares.sum(axis=1)))
    first, left = int(shares[scarce, 0]), budgets - sizes[0]
    others = 1 + np.flatnonzero(_fits(columns[:, 1:], left))
    others = others[np.argsort(-_scores(shares.take(others, axis=1), left, budgets), kind="stable")]
    columns, shares = columns.take(others, axis=1), shares.take(others, axis=1)
    best, most = [0], -1
    for second in range(len(others))[:: max(1, len(others) // _TRIES)][:_TRIES]:
        chosen = _complete(second, left, columns, shares, budgets)
        used = first + int(shares[scarce, chosen].sum())
        if used > most:
            best, most = [0, *others[chosen].tolist()], used
        if most >= _GOOD:
            break
    return best


def _complete(second: int, left: np.ndarray, columns: np.ndarray, shares: np.ndarray, budgets: np.ndarray) -> list[int]:
    """A candidate, and then the best fitting of the others one by one, until none fits; `columns`, `shares` [3, n]."""
    row, left = [second], left - columns[:, second]
    fits = _fits(columns, left)
    fits[second] = False
    candidates = np.flatnonzero(fits)
    while len(candidates):
        fitting = columns.take(candidates, axis=1)
        best = int(np.argmax(_scores(shares.take(candidates, axis=1), left, budgets)))
        row.append(int(candidates[best]))
        left = left - fitting[:, best]
        fits = _fits(fitting, left)
        fits[best] = False
        candidates = candidates[fits]
    return row


def _fits(columns: np.ndarray, left: np.ndarray) -> np.ndarray:
    """[n] bool, which of [3, n] sizes fit."""
    visual, text, patches = columns
    return (visual <= left[0]) & (text <= left[1]) & (patches <= left[2])


def _scores(shares: np.ndarray, left: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """[n], the dot products of [3, n] shares with what is left."""
    visual, text, patches = (left * _UNIT // budgets).tolist()
    return shares[0] * visual + shares[1] * text + shares[2] * patches


class SlotAdvice(NamedTuple):
    """Slots of a row that samples of one mixture fill alike."""

    visual_slots: int
    text_slots: int
    patch_slots: int


def advise_slots(sizes: np.ndarray, patch_slots: int, keep: float = 1.0, multiple: int = 128) -> SlotAdvice:
    """Visual and text slots in the proportion in which a mixture needs them beside given patch slots.

    Args:
      sizes: [n, 3] integers, visual tokens, text tokens and patches of samples of the mixture; some hundred say enough.
      patch_slots: of a row, a multiple of the patches of a merged unit.
      keep: share of the samples that shall fit each kind of slots; a few very long ones can cost all rows much padding.
      multiple: of which the slots shall be multiples (TPUs like 128).

    Example: means 500 100 2000 and 24,576 patch slots -> 6,144 visual and 1,280 text slots
    """
    means, needed = sizes.mean(axis=0), np.quantile(sizes, keep, axis=0, method="higher")
    rows = patch_slots / max(means[2], 1)

    def slots(kind: int) -> int:
        return max(1, -(-int(max(rows * means[kind], needed[kind])) // multiple)) * multiple

    return SlotAdvice(slots(0), slots(1), max(patch_slots, int(needed[2])))


def best_fill(sizes: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """The share of each budget that no packer can exceed: all are filled at the pace of the scarcest. [3] float64

    Example: means 500 100 2000 and budgets 8192 8192 24576 -> 0.75 0.15 1.0
    """
    need = sizes.mean(axis=0) / budgets
    return need / need.max()


class PackedRows(grain.IterDataset[list[SampleFeatures]]):
    """Rows of whole samples, each sample exactly once.

    Args:
      samples: random access, so that the state of an iterator is the places of the samples that wait, not their arrays.
      bins: rows' worth of samples that wait.
      threads: that read; 0 reads in the caller's.
      watch: is told of every sample.
    """

    def __init__(
        self,
        samples: grain.MapDataset[Usable | Skipped],
        spec: BatchSpec,
        bins: int,
        threads: int,
        watch: SampleWatch,
    ) -> None:
        super().__init__()
        self._samples, self._bins, self._threads, self._watch = samples, bins, threads, watch
        self._budgets = np.array([spec.budgets[name] for name in SIZES], np.int64)

    def __iter__(self) -> "PackedRowsIterator":
        return PackedRowsIterator(self._samples, self._budgets, self._bins, self._threads, self._watch)


class PackedRowsIterator(grain.DatasetIterator[list[SampleFeatures]]):
    """See `PackedRows`. Its state: the reader's place, the places of the samples that wait, and counts of samples."""

    def __init__(
        self,
        samples: grain.MapDataset[Usable | Skipped],
        budgets: np.ndarray,
        bins: int,
        threads: int,
        watch: SampleWatch,
    ) -> None:
        ahead = max(threads, min(4 * threads, MOST_AHEAD))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        super().__init__(iter(samples.to_iter_dataset(options)))
        self._samples, self._threads, self._watch = samples, threads, watch
        self._budgets, self._enough = budgets, bins * budgets
        self._waiting: dict[int, SampleFeatures] = {}  # by place in `samples`, in the order of reading
        self._sizes = np.zeros((0, 3), np.int64)  # of those
        self._unread: list[int] = []  # places of a restored state whose samples were not read again yet
        self._counts: Counter[str] = Counter()

    def __next__(self) -> list[SampleFeatures]:
        self._read_again()
        self._fill()
        if not self._waiting:
            raise StopIteration
        places, chosen = list(self._waiting), choose_row(self._sizes, self._budgets)
        self._sizes = np.delete(self._sizes, chosen, axis=0)
        return [self._waiting.pop(places[number]) for number in chosen]

    def _fill(self) -> None:
        """Reads until enough samples wait."""
        added: list[tuple[int, int, int]] = []
        total, enough = self._sizes.sum(axis=0).tolist(), self._enough.tolist()
        while len(self._waiting) < MAX_WAITING and all(map(operator.lt, total, enough)):
            place = self._parent.get_state()["next_index"]
            try:
                sample = next(self._parent)
            except StopIteration:
                break
            self._watch.note(sample, self._counts)
            if isinstance(sample, Usable):
                self._waiting[place] = sample.features
                added.append(sizes_of(sample.features))
                total = list(map(operator.add, total, added[-1]))
        if added:
            self._sizes = np.concatenate([self._sizes, np.array(added, np.int64)])

    def _read_again(self) -> None:
        if not self._unread:
            return
        with concurrent.futures.ThreadPoolExecutor(max(1, self._threads)) as pool:
            found = list(pool.map(self._samples.__getitem__, self._unread))
        for place, sample in zip(self._unread, found, strict=True):
            if isinstance(sample, Usable):
                self._waiting[place] = sample.features
            else:  # the data have changed since
                self._watch.note(sample, self._counts)
        self._sizes = np.array([sizes_of(features) for features in self._waiting.values()], np.int64).reshape(-1, 3)
        self._unread = []

    def get_state(self) -> dict[str, Any]:
        waiting = [*self._waiting, *self._unread]
        return {"reader": self._parent.get_state(), "waiting": waiting, "counts": dict(self._counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["reader"])
        self._waiting, self._unread = {}, list(state["waiting"])
        self._sizes = np.zeros((0, 3), np.int64)
        self._counts = Counter(state["counts"])


def counts_of(state: Mapping[str, Any]) -> dict[str, int]:
    """The counts in the state of an iterator that stands anywhere behind `PackedRows`."""
    while "counts" not in state:
        state = state["parent"]
    return dict(state["counts"])
