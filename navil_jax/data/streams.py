"""Logical streams: the data of a run in a fixed number of shares, however many hosts read them.

A run keeps its number of streams from its first step to its last. Each stream has its own share of every source, packs
its own rows and groups them by cost, and gives the same number of rows to every step: of R rows and S streams, stream s
gives rows s R/S to (s + 1) R/S - 1 of the global batch. A host serves S/P streams side by side, those of the rows that
it holds, so a step's rows, and their order, do not depend on the number P of hosts.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from navil_jax.batch import SampleFeatures
from navil_jax.config import Config
from navil_jax.data.packing import counts_of
from navil_jax.errors import UserError

Row = list[SampleFeatures]


def with_streams(config: Config, hosts: int, saved: int = 0) -> Config:
    """The config with the number of streams that the run has.

    Args:
      hosts: processes that serve the streams now.
      saved: streams of the run that goes on; 0: it begins, with one a host unless `data.streams` says more.

    Raises:
      UserError: as `streams_of`.
    """
    streams = config.data.streams or saved or hosts
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, streams=streams))
    streams_of(config, 0, hosts)
    return config


def streams_of(config: Config, host: int, hosts: int) -> range:
    """The streams that one of the hosts serves.

    Args:
      host: its number in the order of the rows that the hosts hold (`sharding.row_place`).

    Raises:
      UserError: the streams do not divide by the hosts, or the rows not by the streams; names the numbers that do.
    """
    rows, streams = config.data.rows, config.data.streams or hosts
    if rows % streams:
        raise UserError(
            f"config.data.rows: {rows} rows do not divide by {streams} streams of data (one a process, where "
            f"config.data.streams is 0); take {_listed(divisors(rows))}"
        )
    if streams % hosts:
        raise UserError(
            f"config.data.streams: {hosts} processes cannot share the {streams} streams of data of this run alike; go "
            f"on with {_listed(divisors(streams))} of them, or begin a run with more streams"
        )
    each = streams // hosts
    return range(host * each, (host + 1) * each)


def divisors(number: int) -> list[int]:
    """Example: 6 -> [1, 2, 3, 6]"""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: Sequence[int]) -> str:
    """Example: [1, 2, 4] -> "1, 2 or 4" """
    return " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


class Steps(grain.IterDataset[list[Row]]):
    """The rows that one host gives to each step: those of its streams, one stream after the other.

    Args:
      streams: number of a stream -> its rows.
      rows: of each stream in a step.
      count: streams of the run, of this host and of others.
    """

    def __init__(self, streams: Mapping[int, grain.IterDataset[Row]], rows: int, count: int):
        super().__init__()
        self._streams, self._rows, self._count = streams, rows, count

    def __iter__(self) -> "StepsIterator":
        return StepsIterator(
            {number: iter(stream) for number, stream in self._streams.items()}, self._rows, self._count
        )


class StepsIterator(grain.DatasetIterator[list[Row]]):
    """See `Steps`. Its state: that of each stream, which is the same whoever serves it."""

    def __init__(self, streams: Mapping[int, grain.DatasetIterator[Row]], rows: int, count: int):
        super().__init__(tuple(streams.values()))
        self._streams, self._rows, self._count = streams, rows, count

    def __next__(self) -> list[Row]:
        return [next(stream) for stream in self._streams.values() for _ in range(self._rows)]

    def get_state(self) -> dict[str, Any]:
        return {"count": self._count, "streams": {str(n): stream.get_state() for n, stream in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["count"] != self._count:
            raise ValueError(f"the state of {state['count']} streams does not fit {self._count}")
        for number, stream in self._streams.items():
            stream.set_state(state["streams"][str(number)])


def sample_counts(iterator: grain.DatasetIterator) -> dict[str, int]:
    """How many samples the streams of this host have read so far: `<source>/good`, `/resized` (part of the good ones),
    `/too_long` and `/bad`, where there are any.

    They are a part of a stream's state, so a resumed run counts on.
    """
    counts = (Counter(counts_of(state)) for state in iterator.get_state()["streams"].values())
    return dict(sum(counts, Counter()))
