"""Estimate: what a conversion or an examination of all samples will cost, measured on some of them in one process."""

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from navil_jax.config import SourceConfig
from navil_jax.config.ranges import Positive, read_as
from navil_jax.console import table
from navil_jax.data import formats
from navil_jax.data.convert import SHARD_SAMPLES, WriteShards
from navil_jax.data.engine import Local
from navil_jax.data.formats import files
from navil_jax.data.formats.array_record import SUFFIX
from navil_jax.data.inspect.checkup import Checkup
from navil_jax.data.sample import Sample, Source, check_index
from navil_jax.data.shuffle import FAN, Shuffle
from navil_jax.errors import UserError

SECONDS, FIRST, STRETCHES, FILES = 10.0, 32, 16, 3  # of measuring; samples to begin with; stretches and files looked at
WORKERS = (1, 4, 16, 64, 256, 1024)  # that a table has rows for


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Some samples of a source, in `STRETCHES` evenly spread stretches."""

    source: Source
    samples: int  # at most as many as the source has

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        check_index(index, self.samples)
        stretch = index * STRETCHES // self.samples
        return self.source[index + (len(self.source) - self.samples) * stretch // (STRETCHES - 1)]

    def texts(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What was measured, and of how much it stands.

    Attributes:
      samples: of the whole.
      measured: samples that were worked on.
      seconds: that they took in one process.
      size: bytes that were written of them.
      looked_at: which files they are from.
    """

    samples: int
    measured: int
    seconds: float
    size: int
    looked_at: str

    def text(self, price: float | None) -> str:
        """A line and a table. Args: price: dollars per worker-hour; None: no dollars."""
        rate, hours = self.measured / self.seconds, self.samples * self.seconds / self.measured / 3600
        head = ["workers", "hours", "worker-hours", *(["dollars"] if price else [])]
        rows = [
            [f"{workers:,}", f"{hours / workers:,.2f}", f"{hours:,.2f}", *([f"{hours * price:,.2f}"] if price else [])]
            for workers in WORKERS
        ]
        whole = self.samples * self.size / self.measured
        return (
            f"measured on {self.measured:,} samples of {self.looked_at}: {rate:,.1f} samples/s in one process\n"
            f"the whole: {self.samples:,} samples, {whole / 1e9:,.3f} GB written\n"
            f"{table(head, rows, indent=2)}\n"
            "A worker is one process on a core as fast as this one; starting machines and uploading come on top."
        )


def estimate_conversion(entry: SourceConfig, opened: Callable[[SourceConfig], Source], shuffle: int | None) -> Estimate:
    """Converts some samples of a source into a folder that is removed again.

    Of several files, `FILES` are looked at, and the others are taken to have as many samples per byte.

    Args: opened: opens an entry.
    """
    paths = formats.files_of(entry.kind, entry.path) if entry.kind else []
    few = paths if len(paths) <= FILES else [paths[(2 * n + 1) * len(paths) // (2 * FILES)] for n in range(FILES)]
    sources = [opened(dataclasses.replace(entry, path=path)) for path in few] or [opened(entry)]
    samples = sum(map(len, sources))
    if few != paths:
        samples = round(samples * files.total_size(paths) / files.total_size(few))
    convert = functools.partial(_converted, shuffle=shuffle, regroups=samples > SHARD_SAMPLES * FAN)
    found = [measure(source, convert, SECONDS / len(sources)) for source in sources]
    looked_at = f"{len(few):,} of {len(paths):,} files" if paths else entry.path or entry.name
    measured, seconds, size = (sum(column) for column in zip(*found, strict=True))
    return Estimate(samples, int(measured), seconds, int(size), looked_at)


def _converted(source: Source, shuffle: int | None, regroups: bool) -> int:
    """Converts a source into two shards, by the jobs that the whole needs; how many bytes they have."""
    shards = min(2, len(source))
    with tempfile.TemporaryDirectory(prefix="navil-") as folder:
        if shuffle is None:
            Local().run(WriteShards(source, folder, shards), shards, "measures")
        else:
            jobs = Shuffle(folder, shards, shuffle, files.join(folder, ".work"), 1 if regroups else FAN)
            Local().run(jobs.reading(source), shards, "measures")
            Local().run(jobs.regrouping(), jobs.regroups, "measures")
            Local().run(jobs.writing(), shards, "measures")
        return sum(path.stat().st_size for path in Path(folder).glob(f"data-*{SUFFIX}"))


def estimate_examination(checkup: Checkup) -> Estimate:
    """Examines some samples of a source."""

    def work(source: Source) -> int:
        table = dataclasses.replace(checkup, source=source)(range(len(source))).table
        return 2 * table.nbytes

    return Estimate(len(checkup.source), *measure(checkup.source, work, SECONDS), checkup.name)


def measure(source: Source, work: Callable[[Source], int], seconds: float) -> tuple[int, float, int]:
    """Works on as many samples of a source as take about so many seconds.

    Args: work: gives the bytes that it wrote.

    Returns:
      How many samples they are, the seconds that they took, the bytes.
    """
    first = Stretches(source, min(FIRST, len(source)))
    began = time.perf_counter()
    work(first)
    spent = time.perf_counter() - began
    more = Stretches(source, min(len(source), max(FIRST, int(seconds / spent * len(first)))))
    began = time.perf_counter()
    size = work(more)
    return len(more), time.perf_counter() - began, size


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--estimate", action="store_true", help="work on some samples only, and say what all of them will take")
    text = "of a worker (a core) per hour; the estimate then says dollars"
    add("--price", type=read_as(Positive), metavar="DOLLARS", help=text)


def check_options(options: argparse.Namespace) -> None:
    """Raises `UserError` for a price without an estimate."""
    if options.price and not options.estimate:
        raise UserError("--price: has no effect without --estimate")
