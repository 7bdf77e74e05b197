"""Measures on disk: parts written whole by several processes, and joined to columns of all samples."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

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


def measure_all(measures: Sequence[Measure], folder: Path, workers: int) -> None:
    """Writes `FOLDER/NNN/START.npz` for every part of every source that is not there yet.

    Args:
      workers: processes; 0: all in this one.

    Raises:
      UserError: a source cannot be copied into processes, one of them died, or the disk or the network failed.
    """
    for number in range(len(measures)):
        (folder / f"{number:03}").mkdir(parents=True, exist_ok=True)
    tasks = [(number, part) for number, one in enumerate(measures) for part in bounds(len(one.source))]
    missing = [(number, part) for number, part in tasks if not part_file(folder, number, part).exists()]
    done = sum(len(part) for _, part in tasks) - sum(len(part) for _, part in missing)
    with Progress("measured", done + sum(len(part) for _, part in missing), "samples", done) as progress:
        arguments = ((str(part_file(folder, number, part)), number, part) for number, part in missing)
        for part in in_processes(write_part, arguments, tuple(measures), workers):
            progress.update(len(part))


def part_file(folder: Path, number: int, part: range) -> Path:
    return folder / f"{number:03}" / f"{part.start:012}.npz"


def write_part(measures: Sequence[Measure], path: str, number: int, part: range) -> range:
    """Measures a part of a source, and writes it whole."""
    table, said = measures[number](part)
    buffer = io.BytesIO()
    np.savez(buffer, table=table, said=np.frombuffer(json.dumps(said).encode(), np.uint8))
    files.write_file(path, buffer.getvalue())
    return part


def said_of(folder: Path, number: int, samples: int) -> Iterator[tuple[str, str]]:
    """(key, why it cannot be read) of every sample of a source, in its order."""
    for part in bounds(samples):
        with np.load(part_file(folder, number, part)) as stored:
            yield from (tuple(one) for one in json.loads(stored["said"].tobytes()))


def join(folder: Path, lengths: Sequence[int], out: Path) -> Columns:
    """The columns of all sources, one behind the other, as files that are mapped into memory.

    "caption" is there twice: by sample to compare two, and by permutation to find all that share something.
    """
    out.mkdir(exist_ok=True)
    total = sum(lengths)
    columns = {
        name: _new(out / f"{name}.npy", NOTE[name].base, (total, *NOTE[name].shape)) for name in NOTE.names or ()
    }
    planes = _new(out / "planes.npy", np.dtype("u1"), (NOTE["caption"].shape[0], total))
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
    return open_columns(str(out))


def open_columns(folder: str) -> Columns:
    """The columns of `join`; read only."""
    return {
        name: np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in (*(NOTE.names or ()), "planes")
    }


def _new(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


def in_processes(function: Any, arguments: Iterator[tuple], shared: Any, workers: int) -> Iterator[Any]:
    """What `function(shared, *arguments)` gives for each, in no order; in this process without workers.

    Raises:
      UserError: a process died.
    """
    if not workers:
        yield from (function(shared, *one) for one in arguments)
        return
    waiting: set[Future] = set()
    with start_pool(workers, shared, function.__module__) as pool:
        try:
            for one in arguments:
                waiting.add(pool.submit(_call, function, one))
                if len(waiting) > 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in waiting)
        except BrokenProcessPool as error:
            raise UserError(
                "a process died (out of memory, or a crash in a decoder); fewer --workers need less memory, and the "
                "same command goes on from here"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _call(function: Any, arguments: tuple) -> Any:
    return function(shared_object(), *arguments)


def state(values: Any) -> str:
    """A short text that tells values apart."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
