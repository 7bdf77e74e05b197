"""Where the samples of a large file begin: an index file, written once and mapped into memory.

A file of samples is cut into consecutive byte ranges, one per sample. `FILE.index` holds a header of 56 bytes (magic,
kind, version of FILE as `files.Version`, number of offsets, number of marked samples), the offsets as little-endian
uint64, one per sample and a last one for the end, and the numbers of the marked samples. It lies beside FILE, or in the
cache folder where that cannot be written or is remote; `files.shared_index` has that of a remote file for all machines.
An index that is not of FILE's version is written anew.
"""

import os
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from navil_jax.console import Progress
from navil_jax.data.formats import files
from navil_jax.errors import UserError

# (path, bytes, samples to mark, filled by the call) -> offsets in ascending order, in arrays of any length
Scan = Callable[[str, int, list[int]], Iterator[np.ndarray]]
SUFFIX = ".index"
_MAGIC = b"navilix2"
_HEADER = struct.Struct("<8s8sQQQQQ")  # magic, kind, size, stamp and digest of the file, offsets, marked samples
Header = tuple[bytes, bytes, int, int, int]


class FileIndex:
    """The byte ranges of a file's samples. Picklable: another process maps the same index file.

    Example: "a\\nbc\\n" in lines -> len 2, ranges (0, 2) and (2, 5)
    """

    def __init__(self, path: str, kind: str, scan: Scan) -> None:
        """Builds the index if there is none or a stale one.

        Args:
          kind: at most 8 letters, a name for what `scan` finds.

        Raises:
          UserError: no such file, no sample in it, or what `scan` raises.
        """
        try:
            self.version = files.version(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.path = path
        header = (_MAGIC, kind.encode().ljust(8), *self.version)
        places = [files.cached_name(path, SUFFIX)]
        if not files.is_remote(path):
            places.insert(0, Path(path + SUFFIX))
        found = [place for place in places if _fits(place, header)]
        self.file = str(found[0] if found else _shared(path, header) or _build(path, scan, header, places))
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None
        if not len(self):
            raise UserError(f"{path}: has no samples")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.version.size

    def __len__(self) -> int:
        return len(self._map()[0]) - 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        """First byte of a sample, and the first one behind it."""
        offsets, _ = self._map()
        return int(offsets[index]), int(offsets[index + 1])

    def is_marked(self, index: int) -> bool:
        """Whether the scan marked the sample."""
        marked = self._map()[1]
        place = int(np.searchsorted(marked, np.uint64(index)))
        return place < len(marked) and int(marked[place]) == index

    def read(self, index: int) -> bytes:
        """The bytes of a sample. OSError if the file is not the one that the index is of."""
        begin, end = self[index]
        if not files.is_remote(self.path):
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) != self.version[:2]:
                now = files.version(self.path)
                if (now.size, now.digest) != (self.version.size, self.version.digest):
                    raise OSError(f"{self.path} has changed since it was opened; start again")
                self.version = now
        content = files.read_range(self.path, begin, end)
        if len(content) != end - begin:
            raise OSError(f"{self.path} has changed since it was opened; start again")
        return content

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and marked samples."""
        if self._arrays is None:
            with open(self.file, "rb") as file:
                *_, count, _ = _HEADER.unpack(file.read(_HEADER.size))
            numbers = np.memmap(self.file, "<u8", mode="r", offset=_HEADER.size)
            self._arrays = numbers[:count], numbers[count:]
        return self._arrays

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": None}


def _fits(place: Path, header: Header) -> bool:
    """Whether the index file is whole and that of the file as it is now."""
    try:
        with open(place, "rb") as file:
            *found, count, marked = _HEADER.unpack(file.read(_HEADER.size))
            size = _HEADER.size + 8 * (count + marked)
            return tuple(found) == header and os.fstat(file.fileno()).st_size == size
    except (OSError, struct.error):
        return False


def _shared(path: str, header: Header) -> Path | None:
    """A copy of the index that another machine made of a file at an address, if there is one."""
    there, place = files.shared_index(path, SUFFIX), files.cached_name(path, SUFFIX)
    if there and files.exists(there):
        with files.written_whole(str(place)) as partial:
            partial.write_bytes(files.read_file(there))
    return place if _fits(place, header) else None


def _build(path: str, scan: Scan, header: Header, places: list[Path]) -> Path:
    """Writes the index under another name in the first place that can be written, then renames it."""
    place = next((place for place in places if os.access(place.parent, os.W_OK)), places[-1])
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    size = header[2]
    marked: list[int] = []
    count = last = 0
    try:
        with open(partial, "wb") as target, Progress(f"index of {files.name_of(path)}", size, "B") as progress:
            target.seek(_HEADER.size)
            for offsets in scan(path, size, marked):
                target.write(offsets.astype("<u8").tobytes())
                count += len(offsets)
                if len(offsets):
                    progress.update(int(offsets[-1]) - last)
                    last = int(offsets[-1])
            target.write(np.array(marked, "<u8").tobytes())
            target.seek(0)
            target.write(_HEADER.pack(*header, count, len(marked)))
        partial.replace(place)
        if there := files.shared_index(path, SUFFIX):
            files.write_file(there, place.read_bytes())
    finally:
        partial.unlink(missing_ok=True)
    return place
