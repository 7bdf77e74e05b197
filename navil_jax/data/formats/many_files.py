"""Many files of one format: indexed as the tasks of an engine, and each opened only when it is read."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from navil_jax.data.engine import Engine
from navil_jax.data.formats import files
from navil_jax.data.formats.records import READING, Reading, RecordSource
from navil_jax.data.sample import Sample

OPEN = 16  # files that a process has open at a time


@dataclasses.dataclass(frozen=True)
class IndexFiles:
    """Task n opens the n-th file, which writes its index if it needs one; how many samples it has, and its version."""

    format_class: type[RecordSource]
    paths: tuple[str, ...]
    reading: Reading = READING

    def __call__(self, number: int) -> tuple[int, list[files.Version]]:
        source = self.format_class(self.paths[number], self.reading)
        return len(source), source.versions()

    def name(self, number: int) -> str:
        return self.paths[number]


@dataclasses.dataclass(frozen=True)
class IndexedFile:
    """A file of which only the number of samples and the version are known until a sample is read."""

    format_class: type[RecordSource]
    path: str
    reading: Reading
    samples: int
    known: tuple[files.Version, ...]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        return self._opened()[index]

    def versions(self) -> list[files.Version]:
        return list(self.known)

    def texts(self, samples: int) -> Iterator[str]:
        return self._opened().texts(samples)

    def _opened(self) -> RecordSource:
        """Raises OSError if the file is not the one that was indexed."""
        source = _open(self.format_class, self.path, self.reading)
        if tuple(source.versions()) != self.known:
            raise OSError(f"{self.path} has changed since it was indexed; start again")
        return source


@functools.lru_cache(maxsize=OPEN)
def _open(format_class: type[RecordSource], path: str, reading: Reading) -> RecordSource:
    return format_class(path, reading)


def indexed_files(
    format_class: type[RecordSource], paths: Sequence[str], reading: Reading, engine: Engine
) -> list[IndexedFile]:
    """The files in their order. Raises `UserError` as the format does for a file that cannot be used at all."""
    job = IndexFiles(format_class, tuple(paths), reading)
    found = engine.run(job, len(paths), f"indices of {len(paths):,} files")
    return [
        IndexedFile(format_class, path, reading, samples, tuple(versions))
        for path, (samples, versions) in zip(paths, found, strict=True)
    ]
