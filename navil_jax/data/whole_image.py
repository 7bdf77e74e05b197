"""Images of which only a part is there, and which Pillow decodes all the same, filling up what is missing.

Each check is sound: no image that is whole is refused. docs/images.md says what cannot be told.
"""

import io
import re
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

MOST_ZEROS = 511  # bytes at the end of compressed pixels
ZEROS_SHARE = 0.1  # of the file; less is padding
_PROBE = b"\x5a\x3c\xa7" * 64  # bits of any JPEG code; without 0xff, which would be a marker
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7]", re.DOTALL)  # that ends coded data
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG, by its type of colour


def what_is_missing(content: bytes, image: Image.Image) -> str:
    """What a file's decoded image lacks; empty: nothing, as far as can be told.

    Args:
      content: of the file.
      image: what Pillow made of it, loaded, in the mode of the file.
    """
    check = _CHECKS.get(image.format or "")
    return check(content, image) if check else ""


def _png(content: bytes, image: Image.Image) -> str:
    """The compressed data of a PNG may end before its last row, which Pillow then leaves 0."""
    if not content.startswith(b"\x89PNG"):
        return ""
    if (zeros := _zeros_at_end(content)) and all(kind != b"IEND" for kind, _ in _png_chunks(content)):
        return zeros
    depth, colour, interlaced = content[24], content[25], content[28]
    if not interlaced and np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any():
        return ""
    expected = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        width, height = -(-(image.width - left) // across), -(-(image.height - top) // down)
        if width > 0 and height > 0:
            expected += height * (1 + -(-width * depth * _CHANNELS[colour] // 8))
    stream, found = zlib.decompressobj(), 0
    for kind, data in _png_chunks(content):
        if kind == b"IDAT" and found < expected:
            found += len(stream.decompress(data, expected - found))
    return "" if found >= expected else f"its pixels end after {found:,} of {expected:,} bytes"


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        position += 12 + length


def _jpeg(content: bytes, image: Image.Image) -> str:
    """Coded data that end early are filled up with grey by libjpeg, of which Pillow tells nothing.

    Where the last pixel is of this grey, the file is decoded again with more bits behind its data. A whole image does
    not read them; one that is short shows them.
    """
    scans = list(_scans(content))
    if not scans:
        return ""
    if scans[-1][1] == len(content) and (zeros := _zeros_at_end(content)):
        return zeros
    if b"\xff\xc2" in content[: scans[0][0]] and (rough := _unrefined([content[:start] for start, _ in scans])):
        return rough
    last = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)))
    if not np.isin(last, (127, 128)).all():
        return ""
    longer, before = b"", 0
    for start, end in scans:
        restarts = _RESTART.findall(content[start:end])
        restart = bytes((0xFF, 0xD0 + (restarts[-1][1] - 0xD0 + 1) % 8 if restarts else 0xD0))
        longer, before = longer + content[before:end] + _PROBE + restart + _PROBE, end
    with Image.open(io.BytesIO(longer + content[before:]), formats=("JPEG",)) as probed:
        try:
            same = np.array_equal(np.asarray(probed), np.asarray(image))
        except OSError:
            same = False
    return "" if same else "its coded data end before its last row"


def _scans(content: bytes) -> Iterator[tuple[int, int]]:
    """Where the coded data of each scan of the first image begin and end: at a marker other than of a restart."""
    position = 2
    while content[position : position + 1] == b"\xff" and position + 1 < len(content):
        marker = content[position + 1]
        if marker == 0xD9:
            return
        if marker == 0xFF:
            position += 1
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == 0xDA:
            found = _MARKER.search(content, position)
            start, position = position, found.start() if found else len(content)
            yield start, position


def _unrefined(heads: list[bytes]) -> str:
    """A progressive JPEG whose last scans are not there: bits were left for later, or only mean colours were sent.

    Args:
      heads: the file as far as the data of each scan.
    """
    left: dict[tuple[int, int], int] = {}  # component and coefficient -> bits that are to come
    for head in heads:
        first, last, bits = head[-3:]
        count = next((n for n in range(1, 5) if head[-6 - 2 * n : -3 - 2 * n] == bytes((0, 6 + 2 * n, n))), 0)
        if not count:  # no header that this code knows
            return ""
        for component in head[-3 - 2 * count : -3 : 2]:
            left |= {(component, coefficient): bits & 15 for coefficient in range(first, last + 1)}
    fine = any(coefficient for _, coefficient in left)
    return "" if fine and not any(left.values()) else "its last scans, which hold the fine detail, are missing"


def _webp(content: bytes, image: Image.Image) -> str:
    """The pixels of a still image are one chunk."""
    position = 12
    while position < len(content):
        kind, length = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return _zeros_at_end(content[position + 8 : position + 8 + length])
        position += 8 + length + length % 2
    return ""


def _zeros_at_end(content: bytes, image: Image.Image | None = None) -> str:
    zeros = len(content) - len(content.rstrip(b"\0"))
    unfinished = zeros > max(MOST_ZEROS, ZEROS_SHARE * len(content))
    return f"it ends in {zeros:,} bytes of 0, as a download that was not finished does" if unfinished else ""


_CHECKS: dict[str, Callable[[bytes, Image.Image], str]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "WEBP": _webp,
    "AVIF": _zeros_at_end,
    "JXL": _zeros_at_end,
    "HEIF": _zeros_at_end,
    "JPEG2000": _zeros_at_end,
    "GIF": _zeros_at_end,
}
