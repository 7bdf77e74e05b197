"""ArrayRecord with records of our own: the format to train from.

A record is the byte 1 (version) and a msgpack map: key, kind, system (text or nil), turns ([[question, answer], ...]),
images (encoded files), and bbox_type where its turns have boxes. Shards are called NAME-00003-of-00008.array_record.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from navil_jax.data.formats import files
from navil_jax.data.formats.record_images import encoded
from navil_jax.data.formats.records import READING, Reading, RecordSource
from navil_jax.data.sample import Sample
from navil_jax.errors import UserError

VERSION = 1
SUFFIX = ".array_record"
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})" + re.escape(SUFFIX))
_READ_IN_PLACE = ("gs://",)  # addresses that the reader itself understands


def shard_name(number: int, shards: int, name: str = "data") -> str:
    """Example: 3, 8 -> data-00003-of-00008.array_record"""
    return f"{name}-{number:05}-of-{shards:05}{SUFFIX}"


def pack(sample: Sample) -> bytes:
    """A sample as the bytes of a record. UserError or OSError if an image cannot be read."""
    fields = {
        "key": sample.key,
        "kind": sample.kind,
        "system": sample.system,
        "turns": sample.turns,
        "images": [encoded(image) for image in sample.images],
    }
    if sample.grounded:
        fields["bbox_type"] = "norm1000"
    return bytes([VERSION]) + msgpack.packb(fields)


def unpack(record: bytes) -> dict[str, Any]:
    """The fields of a record. ValueError if it is none, or of a later version."""
    if record[:1] != bytes([VERSION]):
        raise ValueError(f"a record of version {record[0] if record else 'none'}; this program reads {VERSION}")
    try:
        fields = msgpack.unpackb(record[1:])
    except Exception as error:  # msgpack raises types without a common one
        raise ValueError(f"not a record: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("not a record: it has no fields")
    return fields


def write_shard(path: str, records: Iterable[bytes]) -> None:
    """Writes one file of packed samples, which has its name only when it is whole."""
    with files.written_whole(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1,zstd:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()


def count_records(path: str) -> int:
    """How many records a file has."""
    reader = ArrayRecordReader(_readable(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _readable(path: str) -> str:
    """What the format's own reader understands: the path, or that of a copy."""
    return path if path.startswith(_READ_IN_PLACE) else files.local_copy(path)


class ArrayRecord(RecordSource):
    """All shards of a folder, or the files that a pattern names."""

    suffixes = (SUFFIX,)

    def __init__(self, path: str, reading: Reading = READING) -> None:
        super().__init__(path, reading)
        self._shards = shards = files.expand(path, self.suffixes)
        if shards != [path] and not glob.has_magic(path) and "{" not in path:  # then the path is a folder's
            _check_complete(path, shards)
        try:
            self._records = grain.sources.ArrayRecordDataSource(list(map(_readable, shards)))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read as ArrayRecord, copy or convert it again: {error}") from error
        if not len(self):
            raise UserError(f"{path}: has no samples")

    def versions(self) -> list[files.Version]:
        return [files.version(shard) for shard in self._shards]

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """`FOLDER#NUMBER`, from 1, for records that cannot be read; others have the key of their origin."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        try:
            content = self._records[index]
        except RuntimeError as error:
            raise ValueError(f"the file is broken here: {error}") from error
        return unpack(content)


def _check_complete(folder: str, shards: list[str]) -> None:
    """Raises `UserError` if a folder lacks some of its shards."""
    found: Counter[tuple[str, int]] = Counter()
    for shard in shards:
        if match := _SHARD.fullmatch(shard):
            found[files.name_of(match[1]), int(match[2])] += 1
    for (name, wanted), count in found.items():
        if count != wanted:
            raise UserError(f"{folder}: {count} of {wanted} shards of {name}; run the conversion again, it goes on")
