"""Files that users have -> `Source`: one class per format, all of them a `records.RecordSource`."""

import bisect
import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from navil_jax.data.engine import Engine
from navil_jax.data.formats import files
from navil_jax.data.formats.many_files import IndexedFile, indexed_files
from navil_jax.data.formats.record_videos import FRAMES, Frames
from navil_jax.data.formats.records import TEXTS_SAMPLES, Reading, RecordSource
from navil_jax.data.grounding import Coordinates
from navil_jax.data.sample import Sample, check_index
from navil_jax.errors import UserError

if TYPE_CHECKING:
    from navil_jax.data.formats.hub import Stream

# kind -> module of this package, class. A module is imported when needed: nobody needs the packages of the others.
FORMATS = {
    "array_record": ("array_record", "ArrayRecord"),
    "llava": ("llava", "Llava"),
    "webdataset": ("webdataset", "WebDataset"),
    "parquet": ("parquet", "Parquet"),
    "huggingface": ("huggingface", "HuggingFace"),
    "tfds": ("tfds", "Tfds"),
}
META = "meta"  # a file of several sources, see meta.py
_PACKAGES = {"tensorflow_datasets": "tensorflow-datasets importlib_resources"}
_log = logging.getLogger(__name__)
_WHOLE_FOLDER = ("array_record", "huggingface", "tfds")  # open a folder themselves; of others, each file is opened


@dataclasses.dataclass(frozen=True)
class Concatenated:
    """Sources one after another, as one."""

    sources: "tuple[RecordSource | IndexedFile | Concatenated, ...]"
    ends: tuple[int, ...]  # samples up to and with each source

    @classmethod
    def of(cls, sources: "Iterable[RecordSource | IndexedFile | Concatenated]") -> "Concatenated":
        sources = tuple(sources)
        return cls(sources, tuple(itertools.accumulate(len(source) for source in sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        number = bisect.bisect_right(self.ends, index)
        return self.sources[number][index - (self.ends[number - 1] if number else 0)]

    def stamp(self) -> str:
        """What the files are known by, as of `RecordSource`."""
        return files.stamp(self.versions())

    def fingerprint(self) -> str:
        """As of `RecordSource`."""
        return files.fingerprint(len(self), self.versions())

    def versions(self) -> list[files.Version]:
        return [version for source in self.sources for version in source.versions()]

    def texts(self, samples: int = TEXTS_SAMPLES) -> Iterator[str]:
        for source in self.sources:
            yield from source.texts(max(1, samples // len(self.sources)))


@functools.cache
def _tell_of_others(path: str, suffixes: Sequence[str]) -> None:
    """Warns once of what a folder holds besides the files that are read."""
    system, bare = files.filesystem(files.at_home(path))
    if system.isdir(bare) and (others := files.passed_over(path, suffixes)):
        count, first = f"{len(others):,} files", others[0].removeprefix(bare).lstrip("/")
        wanted = ", ".join(suffixes)
        _log.warning(
            "%s: %s there are not read, such as %s; only %s in the folder itself are", path, count, first, wanted
        )


def check_kind(kind: str, known: Sequence[str] = (*FORMATS, META)) -> None:
    """Raises `UserError` with the nearest kind for one that does not exist."""
    if kind not in known:
        nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0)[0]
        raise UserError(f"no kind of data named {kind!r}; nearest is {nearest!r}, all are {', '.join(known)}")


def open_format(
    kind: str,
    path: str,
    root: str = "",
    prompt: str = "",
    boxes: Coordinates = "",
    engine: Engine | None = None,
    frames: Frames = FRAMES,
) -> RecordSource | Concatenated:
    """The samples of a file, a folder or a pattern such as `shards/{0000..0999}.tar`, local or at an address.

    Args:
      kind: a key of `FORMATS`.
      root: folder of the images that records name; empty: that of the file.
      prompt: the question of samples that are a caption only; empty: `sources.CAPTION_PROMPT`.
      boxes: coordinates of boxes in their texts; empty: the records say.
      engine: indexes several files, which are opened only when they are read; None: all are opened now.
      frames: which ones of videos become images.

    Raises:
      UserError: unknown kind, no such file, a file that cannot be used at all, or a package is not installed.
    """
    check_kind(kind, tuple(FORMATS))
    if not path:
        raise UserError(f"data of kind {kind}: no path given")
    reading = Reading(root, prompt, boxes, frames)
    reading.check()
    with _naming_packages(kind, path):
        format_class = _format_class(kind)
        found = [path]
        if kind not in _WHOLE_FOLDER:
            found = files.expand(path, format_class.suffixes)
            for file in found:
                files.check_is_content(file)
            _tell_of_others(path, format_class.suffixes)
        if engine is not None and len(found) > 1:
            return Concatenated.of(indexed_files(format_class, found, reading, engine))
        sources = [format_class(file, reading) for file in found]
    return sources[0] if len(sources) == 1 else Concatenated.of(sources)


def is_streamed(kind: str, path: str) -> bool:
    """Whether data are read as `open_stream` does: of the hub, and not saved by `Dataset.save_to_disk`."""
    saved = (files.join(path, name) for name in ("state.json", "dataset_dict.json"))
    return kind == "huggingface" and bool(path) and not any(map(files.exists, saved))


def open_stream(path: str, reading: Reading) -> "Stream":
    """The files of a data set of the hub.

    Raises:
      UserError: as `hub.Stream.of`, there is no such folder of images, or the package is not installed.
    """
    reading.check()
    with _naming_packages("huggingface", path):
        from navil_jax.data.formats.hub import Stream

        return Stream.of(path, reading)


def files_of(kind: str, path: str) -> list[str]:
    """The files that `open_format` opens one by one; none where a format opens a folder itself."""
    check_kind(kind, tuple(FORMATS))
    if kind in _WHOLE_FOLDER:
        return []
    with _naming_packages(kind, path):
        return files.expand(path, _format_class(kind).suffixes)


def _format_class(kind: str) -> Any:
    module, name = FORMATS[kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


@contextlib.contextmanager
def _naming_packages(kind: str, path: str) -> Iterator[None]:
    """Raises `UserError` for a package that a format needs and that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        package = _PACKAGES.get(missing, missing)
        raise UserError(f"{path}: data of kind {kind} need another package: pip install {package}") from error
