"""Files by path or address (gs://, s3://, memory://, ...) through one interface."""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
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
LFS_POINTER = b"version https://git-lfs"
POINTER = "is a pointer of Git LFS, not the file itself; git lfs pull fetches it"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_MAY_BE_DATA = re.compile(r"\.(?:jsonl?|ndjson|parquet|tar|arrow|csv|tsv|array_record|tfrecord)\b")
_OWN = re.compile(r"\.index$|\.bad\.jsonl$|^conversion\.json$")  # what this program writes beside data
LOOKED_AT, _DEPTH = 10_000, 4  # files, and folders within folders, that are looked through for more data
AHEAD = 1 << 24  # bytes
_BLOCK, _BLOCKS = 1 << 13, 16  # bytes, and how many blocks of a large file tell its version
PART = ".part"  # ending of a file that is being written, or was when its process was killed
PARTIAL = f"*.{'[0-9a-f]' * 32}{PART}"  # pattern of their names
SHARED_VARIABLE = "NAVIL_INDICES"  # environment variable: folder, at an address, of indices that all machines share
CACHE_VARIABLE = "NAVIL_CACHE"  # environment variable: folder of indices and copies of remote files


@functools.cache
def filesystem_of(protocol: str) -> fsspec.AbstractFileSystem:
    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{protocol}://: {error}") from error


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or address, and the path within it.

    Raises:
      UserError: the address needs a package that is not installed (gs:// needs gcsfs), or is of no known kind.
    """
    system = filesystem_of(path.partition("://")[0] if is_remote(path) else "file")
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

    Patterns have *, ? and [...], {a,b} for one or the other, or {000..127} for a range of numbers, which may go down.

    Raises:
      UserError: there is no such file, or a folder has compressed ones beside the others.

    Example: "shards/{08..10}.tar" -> ["shards/08.tar", "shards/09.tar", "shards/10.tar"]
    """
    path = at_home(path)
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        parts = [path[: numbers.start()] + name + path[numbers.end() :] for name in _numbers(*numbers.groups())]
        return list(dict.fromkeys(file for part in parts for file in expand(part, suffixes)))
    system, bare = filesystem(path)
    if (choice := re.search(r"\{([^{}]*,[^{}]*)\}", path)) and not os.path.lexists(path):
        parts = [path[: choice.start()] + name + path[choice.end() :] for name in choice[1].split(",")]
        return list(dict.fromkeys(file for part in parts for file in expand(part, suffixes)))
    try:
        if system.isfile(bare):
            return [path]
        if system.isdir(bare):
            listed = [file for file in system.ls(bare, detail=False) if not name_of(file).startswith(".")]
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
        raise UserError(f"{path}: {_what_is_there(path, suffixes)}")
    return sorted(system.unstrip_protocol(file) if is_remote(path) else file for file in found)


def _what_is_there(path: str, suffixes: Sequence[str]) -> str:
    """Why a path names no files."""
    system, bare = filesystem(path)
    wanted = f"files {', '.join(suffixes)}"
    if glob.has_magic(bare):
        return f"no file is called so; the pattern finds no {wanted}"
    if system.isdir(bare):
        listed = sorted(system.ls(bare, detail=False))
        return f"the folder has no {wanted}" + (f", but {name_of(listed[0])}" if listed else "; it is empty")
    return "no such file, and no folder or pattern with " + wanted if is_remote(path) else what_is_wrong(path)


def what_is_wrong(path: str) -> str:
    """What a local path is that cannot be read as a file. Example: "a.jpg" -> a link to b.jpg, which is not there"""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which is not there"
    if not os.path.exists(path):
        return "no such file"
    mode = os.stat(path).st_mode
    return next((f"{kind}, not a file" for holds, kind in _KINDS if holds(mode)), "cannot be read")


def _check_is_file(path: str) -> None:
    """Raises OSError for what is there and no file; to open a pipe would wait for ever."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.ENXIO, what_is_wrong(path), path)


def passed_over(folder: str, suffixes: Sequence[str]) -> list[str]:
    """What is in a folder, or below a local one, and may be data that `expand` leaves out; looks at `LOOKED_AT` files.

    Example: a folder of a.jsonl, a.json.bak and more/b.jsonl -> [".../a.json.bak", ".../more/b.jsonl"]
    """
    system, bare = filesystem(at_home(folder))
    found, looked_at = [], 0
    for place, folders, names in system.walk(bare, maxdepth=1 if is_remote(folder) else _DEPTH):
        is_below = place.rstrip("/") != bare.rstrip("/")
        if "/." in place.removeprefix(bare):
            continue
        for name in names:
            plain = name.lower()
            read = plain.endswith(tuple(suffixes)) and not is_below
            if not read and _MAY_BE_DATA.search(plain) and not plain.startswith(".") and not _OWN.search(plain):
                found.append(join(place, name))
        looked_at += len(names) + len(folders)
        if looked_at > LOOKED_AT:
            break
    return sorted(found)


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


def check_is_content(path: str) -> None:
    """Raises `UserError` for a local file that only stands for another one, or is a page of a web site."""
    if is_remote(path) or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path}: {POINTER}")
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html)\b", start, re.IGNORECASE):
        raise UserError(f"{path}: is a web page, not data; look what the address that it is from says in a browser")


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
    _check_is_file(path)
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


def total_size(paths: Sequence[str]) -> int:
    """Bytes of some files."""
    return sum(system.size(bare) for system, bare in map(filesystem, paths))


def open_binary(path: str) -> BinaryIO:
    """The file for reading from its start."""
    system, bare = filesystem(path)
    return system.open(bare, "rb")


class _ReadAhead(threading.local):
    """What a thread has read of a file at an address; once it reads on where it ended, a block is read at a time."""

    path, begin, content, end = "", 0, b"", -1  # of the content, and where the last range ended

    def read(self, path: str, begin: int, end: int) -> bytes:
        if path != self.path or not self.begin <= begin <= end <= self.begin + len(self.content):
            reads_on = (path, begin) == (self.path, self.end)
            system, bare = filesystem(path)
            self.content = system.cat_file(bare, start=begin, end=max(end, begin + AHEAD) if reads_on else end)
            self.path, self.begin = path, begin
        self.end = end
        return self.content[begin - self.begin : end - self.begin]


_read_ahead = _ReadAhead()


def read_range(path: str, begin: int, end: int) -> bytes:
    """Bytes begin..end-1; ranges of a remote file that follow each other cost a request per `AHEAD` bytes.

    Raises:
      ValueError: the file ends before.
    """
    if is_remote(path):
        content = _read_ahead.read(path, begin, end)
    else:
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), end - begin, begin)
    if len(content) != end - begin:
        raise ValueError(f"{path} has changed: {end - begin} bytes expected at {begin}, {len(content)} found")
    return content


def read_file(path: str) -> bytes:
    """All bytes. OSError if there is no such file."""
    if not is_remote(path):
        _check_is_file(path)
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


def shared_index(path: str, suffix: str) -> str:
    """Where the index of a file at an address is kept for all machines; empty: nowhere, or the file is local."""
    folder = os.environ.get(SHARED_VARIABLE, "")
    return join(folder, cached_name(path, suffix).name) if folder and is_remote(path) else ""


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


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[Path]:
    """A local path to write a large file to; then it gets its name or goes to its address, unless writing failed."""
    suffix = f".{uuid.uuid4().hex}{PART}"
    partial = cached_name(path, suffix) if is_remote(path) else Path(at_home(path) + suffix)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if is_remote(path):
            system, bare = filesystem(path)
            system.put_file(str(partial), bare)
        else:
            partial.replace(at_home(path))
    finally:
        partial.unlink(missing_ok=True)


def exists(path: str) -> bool:
    system, bare = filesystem(path)
    return system.exists(bare)


def remove_folder(path: str) -> None:
    """Removes a folder with all that is in it, if there is one."""
    system, bare = filesystem(path)
    if system.exists(bare):
        system.rm(bare, recursive=True)


def write_file(path: str, content: bytes) -> None:
    """Writes a small file; it has its name only when it is whole."""
    system, bare = filesystem(path)
    if is_remote(path):
        system.pipe_file(bare, content)
        return
    with written_whole(path) as partial:
        partial.write_bytes(content)
