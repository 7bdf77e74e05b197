"""LLaVA's JSON and JSON lines, read through an offset index: the file is never loaded whole."""

from typing import Any

from navil_jax.data.formats import files
from navil_jax.data.formats.index import FileIndex
from navil_jax.data.formats.records import READING, Reading, RecordSource, parse_json
from navil_jax.data.formats.scan_json import line_number, scan_array, scan_lines
from navil_jax.errors import UserError

_TABLES = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".tar")  # of other kinds, or none


class Llava(RecordSource):
    """`FILE.jsonl` (or .ndjson), a record a line, or `FILE.json`, one array of records.

    Example of a record: {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
      {"from": "gpt", "value": "A cat."}]}; "image" may be a list, or missing in a sample of text alone.
    """

    suffixes = (".jsonl", ".json", ".ndjson")

    def __init__(self, path: str, reading: Reading = READING) -> None:
        super().__init__(path, reading)
        if path.lower().endswith(_TABLES):
            raise UserError(f"{path}: is neither JSON lines nor a JSON array; write its rows as JSON lines")
        self._array = path.lower().endswith(".json")
        self._index = FileIndex(path, "array", scan_array) if self._array else FileIndex(path, "lines", scan_lines)

    def versions(self) -> list[files.Version]:
        return [self._index.version]

    def __len__(self) -> int:
        return len(self._index)

    def key(self, index: int) -> str:
        """`FILE.jsonl:LINE`, or `FILE.json#NUMBER`, both from 1."""
        return f"{files.name_of(self.path)}{'#' if self._array else ':'}{index + 1}"

    def place(self, index: int) -> str:
        return f"line {line_number(self.path, self._index[index][0])}: " if self._array else ""

    def record(self, index: int) -> Any:
        content = self._index.read(index).strip()
        if self._array:
            content = content.removesuffix(b",")
        if not content:
            raise ValueError("the line is empty")
        return parse_json(content)
