"""Where the records of JSON lines and of one JSON array begin, for `index.FileIndex`."""

import json
import mmap
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from navil_jax.data.formats import files
from navil_jax.errors import UserError

_CHUNK = 1 << 22
_LOOKED_AT = 1 << 16  # bytes from which it is told whether a file has lines of JSON
_MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(_STRING + rb'|[^\s"\[\]{},]++|\S', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+[\[\]{}]", re.DOTALL)


def check_text(path: str, start: bytes) -> None:
    """Raises `UserError`, with what to do, if a file that starts so is compressed, or text of another encoding."""
    if ending := files.compression(start):
        raise UserError(f"{path}: is compressed ({ending[1:]}); unpack it first, samples are read from any place of it")
    encoding = next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), "")
    if encoding == "UTF-16" and start[2:4] == b"\0\0":
        encoding = "UTF-32"
    if not encoding and (bare := start[:4].replace(b"\0", b"")) and bare[:1] in b"[{" and b"\0" in start[:2]:
        encoding = "UTF-32" if len(bare) == 1 else "UTF-16"
    if encoding:
        raise UserError(f"{path}: is {encoding}; make it UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW")


def scan_lines(path: str, size: int, marked: list[int]) -> Iterator[np.ndarray]:
    """The first byte, and the place behind every newline; blank lines at the end of the file do not count."""
    with files.open_binary(path) as file:
        start = file.read(_LOOKED_AT)
        check_text(path, start[:4])
        _check_lines(path, start)
        end = _content_end(file, size)
        position = len(_MARK) if start.startswith(_MARK) else 0
        file.seek(position)
        yield np.array([position])
        while position < end:
            chunk = file.read(min(_CHUNK, end - position))
            if not chunk:
                raise UserError(f"{path}: became shorter while it was read")
            yield np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + (position + 1)
            position += len(chunk)
        if end > (len(_MARK) if start.startswith(_MARK) else 0):
            yield np.array([end])


def _check_lines(path: str, start: bytes) -> None:
    """Raises `UserError`, with what to do, for a file that is no record a line, as its start shows."""
    if b"\r" in start.rstrip() and b"\n" not in start:
        raise UserError(f"{path}: its lines end in \\r alone; end them in \\n: tr '\\r' '\\n' < OLD > NEW")
    text = start.removeprefix(_MARK).decode(errors="replace").lstrip()
    opening = re.match(r"\[\s*+", text)
    try:
        record, end = json.JSONDecoder().raw_decode(text, opening.end() if opening else 0)
    except (ValueError, RecursionError):
        return
    is_record, more = isinstance(record, dict) and bool(record), text[end:].lstrip()
    comma = re.match(r",\s*+(?=\{)", more)
    if is_record and opening and (comma or more[:1] == "]") and "\n" in text[:end] + (comma[0] if comma else ""):
        raise UserError(f"{path}: is one JSON array, not a record a line; call it *.json")
    if is_record and not opening and "\n" in text[:end]:
        raise UserError(f"{path}: its first record is spread over several lines; write one a line: jq -c . OLD > NEW")


def _content_end(file: BinaryIO, size: int) -> int:
    """Place behind the last byte that is no blank."""
    while size:
        start = max(0, size - _CHUNK // 16)
        file.seek(start)
        if content := file.read(size - start).rstrip():
            return start + len(content)
        size = start
    return 0


def scan_array(path: str, size: int, marked: list[int]) -> Iterator[np.ndarray]:
    """Starts of the elements of one JSON array, and the place of its closing bracket."""
    if not size:
        raise UserError(f"{path}: is empty, a JSON array is needed")
    with open(files.local_copy(path), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        check_text(path, content[:4])
        opening = re.match(rb"(?:\xef\xbb\xbf)?\s*+\[", content)
        if not opening:
            raise UserError(f"{path}: is no JSON array of samples; name files of one sample a line *.jsonl")
        position, begins = opening.end(), True
        starts: list[int] = []
        while position and (token := _TOKEN.search(content, position)):
            first, position = token[0][:1], token.end()
            if first == b"]":
                _check_end(path, content, position)
                yield np.array([*starts, token.start()])
                return
            if first != b"," and begins:
                starts.append(token.start())
            begins = first == b","
            if first in (b"[", b"{"):
                position = _behind_brackets(content, position)
            if len(starts) >= 1 << 16:
                yield np.array(starts[:-1])
                starts = starts[-1:]
    raise UserError(f"{path}: the JSON array does not end; the file is cut off or lacks a bracket")


def _check_end(path: str, content: mmap.mmap, position: int) -> None:
    """Raises `UserError` if anything but blanks stands behind the array, such as a second one."""
    if more := re.compile(rb"\S").search(content, position):
        line = line_number(path, more.start())
        raise UserError(f"{path}: line {line}: there is more behind the end of the JSON array; put all into one array")


def _behind_brackets(content: mmap.mmap, position: int) -> int:
    """Place behind the bracket that closes the one just before `position`; 0 if there is none."""
    depth = 1
    while depth and (match := _TO_BRACKET.match(content, position)):
        position = match.end()
        depth += 1 if content[position - 1] in b"[{" else -1
    return 0 if depth else position


def line_number(path: str, offset: int) -> int:
    """The line, from 1, in which a byte stands."""
    lines = 1
    with files.open_binary(path) as file:
        while offset and (chunk := file.read(min(_CHUNK, offset))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines
