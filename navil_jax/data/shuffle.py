"""Global shuffle of samples over shards, as a sort by random keys in tasks that read long ranges of files.

Every sample has a random key of 64 bits, made of the seed and its index, and no two have the same: sorted by key the
samples are shuffled. The first of S shards holds the lowest S-th of all keys, and so on. Three jobs sort them:

1. read: task n reads the n-th stretch of the source and writes a run, a file of its records sorted by key.
2. regroup, for more than `FAN` shards: a group is `FAN` shards that follow each other; for each group, the records of
   `FAN` runs at a time are merged into one run of the group.
3. write: a task for each shard merges its records, a range of each run, which is all runs or those of its group.

So a task opens about `FAN` files and holds about a shard's samples, on the local disk, and a record is read from the
source once, in the source's order.
"""

import dataclasses
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from navil_jax.data.formats import files
from navil_jax.data.formats.array_record import shard_name, write_shard
from navil_jax.data.packed import Tally, packed, read_tally, stretch
from navil_jax.data.sample import Source

FAN = 256
_KEYS = 1 << 64
_ODD = 0x9E3779B97F4A7C15
_RECORD = struct.Struct("<QI")  # before a record: its key, its bytes
_OFFSET = struct.Struct("<Q")  # at a run's start: where its ranges begin, and the last one ends


def sort_key(seed: int, index: int) -> int:
    """A random number below 2**64 (SplitMix64); of one seed, no two indices below 2**64 have the same."""
    return _mixed(_mixed(seed) + index * _ODD)


def _mixed(value: int) -> int:
    value = (value + _ODD) % _KEYS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % _KEYS
    value = (value ^ value >> 27) * 0x94D049BB133111EB % _KEYS
    return value ^ value >> 31


