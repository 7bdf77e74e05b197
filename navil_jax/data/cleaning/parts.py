"""Measures on disk: parts written whole by several processes, and joined to columns of all samples."""

import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

import numpy as np

from navil_jax.console import Progress
from navil_jax.data.cleaning.measure import NOTE, Measure
from navil_jax.data.formats import files
from navil_jax.data.pool import shared_object, start_pool
from navil_jax.errors import UserError

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
    folder: Path

    @functools.cached_property
    def parts(self) -> list[tuple[int, range]]:
        """(number of the source, samples) of every task."""
        return [(number, part) for number, one in enumerate(self.measures) for part in bounds(len(one.source))]

    def file(self, number: int) -> Path:
        source, part = self.parts[number]
        return part_file(self.folder, source, part)

    def name(self, number: int) -> str:
        """What the task is about. Example: samples 0 to 8,191 of web"""
        source, part = self.parts[number]
        return f"samples {part.start:,} to {part.stop - 1:,} of {self.measures[source].name}"

    def __call__(self, number: int) -> None:
        """Measures a part, and writes it whole; one that is there stays."""
        if self.file(number).exists():
            return
        source, part = self.parts[number]
        table, said = self.measures[source](part)
        self.file(number).parent.mkdir(parents=True, exist_ok=True)
        write_arrays(self.file(number), table=table, said=np.frombuffer(json.dumps(said).encode(), np.uint8))


def part_file(folder: Path, number: int, part: range) -> Path:
    return folder / f"{number:03}" / f"{part.start:012}.npz"


def write_arrays(path: Path, **arrays: np.ndarray | int) -> None:
    """Writes an .npz file; it has its name only when it is whole."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stubs take the names for options
    files.write_file(str(path), buffer.getvalue())


def said_of(folder: Path, number: int, samples: int) -> Iterator[tuple[str, str]]:
    """(key, why it cannot be read) of every sample of a source, in its order."""
    for part in bounds(samples):
        with np.load(part_file(folder, number, part)) as stored:
            yield from (tuple(one) for one in json.loads(stored["said"].tobytes()))


def join(folder: Path, lengths: Sequence[int], out: Path) -> Columns:
    """The columns of all sources, one behind the other, as files that are mapped into memory.

    "caption" is there twice: by sample to compare two, and by permutation to find all that share something.
    """
    if out.exists():
        return open_columns(str(out))
    partial, total = out.with_suffix(".tmp"), sum(lengths)
    partial.mkdir(exist_ok=True)
    columns = {
        name: _new(partial / f"{name}.npy", NOTE[name].base, (total, *NOTE[name].shape)) for name in NOTE.names or ()
    }
    planes = _new(partial / "planes.npy", np.dtype("u1"), (NOTE["caption"].shape[0], total))
    for number, offset in enumerate(np.cumsum([0, *lengths])[:-1].tolist()):
        for part in bounds(lengths[number]):
            with np.load(part_file(folder, number, part)) as stored:
                table = stored["table"]
            rows = slice(offset + part.start, offset + part.stop)
            for name, column in columns.items():
                column[rows] = table[name]
            planes[:, rows] = table["caption"].T
    for column in (*columns.values(), planes):
        column.flush()
    partial.replace(out)
    return open_columns(str(out))


def open_columns(folder: str) -> Columns:
    """The columns of `join`; read only."""
    return {
        name: np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in (*(NOTE.names or ()), "planes")
    }


def _new(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


class Job(Protocol):
    """What is done for each task; picklable. It writes what it makes whole, and finds it there when it is run again."""

    def __call__(self, number: int) -> None: ...

    def name(self, number: int) -> str:
        """What the task is about, for messages."""
        ...

    def file(self, number: int) -> Path:
        """What the task writes."""
        ...


def run_tasks(job: Job, tasks: int, workers: int, label: str) -> None:
    """Runs the tasks 0..tasks-1 that have not been run before.

    Args:
      workers: processes; 0: all in this one.
      label: of the progress.

    Raises:
      UserError: as the job does, the job cannot be copied into processes, or one of them died.
    """
    missing = [number for number in range(tasks) if not job.file(number).exists()]
    with Progress(label, tasks, "tasks", tasks - len(missing)) as progress:
        for _ in _in_processes(job, missing, workers) if workers and missing else map(job, missing):
            progress.update()


def _in_processes(job: Job, numbers: Sequence[int], workers: int) -> Iterator[None]:
    try:
        pickle.dumps(job)
    except Exception as error:  # pickle raises many types
        raise UserError(f"{job.name(0)}: cannot be copied into other processes ({error}); use --workers 0") from error
    left, running = iter(numbers), dict[Future, int]()
    with start_pool(min(workers, len(numbers)), job, type(job).__module__) as pool:
        try:
            while True:
                for number in itertools.islice(left, 2 * workers - len(running)):
                    running[pool.submit(_run_shared, number)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    del running[future]
                    yield
        except BrokenProcessPool as error:
            raise UserError(
                f"a process died (out of memory, or a crash in a decoder) at one of: "
                f"{', '.join(job.name(number) for number in sorted(running.values()))}; fewer --workers need less "
                "memory, and the same command goes on from here"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_shared(number: int) -> None:
    """In a worker process."""
    shared_object()(number)
