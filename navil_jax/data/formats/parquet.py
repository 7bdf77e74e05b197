"""Parquet files (pyarrow), read by row group."""

import bisect
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from navil_jax.data.formats import files
from navil_jax.data.formats.records import READING, Reading, RecordSource, check_columns
from navil_jax.errors import UserError

_KEPT_GROUPS = 2  # row groups in memory


class Parquet(RecordSource):
    """One parquet file. Its columns have the names of a record's fields, see `records.to_sample`.

    A sample costs the reading of its whole row group: convert files with large groups before training on them.
    """

    suffixes = (".parquet",)

    def __init__(self, path: str, reading: Reading = READING) -> None:
        super().__init__(path, reading)
        self._version = self._open()
        self._starts = [0]
        for group in range(self._file.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        if not len(self):
            raise UserError(f"{path}: has no rows")

    def versions(self) -> list[files.Version]:
        return [self._version]

    def _open(self) -> files.Version:
        try:
            version = files.version(self.path)
            self._file = pyarrow.parquet.ParquetFile(files.open_binary(self.path))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as parquet: {error}") from error
        schema = self._file.schema_arrow
        check_columns(self.path, schema.names)
        self._features = _features(schema.metadata or {})
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._lock = threading.Lock()
        return version

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_file", "_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._open() != self._version:
            raise UserError(f"{self.path} has changed since it was opened; start again")

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        """`FILE.parquet#ROW`, from 1."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._starts, index) - 1
        try:
            row = self._group(group).slice(index - self._starts[group], 1)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"row group {group} is broken: {error}") from error
        row = {name: _value(name, column) for name, column in zip(row.column_names, row.columns, strict=True)}
        return {name: _with_names(self._features.get(name), value) for name, value in row.items()}

    def _group(self, group: int) -> pyarrow.Table:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group)
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]


def _value(name: str, column: pyarrow.ChunkedArray) -> Any:
    """What stands in a column of one row; short floats as NumPy's, whose text is the shortest of their own type."""
    try:
        value = column.to_pylist()[0]
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {column.type} holds a value that cannot be read: {error}") from error
    short = {pyarrow.float16(): np.float16, pyarrow.float32(): np.float32}.get(column.type)
    return short(value) if short and value is not None else value


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What the Hugging Face `datasets` package wrote of the columns, if it wrote the file."""
    try:
        return json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}


def _with_names(feature: Any, value: Any) -> Any:
    """A value of such a feature with the names of classes in the place of their numbers; -1 is no class."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, Mapping):
        return value
    if feature.get("_type") == "ClassLabel" and isinstance(value, int):
        names = feature.get("names", ())
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, list):
        return [_with_names(feature.get("feature"), entry) for entry in value]
    if isinstance(value, dict):
        return {name: _with_names(feature.get(name), entry) for name, entry in value.items()}
    return value
