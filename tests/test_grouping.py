"""Rows of like cost meet in a step: every row once, in an order that all processes share, resumable anywhere."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import grain
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from made_sources import TOKENIZER, MadeSource, assert_equal, config, made, samples_of
from tiny import tiny_model

from navil_jax.data.grouping import GroupedRows, attention_cost, group_rows, row_cost
from navil_jax.data.pipeline import make_dataset
from navil_jax.data.streams import sample_counts

Row = list[dict[str, np.ndarray]]


class CountedRows(grain.IterDataset[Row]):
    """Rows that hold their number, as `PackedRows` hands them out."""

    def __init__(self, count: int = 10**6):
        super().__init__()
        self._count = count

    def __iter__(self) -> "CountedIterator":
        return CountedIterator(self._count)


class CountedIterator(grain.DatasetIterator[Row]):
    def __init__(self, count: int):
        super().__init__()
        self._count, self._next = count, 0

    def __next__(self) -> Row:
        if self._next == self._count:
            raise StopIteration
        self._next += 1
        return [{"number": np.array(self._next - 1)}]

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "counts": {"made/good": self._next}}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def cost(row: Row) -> int:
    """Some order that has nothing to do with the numbers."""
    return hash((int(row[0]["number"]), 7)) % 1000


def grouped(rows: int, steps: int, count: int = 10**6, seed: int = 0) -> Iterator[Row]:
    return iter(GroupedRows(CountedRows(count), rows, steps, seed, cost))


def take(iterator: Iterator[Row], count: int) -> list[int]:
    return [int(next(iterator)[0]["number"]) for _ in range(count)]


@hypothesis.given(costs=st.lists(st.integers(0, 50), min_size=1, max_size=40), rows=st.integers(1, 5))
def test_steps_are_slices_of_the_sorted_rows(costs: list[int], rows: int):
    order = group_rows(costs, rows, np.random.default_rng(0))
    assert sorted(order) == list(range(len(costs)))
    whole = [order[first : first + rows] for first in range(0, len(order), rows)] if len(costs) % rows == 0 else []
    ranges = sorted((min(costs[n] for n in step), max(costs[n] for n in step)) for step in whole)
    assert all(above[0] >= below[1] for below, above in itertools.pairwise(ranges))
    assert all(step == sorted(step) for step in whole)


def test_one_step_keeps_the_order():
    assert take(grouped(3, 1), 12) == list(range(12))


def test_every_row_once_and_the_rest_at_the_end():
    iterator = grouped(2, 4, count=21)
    assert sorted(take(iterator, 21)) == list(range(21))
    with pytest.raises(StopIteration):
        next(iterator)


def test_processes_draw_the_same_order_and_another_in_every_window():
    """The place of the heaviest step in its window is that of all processes; windows differ."""
    first, second = (
        [float(np.mean([cost([{"number": n}]) for n in take(iterator, 2)])) for _ in range(40)]
        for iterator in (grouped(2, 8), iter(GroupedRows(CountedRows(), 2, 8, 0, lambda row: cost(row) * 3 + 1)))
    )
    order = [np.argsort(first[start : start + 8]).tolist() for start in range(0, 40, 8)]
    assert order == [np.argsort(second[start : start + 8]).tolist() for start in range(0, 40, 8)]
    assert len({tuple(one) for one in order}) > 1


@hypothesis.settings(deadline=None)
@hypothesis.given(cut=st.integers(0, 40), steps=st.integers(1, 6), after=st.integers(1, 6))
def test_resumed_anywhere_also_with_another_window(cut: int, steps: int, after: int):
    """The same window gives the same rows; another one begins when the window that was cut is used up."""
    iterator = grouped(2, steps)
    given = take(iterator, cut)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = grouped(2, after)
    resumed.set_state(state)
    if after == steps:
        assert resumed.get_state() == state
        assert take(resumed, 30) == take(iterator, 30)
        assert resumed.get_state() == iterator.get_state()
    else:
        rest = take(resumed, 120 - cut)
        assert len(set(given + rest)) == 120
        assert max(given + rest) < 120 + 2 * max(steps, after)


def test_cost_by_hand():
    model = tiny_model()
    model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, depth=3, width=16))
    assert attention_cost(model, (4, 8), (2, 3)) == 3 * 16 * (16 + 64) + 2 * 4 * 8 * (3 + 6)
    sample = {"visual_tokens": np.zeros(2), "text_tokens": np.zeros(1), "patch_blocks": np.array([1] * 4 + [2] * 8)}
    text = {"visual_tokens": np.zeros(0), "text_tokens": np.zeros(2), "patch_blocks": np.zeros(0, np.int32)}
    assert row_cost(model, [sample, text]) == attention_cost(model, (4, 8), (3, 2))
    assert attention_cost(dataclasses.replace(model, vision=None), (), (2,)) == 2 * 4 * 8 * 3


def images(number: int) -> MadeSource:
    """One in four is large."""
    return MadeSource(tuple((90, 90, 5) if index % 4 == 0 else (24, 24, 5) for index in range(number)))


def test_batches_resume_inside_a_window():
    settings = config(balance_window=3)
    iterator = iter(make_dataset(settings, [made(40)], TOKENIZER))
    for _ in range(4):
        next(iterator)
    state, counts = json.loads(json.dumps(iterator.get_state())), sample_counts(iterator)
    resumed = iter(make_dataset(settings, [made(40)], TOKENIZER))
    resumed.set_state(state)
    assert sample_counts(resumed) == counts
    for _ in range(7):
        assert_equal(next(resumed), next(iterator))
    assert sample_counts(resumed) == sample_counts(iterator)


def test_processes_of_a_step_get_alike_rows():
    """Patches squared of the rows of two processes: nearer to each other with windows of eight steps than without."""

    def costs(steps: int) -> np.ndarray:
        settings = config(balance_window=steps, packing_lookahead=1)
        found = []
        for process in range(2):
            iterator = iter(make_dataset(settings, [images(400)], TOKENIZER, process, 2))
            batches = [next(iterator) for _ in range(32)]
            found.append([float(np.square(np.bincount(batch.patch_blocks[0])[1:]).sum()) for batch in batches])
        return np.array(found)

    apart, near = costs(1), costs(8)
    np.testing.assert_allclose(np.sort(apart, axis=None).sum(), near.sum(), rtol=0.2)
    assert np.abs(near[0] - near[1]).mean() < 0.6 * np.abs(apart[0] - apart[1]).mean()


def test_grouping_loses_and_repeats_no_sample():
    iterator = iter(make_dataset(config(balance_window=4, packing_lookahead=2), [images(300)], TOKENIZER))
    names = [name for _ in range(16) for name in samples_of(next(iterator))]
    assert len(names) == len(set(names))
