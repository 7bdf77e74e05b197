"""Tasks of `near` in several processes, each with a file of its own that is not made again."""

import functools
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from navil_jax.console import Progress
from navil_jax.data.cleaning import near, parts
from navil_jax.data.cleaning.settings import Settings
from navil_jax.data.formats import files

FEW = 50_000  # samples that are compared in this process: others would take longer to start


class Job(NamedTuple):
    """What all tasks share."""

    columns: str  # folder
    rows: str  # file of the samples to compare
    settings: Settings
    references: tuple[int, int] | None = None  # first and end of the samples to compare them with; None: themselves


class Compare(NamedTuple):
    """Finds near samples. Args: folder: of the files of the tasks; columns: folder of the columns."""

    folder: Path
    columns: Path
    settings: Settings
    workers: int

    def __call__(self, rows: np.ndarray, kinds: Sequence[str], references: tuple[int, int] | None = None) -> near.Near:
        """All pairs of some samples, or of references and some samples.

        Args:
          rows: [n] int64, ascending.
          kinds: what buckets are made from, see `near.find_near`.
        """
        name = "matches" if references else "pairs"
        own = self.folder / name / parts.state((rows.tobytes(), kinds, references, self.settings))
        if not own.exists():
            shutil.rmtree(own.parent, ignore_errors=True)  # of other settings
            own.mkdir(parents=True)
        stored = own / "rows.npy"
        if not stored.exists():
            buffer = io.BytesIO()
            np.save(buffer, rows)
            files.write_file(str(stored), buffer.getvalue())
        wanted = list(near.tasks(1 if references else len(rows), kinds))
        paths = [own / f"{kind}-{table:03}-{partition:04}.npz" for kind, table, partition, _ in wanted]
        missing = [(str(path), *task) for path, task in zip(paths, wanted, strict=True) if not path.exists()]
        job = Job(str(self.columns), str(stored), self.settings, references)
        workers = self.workers if len(rows) > FEW else 0
        with Progress("compared", len(wanted), "tables", len(wanted) - len(missing)) as progress:
            for _ in parts.in_processes(run_task, iter(missing), job, workers):
                progress.update()
        found = [_load(path) for path in paths]
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *(one.pairs for one in found)])
        return near.Near(np.unique(pairs, axis=0), max((one.uncompared for one in found), default=0))


def run_task(job: Job, path: str, kind: str, table: int, partition: int, partitions: int) -> None:
    """Writes the pairs of one task."""
    columns, rows = _columns(job.columns), np.load(job.rows, mmap_mode="r")
    if job.references:
        found = near.find_matches(columns, rows, np.arange(*job.references), job.settings, table)
    else:
        found = near.find_near(columns, rows, job.settings, kind, table, partition, partitions)
    buffer = io.BytesIO()
    np.savez(buffer, pairs=found.pairs, uncompared=found.uncompared)
    files.write_file(path, buffer.getvalue())


@functools.lru_cache(1)
def _columns(folder: str) -> near.Columns:
    return parts.open_columns(folder)


def _load(path: Path) -> near.Near:
    with np.load(path) as stored:
        return near.Near(stored["pairs"], int(stored["uncompared"]))
