"""The order of packed rows: those that meet in one step cost about the same.

Rows hold equally many slots, but attention costs the squares of what shares a row: one with an image of 24,000 patches
takes some times as long as one with many small images. All devices of a step wait for the slowest one. So some steps'
worth of rows are packed, sorted by the cost of their attention and cut into steps, whose order is drawn. Every stream
does so with its own rows and draws the same order, so that heavy rows meet heavy ones, without a word between hosts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from navil_jax.batch import SampleFeatures
from navil_jax.config import ModelConfig
from navil_jax.data.packing import counts_of

Row = list[SampleFeatures]


def attention_cost(model: ModelConfig, scales: Sequence[int], samples: Sequence[int]) -> int:
    """Multiplications of the attention scores of a row, were all layers full ones.

    Args:
      scales: patches of every scale of the row's images.
      samples: tokens of every sample of the row.
    """
    decoder, vision = model.decoder, model.vision
    pairs = sum(length * (length + 1) // 2 for length in samples)
    cost = decoder.depth * decoder.num_heads * decoder.head_dim * pairs
    if vision:
        cost += vision.depth * vision.width * sum(patches**2 for patches in scales)
    return int(cost)


def row_cost(model: ModelConfig, row: Row) -> int:
    """`attention_cost` of a packed row."""
    scales = [size for sample in row for size in np.bincount(sample["patch_blocks"])[1:].tolist()]
    return attention_cost(model, scales, [len(sample["visual_tokens"]) + len(sample["text_tokens"]) for sample in row])


def group_rows(costs: Sequence[int], rows: int, rng: np.random.Generator) -> list[int]:
    """The order in which rows of these costs are handed out, `rows` of them a step.

    The order of the rows of one step is that in which they came.

    Example: costs 5 1 4 2, two rows a step -> 1 3 | 0 2 or 0 2 | 1 3
    """
    order = np.argsort(costs, kind="stable").tolist()
    steps = [sorted(order[first : first + rows]) for first in range(0, len(order), rows)]
    return [number for step in rng.permutation(len(steps)) for number in steps[step]]


class GroupedRows(grain.IterDataset[Row]):
    """Rows, each exactly once, in the order of `group_rows`.

    Args:
      packed: `packing.PackedRows`.
      rows: of this stream in a step.
      steps: whose rows are grouped together; 1 keeps the order in which they are packed.
      seed: of the order of steps; the same in all streams.
      cost: of a row.
    """

    def __init__(self, packed: grain.IterDataset[Row], rows: int, steps: int, seed: int, cost: Callable[[Row], int]):
        super().__init__()
        self._packed, self._rows, self._steps, self._seed, self._cost = packed, rows, steps, seed, cost

    def __iter__(self) -> "GroupedRowsIterator":
        return GroupedRowsIterator(iter(self._packed), self._rows, self._steps, self._seed, self._cost)


class GroupedRowsIterator(grain.DatasetIterator[Row]):
    """See `GroupedRows`. Its state: where the window of steps begins, how many of its rows were given, and counts."""

    def __init__(
        self, packed: grain.DatasetIterator[Row], rows: int, steps: int, seed: int, cost: Callable[[Row], int]
    ):
        super().__init__(packed)
        self._rows, self._steps, self._seed, self._cost = rows, steps, seed, cost
        self._window: list[Row] | None = None  # None: is to be read
        self._start, self._number, self._given, self._size = packed.get_state(), 0, 0, rows * steps
        self._counts = counts_of(self._start)

    def __next__(self) -> Row:
        if self._window is not None and self._given == len(self._window):
            self._window, self._number, self._given, self._size = None, self._number + 1, 0, self._rows * self._steps
        if self._window is None:
            self._read()
        if not self._window:
            raise StopIteration
        self._given += 1
        return self._window[self._given - 1]

    def _read(self) -> None:
        self._start = self._parent.get_state()
        found = list(itertools.islice(self._parent, self._size))
        rng = np.random.default_rng((self._seed, self._number))
        self._window = [found[place] for place in group_rows([self._cost(row) for row in found], self._rows, rng)]
        self._counts = counts_of(self._parent.get_state())

    def get_state(self) -> dict[str, Any]:
        if self._window is not None and self._given == len(self._window):  # the next window begins where this one ends
            place = {"parent": self._parent.get_state(), "number": self._number + 1, "given": 0}
            return place | {"size": self._rows * self._steps, "counts": self._counts}
        place = {"parent": self._start, "number": self._number, "given": self._given}
        return place | {"size": self._size, "counts": self._counts}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start, self._number, self._given = state["parent"], state["number"], state["given"]
        self._size, self._counts = state["size"], dict(state["counts"])
        self._parent.set_state(self._start)
        self._window = None
        if not self._given:  # nothing was taken from it, so that it may be of another size
            self._size = self._rows * self._steps
