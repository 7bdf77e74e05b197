"""Data sets of the Hugging Face hub, by id or as a folder in its layout, read row by row without a copy on the disk."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import datasets

from navil_jax.data.formats import files
from navil_jax.data.formats.huggingface import with_names
from navil_jax.data.formats.records import Reading, RecordSource, check_columns
from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stream:
    """The files of one split.

    Attributes:
      path: `PLACE`, `PLACE#SPLIT` or `PLACE#CONFIG:SPLIT`. Example: HuggingFaceM4/the_cauldron#ai2d:train
      count: number of the files.
      stamp: what they are known by: the commit on the hub, or the time stamps of local files.
    """

    path: str
    reading: Reading
    count: int
    stamp: str

    @classmethod
    def of(cls, path: str, reading: Reading) -> "Stream":
        """Raises `UserError` if there is no such data set, configuration or split, or the hub cannot be reached."""
        data, stamp = opened(path)
        return cls(path, reading, data.num_shards, stamp)

    def file(self, number: int) -> "StreamedFile":
        """Raises OSError if the files are others by now."""
        data, stamp = opened(self.path)
        if stamp != self.stamp:
            raise OSError(f"{self.path} has changed since the conversion began; start again")
        return StreamedFile(self.path, self.reading, data.shard(self.count, number), number)


class StreamedFile(RecordSource):
    """The rows of one file, of which the last that `read_on` came to can be had."""

    def __init__(self, path: str, reading: Reading, rows: datasets.IterableDataset, number: int) -> None:
        place, _, _ = _parsed(path)
        super().__init__(path, reading, place if os.path.isdir(place) else f"hf://datasets/{place}")
        self._rows, self._number = rows, number
        self._row: dict[str, Any] = {}
        self._read = 0

    def read_on(self) -> Iterator[int]:
        """The index of each row when it has come. Raises `UserError` if the disk or the network fails."""
        try:
            for row in self._rows:
                self._row = row
                self._read += 1
                yield self._read - 1
        except Exception as error:  # of the network, of Arrow, of the package
            raise UserError(
                f"{self.path}: reading ended after {self._read:,} rows of file {self._number + 1} ({_said(error)}); "
                "the same command goes on with this file"
            ) from error

    def __len__(self) -> int:
        """Rows that were read."""
        return self._read

    def key(self, index: int) -> str:
        """`NAME/FILE#ROW`, both from 1."""
        return f"{files.name_of(self.path)}/{self._number + 1}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        features = self._rows.features or {}
        return {name: with_names(features.get(name), value) for name, value in self._row.items()}


def _parsed(path: str) -> tuple[str, str, str]:
    """Place, configuration and split. Example: a/b#small:test -> a/b, small, test"""
    place, _, rest = path.partition("#")
    config, _, split = rest.rpartition(":")
    return place, config, split or "train"


@functools.lru_cache(maxsize=4)
def opened(path: str) -> tuple[datasets.IterableDataset, str]:
    """The rows of a split, with images as they are stored, and the stamp of its files."""
    place, config, split = _parsed(path)
    try:
        builder = datasets.load_dataset_builder(place, config or None)
        data = builder.as_streaming_dataset(split)
        data = data.decode(False) if data.features else data
    except Exception as error:  # of the network, of Arrow, of the package
        raise UserError(
            f"{path}: was not saved by Dataset.save_to_disk, and cannot be opened as a data set of the hub, or a "
            f"folder like one: {_said(error)}"
        ) from error
    if data.column_names:
        check_columns(path, data.column_names)
    found = (builder.config.data_files or {}).get(split)
    known = repr((list(found or ()), getattr(found, "origin_metadata", ())))
    return data, hashlib.blake2b(known.encode(), digest_size=8).hexdigest()


def _said(error: Exception) -> str:
    """One line of what the package says."""
    return " ".join(str(error).split())[:300] or type(error).__name__
