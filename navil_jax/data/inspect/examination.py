"""Every sample of every source noted in tables on disk, by several processes, and on where it was interrupted."""

import concurrent.futures
import itertools
import json
import pickle
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from navil_jax.config import Config
from navil_jax.config.plain import differences, from_json, to_json
from navil_jax.console import Progress
from navil_jax.data.inspect.checkup import BAD, NOTE, UNREAD, Checkup, Notes
from navil_jax.data.pool import shared_object, start_pool
from navil_jax.data.quarantine import FILE, Quarantine
from navil_jax.data.sample import stamp
from navil_jax.errors import UserError

CHUNK = 32  # samples that a process reads at a time
CONFIG_FILE, SOURCES_FILE, TABLES = "config.json", "sources.json", "notes"
_MATTERS = re.compile(r"(images|model\.vision|data)(\..*)?")  # keys of a config that change what is noted
_FREE: tuple[str, ...] = ("threads", "workers", "quarantine", "max_bad_share", "seed", "rows", "streams")
_FREE += ("packing_lookahead", "balance_window")

_checkups: Sequence[Checkup] = ()  # in a worker process: those of its pool


def examine(config: Config, checkups: Sequence[Checkup], out: Path, workers: int) -> list[np.ndarray]:
    """Notes of all samples; bad ones are appended to `OUT/quarantine.jsonl` as they are found.

    `OUT/notes/` holds a table per source, in which a sample's row is filled once it is read: that is the state from
    which the same call goes on; bad samples are read again, for what they name may be there by now. 44 bytes per
    sample, mapped into memory.

    Args:
      checkups: one per source.
      workers: processes; 0: all in this one.

    Returns:
      One array [samples] of `checkup.NOTE` per source.

    Raises:
      UserError: `out` belongs to another config or the data have changed, a source cannot be copied into processes, or
        one of them died.
    """
    _check_config(config, out)
    _check_sources(checkups, out)
    tables = [_open_table(out / TABLES / f"{number:03}.npy", checkup) for number, checkup in enumerate(checkups)]
    (out / FILE).unlink(missing_ok=True)  # of bad samples, all of which are read again
    quarantine = Quarantine(out)
    for checkup in checkups:
        quarantine.known(checkup.name, len(checkup.source), stamp(checkup.source))
    with _pool(checkups, workers) as pool:
        try:
            for number, (checkup, table) in enumerate(zip(checkups, tables, strict=True)):
                results = _results(pool, number, checkup.name, _unread(table), 2 * workers)
                _fill(table, results, quarantine, FieldSets(out, number), checkup.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tables


class FieldSets:
    """Sets of fields that samples do not use, by number, in `OUT/notes/NNN.fields.jsonl`: a line for each new one.

    Number 0 is the empty set, and n the set of line n.
    """

    def __init__(self, out: Path, number: int) -> None:
        """Args: number: of the source."""
        self._path = out / TABLES / f"{number:03}.fields.jsonl"
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        self._sets = [(), *(tuple(json.loads(line)) for line in lines if line.endswith(b"\n"))]
        self._numbers = {fields: number for number, fields in enumerate(self._sets)}

    def number(self, fields: tuple[str, ...]) -> int:
        """The number of a set; a new one is on disk when this returns."""
        if fields not in self._numbers:
            self._numbers[fields] = len(self._sets)
            self._sets.append(fields)
            with self._path.open("ab") as file:
                file.write(json.dumps(fields).encode() + b"\n")
        return self._numbers[fields]

    def counts(self, table: np.ndarray) -> Counter[str]:
        """Field -> samples of a table that do not use it."""
        found: Counter[str] = Counter()
        for fields, count in zip(self._sets, np.bincount(table["unused"]).tolist(), strict=False):
            found.update(dict.fromkeys(fields, count))
        return found


def _fill(
    table: np.ndarray,
    results: Iterator[tuple[list[int], Notes]],
    quarantine: Quarantine,
    sets: FieldSets,
    name: str,
) -> None:
    done = int(np.count_nonzero(table["status"]))
    with Progress(name, len(table), "samples", done) as progress:
        for indices, notes in results:
            for sample in notes.bad:
                quarantine.add(sample)
            notes.table["unused"] = [sets.number(fields) for fields in notes.unused]
            table[indices] = notes.table
            progress.update(len(indices))
    if isinstance(table, np.memmap):
        table.flush()


def _check_config(config: Config, out: Path) -> None:
    """Notes in the folder with which config its tables are made; raises `UserError` if that was another one."""
    path = out / CONFIG_FILE
    if not path.exists():
        (out / TABLES).mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config))
        return
    changed = [
        f"{key} was {before}, is {now}"
        for key, (before, now) in differences(from_json(path.read_text()), config).items()
        if _MATTERS.fullmatch(key) and key.removeprefix("data.") not in _FREE
    ]
    if changed:
        raise UserError(f"{out}: holds a report for another config ({changed[0]}); remove it or give another --out")


