"""Lists of samples to leave out, one file a source, and a source without the samples of its list.

The first line says of which source the list is, the others name one sample each, in order:

    {"source": "web", "samples": 5000, "files": "5c0fe6d2a1b3c4d5", "left_out": 1}
    {"source": "web", "index": 17, "key": "web.jsonl:18", "rule": "near", "reason": "...",
     "kept": {"source": "web", "index": 3, "key": "web.jsonl:4"}}
"""

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from navil_jax.data.formats import files
from navil_jax.data.sample import Sample, Source, check_index, stamp
from navil_jax.errors import UserError


def list_file(name: str) -> str:
    """The file of a source's list in a folder of several."""
    return f"{urllib.parse.quote(name, safe='')}.leave_out.jsonl"


def list_lines(name: str, source: Source, entries: Iterable[Mapping[str, Any]], count: int) -> Iterator[str]:
    """The lines of a list. Args: entries: `count` of them, without the source's name, by ascending index."""
    yield json.dumps({"source": name, "samples": len(source), "files": stamp(source), "left_out": count}) + "\n"
    for entry in entries:
        yield json.dumps({"source": name, **entry}) + "\n"


def without(source: Source, path: str, name: str) -> "Without":
    """The source without the samples of a list.

    Args:
      path: the list, or a folder with the list of this source.

    Raises:
      UserError: there is no such list, it is of another source or of other files, or it leaves out everything.
    """
    system, bare = files.filesystem(path)
    if system.isdir(bare):
        path = files.join(path, list_file(name))
    try:
        with files.open_binary(path) as file:
            head = json.loads(file.readline())
            samples, known, count = int(head["samples"]), str(head["files"]), int(head["left_out"])
            indices = np.fromiter((json.loads(line)["index"] for line in file), np.int64)
    except OSError as error:
        raise UserError(f"source {name}: leave_out: no list can be read at {path}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"source {name}: leave_out: {path} is not a list of `data clean`") from error
    is_whole = len(indices) == count and bool(np.all(np.diff(indices) > 0)) and bool(np.all(indices >= 0))
    if not is_whole or (count and indices[-1] >= samples):
        raise UserError(f"source {name}: leave_out: {path} is not whole; make it again with `data clean`")
    if samples != len(source):
        raise UserError(f"source {name}: leave_out: {path} is of {samples:,} samples, the source has {len(source):,}")
    if known != stamp(source):
        raise UserError(
            f"source {name}: leave_out: the files have changed since {path} was made; make it again with `data clean`"
        )
    if count == samples:
        raise UserError(f"source {name}: leave_out: {path} leaves out all {samples:,} samples")
    return Without(source, indices)


@dataclasses.dataclass(frozen=True, eq=False)
class Without:
    """A source without some samples; those left move up, in their order.

    Args:
      left_out: [n] int64, ascending.

    Example: of 5 samples without 1 and 2, the samples are 0, 3, 4
    """

    source: Source
    left_out: np.ndarray

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        before = np.searchsorted(self.left_out - np.arange(len(self.left_out)), index, side="right")
        return self.source[index + int(before)]

    def texts(self) -> Iterable[str]:
        """Those of the whole source."""
        return self.source.texts()

    def versions(self) -> list[files.Version]:
        """Those of the source's files, and one of the list."""
        digest = int.from_bytes(hashlib.blake2b(self.left_out.tobytes(), digest_size=8).digest(), "big")
        own = self.source.versions() if hasattr(self.source, "versions") else []
        return [*own, files.Version(len(self.left_out), 0, digest)]

    def stamp(self) -> str:
        """What the files and the list are known by."""
        return files.stamp(self.versions())

    def fingerprint(self) -> str:
        """How many samples of which content."""
        return files.fingerprint(len(self), self.versions())
