"""Where the samples of a tar begin, for `index.FileIndex`."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from navil_jax.data.formats import files
from navil_jax.errors import UserError

_CHUNK = 1 << 22


def scan_tar(path: str, size: int, marked: list[int]) -> Iterator[np.ndarray]:
    """Starts of runs of members with the same key, and the end of the last. A cut-off end belongs to the last run.

    Runs whose key another run has, too, are marked: members of one sample stand apart.
    """
    with files.open_binary(path) as file:
        archive = _open(path, file)
        runs: dict[str, int] = {}  # key -> its first run
        key, end = None, 0
        starts: list[int] = []
        while True:
            try:
                member = archive.next()
            except tarfile.TarError:
                end = size
                break
            if member is None:  # the end, which is a block of zeros, or a header that cannot be read
                file.seek(end)
                end += len(file.read(tarfile.BLOCKSIZE).strip(b"\0")) and tarfile.BLOCKSIZE
                _check_end(path, file, end)
                break
            archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            found = None if member.isdir() else tar_key(member.name)
            if found and found[0] != key:
                key = found[0]
                if (first := runs.setdefault(key, len(starts))) != len(starts):
                    marked += [first, len(starts)]
                starts.append(member.offset)
            end = archive.offset
        marked[:] = sorted(set(marked))
        yield np.array([*starts, min(end, size)])


def _open(path: str, file: BinaryIO) -> tarfile.TarFile:
    if ending := files.compression(file.read(8)):
        raise UserError(f"{path}: is compressed ({ending[1:]}); unpack it first, samples are read from any place of it")
    file.seek(0)
    try:
        return tarfile.TarFile(fileobj=file)
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no tar file ({error})") from error


def _check_end(path: str, file: BinaryIO, end: int) -> None:
    """Raises `UserError` if a whole tar ends before its file does, as joined ones do."""
    file.seek(end)
    start = file.read(tarfile.BLOCKSIZE)
    while not start.strip(b"\0") and (chunk := file.read(_CHUNK)):
        if chunk.strip(b"\0"):
            raise UserError(f"{path}: there is more behind the tar's end; of joined tars, give each one alone")


def tar_key(name: str) -> tuple[str, str] | None:
    """A member's key and its extension in lower case: the base name is cut at its first dot.

    None for hidden files, such as those that macOS puts beside others.

    Example: "./a.b/0001.seg.PNG" -> ("a.b/0001", "seg.png");  "a/._0001.png" -> None
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else None
