"""Parquet files (pyarrow), read by row group."""

import bisect
import threading
from collections import OrderedDict
from typing import Any

import pyarrow
import pyarrow.parquet

from navil_jax.data.formats import files
from navil_jax.data.formats.records import RecordSource, used_columns
from navil_jax.errors import UserError

_KEPT_GROUPS = 2  # row groups in memory


class Parquet(RecordSource):
    """One parquet file. Its columns have the names of a record's fields, see `records.to_sample`.

    A sample costs the reading of its whole row group: convert files with large groups before training on them.
    """

    suffixes = (".parquet",)

    def __init__(self, path: str, root: str = "", prompt: str = "") -> None:
        super().__init__(path, root, prompt)
        self._open()
        self._starts = [0]
        for group in range(self._file.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        if not len(self):
            raise UserError(f"{path}: has no rows")

    def _open(self) -> None:
        try:
            self._file = pyarrow.parquet.ParquetFile(files.open_binary(self.path))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as parquet: {error}") from error
        self._columns = used_columns(self.path, self._file.schema_arrow.names)
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_file", "_groups", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        """`FILE.parquet#ROW`, from 1."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        group = bisect.bisect_right(self._starts, index) - 1
        try:
            return self._group(group).slice(index - self._starts[group], 1).to_pylist()[0]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"row group {group} is broken: {error}") from error

    def _group(self, group: int) -> pyarrow.Table:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=self._columns)
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]
