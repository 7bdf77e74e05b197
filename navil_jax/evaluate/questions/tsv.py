"""TSV files of VLMEvalKit: base64 images in a column, read from the disk when they are asked for."""

import base64
import binascii
import functools
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.evaluate.questions.record import Record, literal_list, make_record

# A cell: quoted, with quotes doubled inside, or plain; then a tab, a line's end or the file's.
_CELL = re.compile(rb'(?:"([^"]*(?:""[^"]*)*)"|(?!")([^\t\r\n]*))(\t|\r\n|\n|\r|\Z)')
# Cells that pandas, with which these files are read, takes for missing.
_WORDS = ("", "None", "NA", "N/A", "n/a", "NaN", "nan", "-NaN", "-nan", "NULL", "null", "<NA>", "#N/A", "#N/A N/A")
MISSING = frozenset([*_WORDS, "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN"])
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LONGEST_INDEX = 64  # characters of a cell that names the row with the image


def read_tsv(path: Path, benchmark: str) -> list[Record]:
    """All questions of a file.

    Raises:
      UserError: broken, without the columns that the benchmark needs, or an image that no row has.
    """
    rows = list(_rows(path))
    _as_numbers(rows)
    at: dict[Any, int] = {}
    for number, row in enumerate(rows):
        at.setdefault(row.get("index"), number)
    found = []
    for number, row in enumerate(rows):
        where = f"{path}: row {number + 1}"
        cell = row.get("image")
        if isinstance(cell, str) and len(cell) <= LONGEST_INDEX:
            if cell not in at or isinstance(rows[at[cell]].get("image"), str):
                raise UserError(f"{where}: image: {cell!r} is no index of a row with an image")
            cell = rows[at[cell]]["image"]
        images = _images(cell, where)
        index = row.get("index")
        if not isinstance(index, str):
            raise UserError(f"{where}: has no index")
        texts = {**row, "index": int(index) if index.isdecimal() else index, "image": "" if images else None}
        found.append(make_record(benchmark, texts, images, number, where, "index"))
    return found


def _as_numbers(rows: list[dict[str, Any]]) -> None:
    """Numbers as pandas writes them, in columns that hold nothing else: 7 becomes 7.0 where a cell is missing."""
    for name in rows[0].keys() - {"index", "image"} if rows else ():
        there = [row for row in rows if row[name] is not None]
        if there and all(_NUMBER.fullmatch(row[name]) for row in there):
            whole = len(there) == len(rows) and all(row[name].lstrip("+-").isdecimal() for row in rows)
            for row in there:
                row[name] = str(int(row[name]) if whole else float(row[name]))


class _Cell:
    """A long cell of a file, read when asked for."""

    def __init__(self, content: mmap.mmap, start: int, end: int) -> None:
        self._content, self._start, self._end = content, start, end

    @property
    def is_list(self) -> bool:
        return self._content[self._start : self._start + 1] == b"["

    def text(self) -> str:
        return self._content[self._start : self._end].replace(b'""', b'"').decode()


def _rows(path: Path) -> Iterator[dict[str, str | _Cell | None]]:
    """Column -> text, None where it is missing, or a `_Cell` for a long image."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UserError(f"{path}: is empty") from None
    names: list[str] = []
    for number, cells in enumerate(_cells(path, content)):
        if not names:
            names = [content[start:end].decode().lstrip("\ufeff") for start, end in cells]
            continue
        if len(cells) != len(names):
            raise UserError(f"{path}: row {number}: has {len(cells)} cells, the head has {len(names)}")
        row: dict[str, str | _Cell | None] = {}
        for name, (start, end) in zip(names, cells, strict=True):
            if name == "image" and end - start > LONGEST_INDEX:
                row[name] = _Cell(content, start, end)
            else:
                try:
                    text = _Cell(content, start, end).text()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}: row {number}: {name}: not UTF-8 at byte {error.start}") from None
                row[name] = None if text in MISSING else text
        yield row


def _cells(path: Path, content: mmap.mmap) -> Iterator[list[tuple[int, int]]]:
    """Where the cells of each line stand; lines without anything are passed over."""
    position, number = 0, 0
    cells: list[tuple[int, int]] = []
    while position < len(content):
        cell = _CELL.match(content, position)
        if cell is None:
            raise UserError(
                f"{path}: row {number}: cell {len(cells) + 1}: a quote that does not end where the cell does"
            )
        cells.append(cell.span(1) if cell[1] is not None else cell.span(2))
        position = cell.end()
        if cell[3] != b"\t" or position == len(content):
            if cells != [(cells[0][0], cells[0][0])]:
                yield cells
                number += 1
            cells = []


def _images(cell: object, where: str) -> list[Callable[[], bytes]]:
    """One image, or those of a list."""
    if not isinstance(cell, _Cell):
        return []
    if not cell.is_list:
        return [functools.partial(_decoded, cell, None, where)]
    listed = literal_list(cell.text())
    if listed is None:
        raise UserError(f"{where}: image: is no list of images")
    return [functools.partial(_decoded, cell, number, where) for number in range(len(listed))]


def _decoded(cell: _Cell, number: int | None, where: str) -> bytes:
    text = cell.text() if number is None else (literal_list(cell.text()) or [])[number]
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError, TypeError) as error:
        raise UserError(f"{where}: image: is no base64: {error}") from None
