"""Where the samples of a large file begin: an index file, written once and mapped into memory.

A file of samples is cut into consecutive byte ranges, one per sample. `FILE.index` holds a header of 48 bytes (magic,
kind, size and time stamp of FILE, number of offsets) and the offsets as little-endian uint64, one per sample and a last
one for the end. It lies beside FILE, or in the cache folder where that cannot be written or is remote. An index whose
size or time stamp is not that of FILE is written anew.
"""

import mmap
import os
import re
import struct
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from navil_jax.console import Progress
from navil_jax.data.formats import files
from navil_jax.errors import UserError

Kind = Literal["lines", "array", "tar"]
SUFFIX = ".index"
_MAGIC = b"navilidx"
_HEADER = struct.Struct("<8s8sQQQQ")  # magic, kind, size and stamp of the file, offsets, 0
_CHUNK = 1 << 22


class FileIndex:
    """The byte ranges of a file's samples. Picklable: another process maps the same index file.

    Example: "a\\nbc\\n" -> len 2, ranges (0, 2) and (2, 5)
    """

    def __init__(self, path: str, kind: Kind) -> None:
        """Builds the index if there is none or a stale one.

        Raises:
          UserError: no such file, no sample in it, or (kind "array") no JSON array.
        """
        try:
            header = _header(path, kind)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        self.size = header[2]  # bytes of the file
        places = [files.cached_name(path, SUFFIX)]
        if not files.is_remote(path):
            places.insert(0, Path(path + SUFFIX))
        found = [place for place in places if _fits(place, header)]
        self.file = str(found[0] if found else _build(path, kind, header, places))
        self._offsets: np.ndarray | None = None
        if not len(self):
            raise UserError(f"{path}: has no samples")

    def __len__(self) -> int:
        return len(self._map()) - 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        """First byte of a sample, and the first one behind it."""
        offsets = self._map()
        return int(offsets[index]), int(offsets[index + 1])

    def _map(self) -> np.ndarray:
        if self._offsets is None:
            self._offsets = np.memmap(self.file, "<u8", mode="r", offset=_HEADER.size)
        return self._offsets

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_offsets": None}


def _header(path: str, kind: Kind) -> tuple[bytes, bytes, int, int]:
    return (_MAGIC, kind.encode().ljust(8), *files.size_and_stamp(path))


def _fits(place: Path, header: tuple[bytes, bytes, int, int]) -> bool:
    """Whether the index file is whole and that of the file as it is now."""
    try:
        with open(place, "rb") as file:
            *found, count, _ = _HEADER.unpack(file.read(_HEADER.size))
            return tuple(found) == header and os.fstat(file.fileno()).st_size == _HEADER.size + 8 * count
    except (OSError, struct.error):
        return False


def _build(path: str, kind: Kind, header: tuple[bytes, bytes, int, int], places: list[Path]) -> Path:
    """Writes the index under another name in the first place that can be written, then renames it."""
    place = next((place for place in places if os.access(place.parent, os.W_OK)), places[-1])
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    size = header[2]
    count = last = 0
    try:
        with open(partial, "wb") as target, Progress(f"index of {files.name_of(path)}", size, "B") as progress:
            target.seek(_HEADER.size)
            for offsets in _SCANS[kind](path, size):
                target.write(offsets.astype("<u8").tobytes())
                count += len(offsets)
                if len(offsets):
                    progress.update(int(offsets[-1]) - last)
                    last = int(offsets[-1])
            target.seek(0)
            target.write(_HEADER.pack(*header, count, 0))
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
    return place


def _scan_lines(path: str, size: int) -> Iterator[np.ndarray]:
    """0 and the place behind every newline; blank lines at the end of the file do not count."""
    with files.open_binary(path) as file:
        end = _content_end(file, size)
        file.seek(0)
        position = 0
        yield np.zeros(1, np.int64)
        while position < end:
            chunk = file.read(min(_CHUNK, end - position))
            if not chunk:
                raise UserError(f"{path}: became shorter while it was read")
            yield np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (position + 1)
            position += len(chunk)
        if end:
            yield np.array([end])


def _content_end(file: BinaryIO, size: int) -> int:
    """Place behind the last byte that is no blank."""
    while size:
        start = max(0, size - _CHUNK // 16)
        file.seek(start)
        if content := file.read(size - start).rstrip():
            return start + len(content)
        size = start
    return 0


_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(_STRING + rb'|[^\s"\[\]{},]++|\S', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+[\[\]{}]", re.DOTALL)


def _scan_array(path: str, size: int) -> Iterator[np.ndarray]:
    """Starts of the elements of one JSON array, and the place of its closing bracket."""
    if not size:
        raise UserError(f"{path}: is empty, a JSON array is needed")
    with open(files.local_copy(path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        opening = re.match(rb"\s*+\[", content)
        if not opening:
            raise UserError(f"{path}: is no JSON array of samples; name files of one sample a line *.jsonl")
        position, begins = opening.end(), True
        starts: list[int] = []
        while position and (token := _TOKEN.search(content, position)):
            first, position = token[0][:1], token.end()
            if first == b"]":
                yield np.array([*starts, token.start()])
                return
            if first != b"," and begins:
                starts.append(token.start())
            begins = first == b","
            if first in (b"[", b"{"):
                position = _behind_brackets(content, position)
            if len(starts) >= 1 << 16:
                yield np.array(starts[:-1])
                starts = starts[-1:]
    raise UserError(f"{path}: the JSON array does not end; the file is cut off or lacks a bracket")


def _behind_brackets(content: mmap.mmap, position: int) -> int:
    """Place behind the bracket that closes the one just before `position`; 0 if there is none."""
    depth = 1
    while depth and (match := _TO_BRACKET.match(content, position)):
        position = match.end()
        depth += 1 if content[position - 1] in b"[{" else -1
    return 0 if depth else position


def _scan_tar(path: str, size: int) -> Iterator[np.ndarray]:
    """Starts of runs of members with the same key, and the end of the last. A cut-off end belongs to the last run."""
    with files.open_binary(path) as file:
        try:
            archive = tarfile.TarFile(fileobj=file)
        except tarfile.TarError as error:
            raise UserError(f"{path}: is no tar file ({error}); compressed ones must be unpacked first") from error
        key, starts, end = None, [], 0
        while True:
            try:
                member = archive.next()
            except tarfile.TarError:
                end = size
                break
            if member is None:  # the end, which is a block of zeros, or a header that cannot be read
                file.seek(end)
                end += len(file.read(tarfile.BLOCKSIZE).strip(b"\0")) and tarfile.BLOCKSIZE
                break
            archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            if member.isfile() and (found := tar_key(member.name)[0]) != key:
                key = found
                starts.append(member.offset)
            end = archive.offset
            if len(starts) >= 1 << 10:
                yield np.array(starts[:-1])
                starts = starts[-1:]
        yield np.array([*starts, min(end, size)])


def tar_key(name: str) -> tuple[str, str]:
    """A member's key and its extension in lower case: the base name is cut at its first dot.

    Example: "a.b/0001.seg.PNG" -> ("a.b/0001", "seg.png")
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


_SCANS: dict[Kind, Callable[[str, int], Iterator[np.ndarray]]] = {
    "lines": _scan_lines,
    "array": _scan_array,
    "tar": _scan_tar,
}


def line_number(path: str, offset: int) -> int:
    """The line, from 1, in which a byte stands."""
    lines = 1
    with files.open_binary(path) as file:
        while offset and (chunk := file.read(min(_CHUNK, offset))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines
