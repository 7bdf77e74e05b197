"""Every sample of every source noted in tables: parts of sources are the tasks of an engine, and combined in order."""

import bisect
import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgpack
import numpy as np

from navil_jax.config import Config
from navil_jax.config.plain import differences, from_json, to_json
from navil_jax.data.engine import Engine
from navil_jax.data.features import Skipped
from navil_jax.data.formats import files
from navil_jax.data.inspect.checkup import NOTE, Checkup, Notes
from navil_jax.data.quarantine import FILE, Quarantine
from navil_jax.data.sample import stamp
from navil_jax.errors import UserError

SMALLEST_PART, LARGEST_PART, PARTS = 64, 8192, 4096  # samples of a part, and how many parts are enough
CONFIG_FILE, SOURCES_FILE, TABLES = "config.json", "sources.json", "notes"
_MATTERS = re.compile(r"(images|model\.vision|data)(\..*)?")  # keys of a config that change what is noted
_FREE: tuple[str, ...] = ("threads", "workers", "quarantine", "max_bad_share", "seed", "rows", "streams")
_FREE += ("packing_lookahead", "balance_window")


@dataclasses.dataclass(frozen=True)
class Examined:
    """What was noted of one source."""

    table: np.ndarray  # [samples] `checkup.NOTE`
    unused: Counter[str]  # fields of the records -> samples that are not made of them


def examine(config: Config, checkups: Sequence[Checkup], out: Path, engine: Engine, notes: str = "") -> list[Examined]:
    """Notes of all samples; bad ones are listed in `OUT/quarantine.jsonl`.

    A part's notes are a file, written once the part is read: that is the state from which the same call goes on. Bad
    samples are read again, for what they name may be there by now. The tables, in `OUT/notes/`, have 40 bytes per
    sample, mapped into memory. They are the same whatever the engine.

    Args:
      checkups: one per source.
      notes: folder of the parts, where all workers reach it; empty: `OUT/notes`.

    Returns:
      One per source.

    Raises:
      UserError: `out` belongs to another config or the data have changed, or what the engine raises.
    """
    _check_config(config, out)
    _check_sources(checkups, out)
    parts = ExamineParts(tuple(checkups), notes or str(out / TABLES))
    engine.run(parts, parts.starts[-1], "examines")
    (out / FILE).unlink(missing_ok=True)  # of bad samples, all of which were read again
    quarantine = Quarantine(out)
    return [_combined(parts, number, out, quarantine) for number in range(len(checkups))]


class ExamineParts:
    """Task n notes the samples of the n-th part of all sources."""

    def __init__(self, checkups: tuple[Checkup, ...], folder: str) -> None:
        self.checkups, self.folder = checkups, folder
        self.sizes = [_part_samples(len(checkup.source)) for checkup in checkups]
        counts = (-(-len(checkup.source) // size) for checkup, size in zip(checkups, self.sizes, strict=True))
        self.starts = [0, *itertools.accumulate(counts)]  # number of each source's first part, and of all

    def __call__(self, number: int) -> None:
        """Writes the part's notes; where they are there, reads again the samples that were bad."""
        checkup, indices = self._part(number)
        path = self.path(number)
        if not files.exists(path):
            files.write_file(path, _packed(checkup(indices)))
        elif (found := read_notes(path)).bad:
            again = [sample.index for sample in found.bad]
            notes = checkup(again)
            found.table[np.array(again) - indices.start] = notes.table
            files.write_file(path, _packed(Notes(found.table, notes.bad, found.unused + notes.unused)))

    def name(self, number: int) -> str:
        checkup, indices = self._part(number)
        return f"samples {indices.start:,} to {indices.stop - 1:,} of {checkup.name}"

    def path(self, number: int) -> str:
        """Of the notes of a part. Example: report/notes/001/000000.part"""
        source = bisect.bisect_right(self.starts, number) - 1
        return files.join(self.folder, f"{source:03}/{number - self.starts[source]:06}.notes")

    def _part(self, number: int) -> tuple[Checkup, range]:
        source = bisect.bisect_right(self.starts, number) - 1
        checkup, size = self.checkups[source], self.sizes[source]
        begin = (number - self.starts[source]) * size
        return checkup, range(begin, min(begin + size, len(checkup.source)))


def _part_samples(samples: int) -> int:
    """Samples of a part of a source that has so many: the number of parts is bounded, and so is what a kill loses."""
    return min(max(samples // PARTS, SMALLEST_PART), LARGEST_PART)


def _packed(notes: Notes) -> bytes:
    bad = [dataclasses.astuple(sample) for sample in notes.bad]
    return msgpack.packb((str(NOTE), notes.table.tobytes(), bad, dict(notes.unused)))


def read_notes(path: str) -> Notes:
    """The notes of a part. Raises `UserError` if another version of this program wrote them."""
    kind, table, bad, unused = msgpack.unpackb(files.read_file(path))
    if kind != str(NOTE):
        raise UserError(f"{path}: is of another version of this program; remove the folder of the report")
    return Notes(np.frombuffer(table, NOTE).copy(), [Skipped(*sample) for sample in bad], Counter(unused))


def _combined(parts: ExamineParts, source: int, out: Path, quarantine: Quarantine) -> Examined:
    """The table of a source; its bad samples go to the quarantine in their order."""
    checkup = parts.checkups[source]
    quarantine.known(checkup.name, len(checkup.source), stamp(checkup.source))
    table = np.lib.format.open_memmap(out / TABLES / f"{source:03}.npy", "w+", NOTE, (len(checkup.source),))
    unused, end = Counter[str](), 0
    for number in range(parts.starts[source], parts.starts[source + 1]):
        notes = read_notes(parts.path(number))
        table[end : end + len(notes.table)] = notes.table
        end += len(notes.table)
        unused += notes.unused
        for sample in notes.bad:
            quarantine.add(sample)
    if end != len(table):
        raise UserError(f"{parts.folder}: is of another version of this program; remove the folder of the report")
    table.flush()
    return Examined(table, unused)


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
    now = {checkup.name: [len(checkup.source), stamp(checkup.source)] for checkup in checkups}
    if not path.exists():
        path.write_text(json.dumps(now, indent=2))
    before = json.loads(path.read_text())
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise UserError(
            f"source {changed[0]}: its files have changed since {out} was begun; remove it or give another --out"
        )
