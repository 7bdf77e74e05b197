"""Files by path or address (gs://, s3://, memory://, ...) through one interface."""

import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec

from navil_jax.errors import UserError
from navil_jax.paths import at_home, is_remote

COMPRESSED = {  # first bytes -> ending
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
_BLOCK, _BLOCKS = 1 << 13, 16  # bytes, and how many blocks of a large file tell its version
CACHE_VARIABLE = "NAVIL_CACHE"  # environment variable: folder of indices and copies of remote files


@functools.cache
def _filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{protocol}://: {error}") from error


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or address, and the path within it.

    Raises:
      UserError: the address needs a package that is not installed (gs:// needs gcsfs), or is of no known kind.
    """
    system = _filesystem(path.partition("://")[0] if is_remote(path) else "file")
    return system, system._strip_protocol(path)


def join(root: str, name: str) -> str:
    """`name` in the folder `root`, unless it says itself where it is.

    Example: "gs://b/images", "a/1.jpg" -> "gs://b/images/a/1.jpg";  "x", "/y.jpg" -> "/y.jpg"
    """
    name, root = at_home(name), at_home(root)
    return name if is_remote(name) or os.path.isabs(name) or not root else f"{root.rstrip('/')}/{name}"


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def name_of(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def expand(path: str, suffixes: Sequence[str]) -> list[str]:
    """The files that a path names, sorted: a file, all of a folder with one of the suffixes, or a pattern.

    Patterns have *, ? and [...], or {000..127} for a range of numbers, which may go down.

    Raises:
      UserError: there is no such file, or a folder has compressed ones beside the others.

    Example: "shards/{08..10}.tar" -> ["shards/08.tar", "shards/09.tar", "shards/10.tar"]
    """
    path = at_home(path)
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        parts = [path[: numbers.start()] + name + path[numbers.end() :] for name in _numbers(*numbers.groups())]
        return [file for part in parts for file in expand(part, suffixes)]
    system, bare = filesystem(path)
    try:
        if system.isfile(bare):
            return [path]
        if system.isdir(bare):
            listed = system.ls(bare, detail=False)
            found = [file for file in listed if file.lower().endswith(tuple(suffixes))]
            others = [file for file in listed if file.lower().endswith(_compressed(suffixes))]
        else:
            listed = system.glob(bare) if glob.has_magic(bare) else []
            found, others = [file for file in listed if not file.endswith(".index")], []
    except Exception as error:  # file systems raise many types, of the network too
        raise UserError(f"{path}: cannot be listed: {error}") from error
    if others:
        raise UserError(f"{path}: {name_of(min(others))} is compressed; unpack it, or move it out of the folder")
    if not found:
        raise UserError(f"{path}: no such file, and no folder or pattern with files {', '.join(suffixes)}")
    return sorted(system.unstrip_protocol(file) if is_remote(path) else file for file in found)


def _numbers(first: str, last: str) -> list[str]:
    """Example: "08", "10" -> 08 09 10;  "5", "3" -> 5 4 3"""
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    return [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]


def _compressed(suffixes: Sequence[str]) -> tuple[str, ...]:
    """Endings of compressed files of these suffixes."""
    short = (".tgz", ".tbz", ".txz") if ".tar" in suffixes else ()
    return (*(suffix + ending for suffix in suffixes for ending in COMPRESSED.values()), *short)


def compression(start: bytes) -> str:
    """How a file that starts so is compressed, as its usual ending; empty: it is not."""
    return next((ending for magic, ending in COMPRESSED.items() if start.startswith(magic)), "")


class Version(NamedTuple):
    """What a file's content is known by: three numbers below 2**64."""

    size: int  # bytes
    stamp: int  # changes when the file is written; nanoseconds of a local file
    digest: int  # of the content's start, end and some of what is between; 0 of a file at an address


def version(path: str) -> Version:
    """The version of a file. OSError if there is none."""
    if is_remote(path):
        system, bare = filesystem(path)
        return Version(system.size(bare), int(system.ukey(bare)[:16], 16), 0)
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        return Version(status.st_size, status.st_mtime_ns, _digest(file.fileno(), status.st_size))


def _digest(file: int, size: int) -> int:
    """64 bits of a small file's content, of a large one's first and last bytes and some blocks between them."""
    digest = hashlib.blake2b(digest_size=8)
    places = range(0, size, _BLOCK) if size <= _BLOCKS * _BLOCK else (size * n // _BLOCKS for n in range(_BLOCKS))
    for place in (*places, max(0, size - _BLOCK)):
        digest.update(os.pread(file, _BLOCK, place))
    return int.from_bytes(digest.digest(), "big")


def stamp(versions: Iterable[Version]) -> str:
    """One short text for the versions of several files."""
    return hashlib.blake2b(repr([*map(tuple, versions)]).encode(), digest_size=8).hexdigest()


def fingerprint(samples: int, versions: Iterable[Version]) -> str:
    """A number of samples and a hash of their files' sizes and content. Example: 5000 samples (5c0fe6d2a1b3c4d5)"""
    content = [(version.size, version.digest) for version in versions]
    return f"{samples} samples ({hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()})"


def open_binary(path: str) -> BinaryIO:
    """The file for reading from its start."""
    system, bare = filesystem(path)
    return system.open(bare, "rb")


def read_range(path: str, begin: int, end: int) -> bytes:
    """Bytes begin..end-1. ValueError if the file ends before."""
    if is_remote(path):
        system, bare = filesystem(path)
        content = system.cat_file(bare, start=begin, end=end)
    else:
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), end - begin, begin)
    if len(content) != end - begin:
        raise ValueError(f"{path} has changed: {end - begin} bytes expected at {begin}, {len(content)} found")
    return content


def read_file(path: str) -> bytes:
    """All bytes. OSError if there is no such file."""
    if not is_remote(path):
        return Path(path).read_bytes()
    system, bare = filesystem(path)
    return system.cat_file(bare)


def cache_folder() -> Path:
    """Where indices and copies go that cannot lie beside the data."""
    folder = Path(at_home(os.environ.get(CACHE_VARIABLE, "")) or Path.home() / ".cache" / "navil_jax")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_name(path: str, suffix: str = "") -> Path:
    """A place in the cache folder for what belongs to a file."""
    whole = path if is_remote(path) else os.path.abspath(path)
    return cache_folder() / f"{hashlib.sha256(whole.encode()).hexdigest()[:16]}-{name_of(path)}{suffix}"


def local_copy(path: str) -> str:
    """A local path with the file's content: the file itself, or a copy in the cache folder, made once per version."""
    if not is_remote(path):
        return path
    size, stamp, _ = version(path)
    copy = cached_name(path, f".{stamp:016x}")
    if not copy.is_file() or copy.stat().st_size != size:
        partial = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        system, bare = filesystem(path)
        system.get_file(bare, str(partial))
        partial.replace(copy)
    return str(copy)


def write_file(path: str, content: bytes) -> None:
    """Writes a small file; it has its name only when it is whole."""
    system, bare = filesystem(path)
    if is_remote(path):
        system.pipe_file(bare, content)
        return
    partial = Path(f"{path}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    partial.replace(path)