def _check_sources(checkups: Sequence[Checkup], out: Path) -> None:
    """Notes in the folder what the sources' files are known by; raises `UserError` if they have changed."""
    path = out / SOURCES_FILE
    now = {checkup.name: stamp(checkup.source) for checkup in checkups}
    if not path.exists() and not any((out / TABLES).glob("*.npy")):
        path.write_text(json.dumps(now, indent=2))
    before = json.loads(path.read_text()) if path.exists() else {}
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise UserError(
            f"source {changed[0]}: its files have changed since {out} was begun; remove it or give another --out"
        )


def _open_table(path: Path, checkup: Checkup) -> np.ndarray:
    samples = len(checkup.source)
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        np.lib.format.open_memmap(temporary, "w+", NOTE, (samples,)).flush()
        temporary.replace(path)
    table = np.lib.format.open_memmap(path, "r+")
    if table.dtype != NOTE:
        raise UserError(f"{path}: is of another version of this program; remove {path.parent.parent}")
    if len(table) != samples:
        raise UserError(
            f"source {checkup.name}: {samples:,} samples, {len(table):,} when {path.parent.parent} was begun; "
            "remove that folder or give another --out"
        )
    table["status"][table["status"] == BAD] = UNREAD
    return table


def _unread(table: np.ndarray) -> Iterator[list[int]]:
    for start in range(0, len(table), CHUNK):
        part = table["status"][start : start + CHUNK]
        if indices := (start + np.flatnonzero(part == UNREAD)).tolist():
            yield indices


def _results(
    pool: concurrent.futures.Executor, number: int, name: str, chunks: Iterator[list[int]], ahead: int
) -> Iterator[tuple[list[int], Notes]]:
    """The notes of one source in its order; so many chunks are under way."""
    waiting: deque = deque()
    try:
        while True:
            for indices in itertools.islice(chunks, ahead + 1 - len(waiting)):
                waiting.append((indices, pool.submit(_check, number, indices)))
            if not waiting:
                return
            indices, future = waiting.popleft()
            yield indices, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a process died (out of memory, or a crash in a decoder) while samples of {name} from {indices[0]} on "
            "were read; fewer --workers need less memory, and the same command goes on from there"
        ) from error


class _ThisProcess(concurrent.futures.Executor):
    """Runs what is submitted at once, on checkups of its own."""

    def __init__(self, checkups: Sequence[Checkup]) -> None:
        self._checkups = checkups

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(function(*arguments, checkups=self._checkups))
        return future


def _pool(checkups: Sequence[Checkup], workers: int) -> concurrent.futures.Executor:
    if not workers:
        return _ThisProcess(checkups)
    for checkup in checkups:
        try:
            pickle.dumps(checkup)
        except Exception as error:  # pickle raises many types
            raise UserError(
                f"source {checkup.name}: cannot be copied into other processes ({error}); use --workers 0"
            ) from error
    return start_pool(workers, tuple(checkups), __name__)


def _check(number: int, indices: Sequence[int], checkups: Sequence[Checkup] | None = None) -> Notes:
    """The notes of some samples; in a worker with the checkups of its pool."""
    return (shared_object() if checkups is None else checkups)[number](indices)
