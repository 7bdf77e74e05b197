"""Measures in files: parts, each written whole by a task, and the columns of all samples that they are joined to."""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from navil_jax.data.cleaning.measure import NOTE, Measure
from navil_jax.data.formats import files

MEASURES = "measures"  # folder of the parts, in that of a cleaning
LEAST, MOST = 256, 8192  # samples of a part
PARTS = 1024  # of a source, where these limits allow it
Columns = Mapping[str, np.ndarray]


def bounds(samples: int) -> list[range]:
    """The parts of a source: they follow from its number of samples alone."""
    size = min(MOST, max(LEAST, samples // PARTS))
    return [range(start, min(samples, start + size)) for start in range(0, samples, size)]


@dataclasses.dataclass(frozen=True)
class MeasureJob:
    """Writes `FOLDER/NNN/START.npz`, a part of a source; the number of a task counts the parts of all sources."""

    measures: tuple[Measure, ...]
    folder: str

    @functools.cached_property
    def parts(self) -> list[tuple[int, range]]:
        """(number of the source, samples) of every task."""
        return [(number, part) for number, one in enumerate(self.measures) for part in bounds(len(one.source))]

    def file(self, number: int) -> str:
        source, part = self.parts[number]
        return part_file(self.folder, source, part)

    def name(self, number: int) -> str:
        """What the task is about. Example: samples 0 to 8,191 of web"""
        source, part = self.parts[number]
        return f"samples {part.start:,} to {part.stop - 1:,} of {self.measures[source].name}"

    def __call__(self, number: int) -> None:
        """Measures a part, and writes it whole; one that is there stays."""
        if files.exists(self.file(number)):
            return
        source, part = self.parts[number]
        table, said = self.measures[source](part)
        write_arrays(self.file(number), table=table, said=np.frombuffer(json.dumps(said).encode(), np.uint8))


def part_file(folder: str, number: int, part: range) -> str:
    return files.join(folder, f"{number:03}/{part.start:012}.npz")


def write_arrays(path: str, **arrays: np.ndarray | int) -> None:
    """Writes an .npz file; it has its name only when it is whole."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stubs take the names for options
    files.write_file(path, buffer.getvalue())


def read_array(path: str, name: str) -> np.ndarray:
    """An array of a file of `write_arrays`, of which only that is read."""
    with files.open_binary(path) as file, np.load(file) as stored:
        return stored[name]


def said_of(folder: str, number: int, samples: int) -> Iterator[tuple[str, str]]:
    """(key, why it cannot be read) of every sample of a source, in its order."""
    for part in bounds(samples):
        said = read_array(part_file(folder, number, part), "said")
        yield from (tuple(one) for one in json.loads(said.tobytes()))


def join(folder: str, lengths: Sequence[int], out: str) -> Columns:
    """The columns of all sources, one behind the other, as files that are mapped into memory.

    "caption" is there twice: by sample to compare two, and by permutation to find all that share something.
    """
    total = sum(lengths)
    shapes = {name: (total, *NOTE[name].shape) for name in NOTE.names or ()}
    shapes["planes"] = (*NOTE["caption"].shape, total)
    if not all(files.exists(_column_file(out, name)) for name in shapes):
        with contextlib.ExitStack() as written:
            columns = {
                name: np.lib.format.open_memmap(
                    written.enter_context(files.written_whole(_column_file(out, name))), "w+", _dtype(name), shape
                )
                for name, shape in shapes.items()
            }
            _fill(columns, folder, lengths)
    return open_columns(out)


def _fill(columns: Mapping[str, np.memmap], folder: str, lengths: Sequence[int]) -> None:
    start = 0
    for number, length in enumerate(lengths):
        for part in bounds(length):
            table = read_array(part_file(folder, number, part), "table")
            rows = slice(start + part.start, start + part.stop)
            for name in NOTE.names or ():
                columns[name][rows] = table[name]
            columns["planes"][:, rows] = table["caption"].T
        start += length
    for column in columns.values():
        column.flush()


def open_columns(folder: str) -> Columns:
    """The columns of `join`, read only; those at an address are copied to the cache folder, once on every machine."""
    return {name: open_array(_column_file(folder, name)) for name in (*(NOTE.names or ()), "planes")}


def open_array(path: str) -> np.ndarray:
    """The array of an .npy file, mapped into memory."""
    return np.load(files.local_copy(path), mmap_mode="r")


def _column_file(folder: str, name: str) -> str:
    return files.join(folder, f"{name}.npy")


def _dtype(column: str) -> np.dtype:
    return NOTE["caption" if column == "planes" else column].base
