"""Tasks of `near` in an engine, each with a file of its own that is not made again."""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from navil_jax.data.cleaning import near, parts
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.engine import Engine, Local
from navil_jax.data.formats import files

FEW = 50_000  # samples that are compared in this process: an engine would take longer to start


@dataclasses.dataclass(frozen=True)
class CompareJob:
    """Writes the near pairs of one table of buckets, and of one partition of them."""

    folder: str  # of the files that it writes
    columns: str
    rows: str  # file of the samples to compare
    settings: Settings
    tasks: tuple[tuple[str, int, int, int], ...]  # of `near.tasks`
    references: tuple[int, int] | None  # first and end of the samples to compare them with; None: themselves

    def file(self, number: int) -> str:
        kind, table, partition, _ = self.tasks[number]
        return files.join(self.folder, f"{kind}-{table:03}-{partition:04}.npz")

    def name(self, number: int) -> str:
        """Example: partition 1 of 4 of table 3 of both"""
        kind, table, partition, partitions = self.tasks[number]
        return f"partition {partition} of {partitions} of table {table} of {kind}"

    def __call__(self, number: int) -> None:
        """Writes the file of a task, unless it is there."""
        if files.exists(self.file(number)):
            return
        kind, table, partition, partitions = self.tasks[number]
        columns, rows = parts.open_columns(self.columns), parts.open_array(self.rows)
        if self.references:
            found = near.find_matches(columns, rows, np.arange(*self.references), self.settings, table)
        else:
            found = near.find_near(columns, rows, self.settings, kind, table, partition, partitions)
        parts.write_arrays(self.file(number), packed=near.packed_pairs(found.pairs), uncompared=found.uncompared)


class Found(NamedTuple):
    """What all tasks found."""

    packed: np.ndarray  # [m] uint64, ascending, see `near.packed_pairs`
    uncompared: int  # samples of crowded buckets, at most in one table, that were not compared with all others in them


class Compare(NamedTuple):
    """Finds near samples. Args: folder: of the files of the tasks; columns: folder of the columns."""

    folder: str
    columns: str
    settings: Settings
    engine: Engine

    def __call__(self, rows: np.ndarray, kinds: Sequence[str], references: tuple[int, int] | None = None) -> Found:
        """All pairs of some samples, or of references and some samples, packed and ascending.

        Args:
          rows: [n] int64, ascending.
          kinds: what buckets are made from, see `near.find_near`.
        """
        name = "matches" if references else "pairs"
        folder = files.join(self.folder, name)
        own = files.join(folder, _state(rows, kinds, references, self.settings))
        stored = files.join(own, "rows.npy")
        if not files.exists(stored):
            files.remove_folder(folder)  # of other settings
            buffer = io.BytesIO()
            np.save(buffer, rows)
            files.write_file(stored, buffer.getvalue())
        tasks = tuple(near.tasks(1 if references else len(rows), kinds))
        job = CompareJob(own, self.columns, stored, self.settings, tasks, references)
        engine = self.engine if len(rows) > FEW else Local()
        engine.run(job, len(tasks), "compares")
        packed, uncompared = np.zeros(0, np.uint64), 0
        for number in range(len(tasks)):
            packed = np.union1d(packed, parts.read_array(job.file(number), "packed"))
            uncompared = max(uncompared, int(parts.read_array(job.file(number), "uncompared")))
        return Found(packed, uncompared)


def _state(rows: np.ndarray, *others: Any) -> str:
    """A short text that tells tasks apart."""
    digest = hashlib.blake2b(repr(others).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()