def lowest_key(shards: int, number: int) -> int:
    """The lowest key of a shard; of number `shards`, the first that is none."""
    return -(-number * _KEYS // shards)


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """The jobs of a shuffle.

    Attributes:
      out: folder of the shards.
      shards: number of them, and of stretches that the source is read in.
      seed: of the keys.
      work: folder of the runs, local or at an address, as all workers reach it.
      fan: see above.
    """

    out: str
    shards: int
    seed: int
    work: str
    fan: int = FAN

    @property
    def groups(self) -> int:
        """Groups of shards; 1: runs are not regrouped."""
        return -(-self.shards // self.fan)

    @property
    def regroups(self) -> int:
        """Tasks that regroup runs: for each group, one for every `fan` runs."""
        return self.groups**2 if self.groups > 1 else 0

    def shard(self, number: int) -> str:
        return files.join(self.out, shard_name(number, self.shards))

    def run(self, number: int) -> str:
        """The n-th stretch of the source, sorted."""
        return files.join(self.work, f"run-{number:06}")

    def regrouped(self, group: int, number: int) -> str:
        """A group's records of the n-th `fan` runs, sorted."""
        return files.join(self.work, f"group-{group:04}-run-{number:04}")

    def starts_of_groups(self) -> list[int]:
        """The lowest key of each group and the end of the last."""
        return [lowest_key(self.shards, min(n * self.fan, self.shards)) for n in range(self.groups + 1)]

    def starts_of_shards(self, group: int) -> list[int]:
        """The lowest key of each shard in a group and the end of the last."""
        first, last = group * self.fan, min((group + 1) * self.fan, self.shards)
        return [lowest_key(self.shards, number) for number in range(first, last + 1)]

    def reading(self, source: Source) -> "ReadStretches":
        return ReadStretches(self, source)

    def regrouping(self) -> "RegroupRuns":
        return RegroupRuns(self)

    def writing(self) -> "MergeShards":
        return MergeShards(self)


@dataclasses.dataclass(frozen=True)
class ReadStretches:
    """Task n writes the n-th run."""

    shuffle: Shuffle
    source: Source

    def __call__(self, number: int) -> Tally:
        shuffle = self.shuffle
        path = shuffle.run(number)
        if not files.exists(path):
            indices = stretch(len(self.source), shuffle.shards, number)
            found = packed(self.source, indices, shuffle.shard(number))
            starts = shuffle.starts_of_groups() if shuffle.regroups else shuffle.starts_of_shards(0)
            write_run(path, ((sort_key(shuffle.seed, index), record) for index, record in found), starts)
        return read_tally(shuffle.shard(number))

    def name(self, number: int) -> str:
        return f"stretch {number + 1:,} of {self.shuffle.shards:,} of the source for {self.shuffle.out}"


@dataclasses.dataclass(frozen=True)
class RegroupRuns:
    """Task group * groups + n merges what the n-th `fan` runs have for the group."""

    shuffle: Shuffle

    def __call__(self, number: int) -> None:
        shuffle = self.shuffle
        group, place = divmod(number, shuffle.groups)
        path = shuffle.regrouped(group, place)
        if not files.exists(path):
            runs = range(place * shuffle.fan, min((place + 1) * shuffle.fan, shuffle.shards))
            found = (entry for run in runs for entry in read_run(shuffle.run(run), group))
            write_run(path, found, shuffle.starts_of_shards(group))

    def name(self, number: int) -> str:
        return f"{self.shuffle.regrouped(*divmod(number, self.shuffle.groups))}"


@dataclasses.dataclass(frozen=True)
class MergeShards:
    """Task n writes the n-th shard."""

    shuffle: Shuffle

    def __call__(self, number: int) -> None:
        shuffle = self.shuffle
        path = shuffle.shard(number)
        if files.exists(path):
            return
        group, place = divmod(number, shuffle.fan)
        runs = [shuffle.run(run) for run in range(shuffle.shards)]
        if shuffle.regroups:
            runs = [shuffle.regrouped(group, run) for run in range(shuffle.groups)]
        with Spool(entry for run in runs for entry in read_run(run, place)) as spool:
            write_shard(path, (record for _, record in spool))

    def name(self, number: int) -> str:
        return self.shuffle.shard(number)


class Spool:
    """Records on the local disk, which come back in the order of their keys."""

    def __init__(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """Args: entries: (key, record) in any order."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # `__exit__` closes it
        self._places: list[tuple[int, int, int]] = []  # key, first byte, bytes
        for key, record in entries:
            self._places.append((key, self._file.tell(), len(record)))
            self._file.write(record)
        self._places.sort()

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(key, bytes) of the records in order."""
        return ((key, size) for key, _, size in self._places)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for key, place, size in self._places:
            self._file.seek(place)
            yield key, self._file.read(size)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def write_run(path: str, entries: Iterable[tuple[int, bytes]], starts: Sequence[int]) -> None:
    """Writes a file of records sorted by key.

    Args:
      entries: (key, record) in any order.
      starts: the lowest key of each range that will be read by itself, and the end of the last.
    """
    with Spool(entries) as spool, files.written_whole(path) as partial, partial.open("wb") as file:
        offsets, place = list[int](), _OFFSET.size * len(starts)
        for key, size in spool.sizes():
            while len(offsets) < len(starts) and starts[len(offsets)] <= key:
                offsets.append(place)
            place += _RECORD.size + size
        offsets += [place] * (len(starts) - len(offsets))
        file.write(b"".join(map(_OFFSET.pack, offsets)))
        for key, record in spool:
            file.write(_RECORD.pack(key, len(record)) + record)


def read_run(path: str, number: int) -> Iterator[tuple[int, bytes]]:
    """(key, record) of the n-th range of a run, in order. Two reads."""
    header = files.read_range(path, _OFFSET.size * number, _OFFSET.size * (number + 2))
    (begin,), (end,) = _OFFSET.iter_unpack(header)
    if begin == end:
        return
    content, place = files.read_range(path, begin, end), 0
    while place < len(content):
        key, size = _RECORD.unpack_from(content, place)
        place += _RECORD.size
        yield key, content[place : place + size]
        place += size
