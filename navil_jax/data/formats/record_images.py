"""The images of a record: where they stand, how each is read, and what else in it would have to be seen."""

import base64
import binascii
import io
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from navil_jax.data.formats import files
from navil_jax.errors import UserError

IMAGE_FIELDS: tuple[str, ...] = ("images", "image", "jpg", "jpeg", "png", "webp", "img", "imgs", "picture", "photo")
# Hold images where none of IMAGE_FIELDS does.
_PATH_FIELDS = ("image_path", "image_paths", "img_path", "image_file", "image_files")
NAME_FIELDS = ("file_name", "filename", "image_name", "image_filename", "image_file_name", *_PATH_FIELDS)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
_CLIPS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
_SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a")
_OTHER_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".eps", *_CLIPS, *_SOUNDS)
# Of addresses in records. A server that does not answer ends a run, so no record may name just any.
PROTOCOLS = ("file", "memory", "gs", "gcs", "s3", "s3a", "az", "abfs", "abfss")

_SEEN = re.compile(r"image|img|video|pict?ure|photo|screenshot|thumbnail|pixel|audio", re.IGNORECASE)
_SEEN_WORDS = {"pic", "pics", "clip", "clips", "frames", "visual", "visuals"}
_WHOLE_NAMES = {"frame", "media", "vision", "sound", *(end[1:] for end in (*IMAGE_SUFFIXES, *_OTHER_SUFFIXES))}
_KINDS = {"image", "images", "video", "videos"}  # of a record, as its type or modality
# Words in the name of a field that tells something of an image beside it.
_ABOUT = re.compile(
    "ids?|index|idx|n|num|numbers?|counts?|no|width|height|w|h|sizes?|shape|ratio|aspect|ur[li]s?|links?|src|source|titles?"
    "|names?|alt|captions?|descriptions?|texts?|tags?|labels?|class|classes|category|type|format|mode|hash|sha|md|phash"
    "|license|date|time|timestamp|author|credit|scores?|aesthetic|quality|similarity|clip|embeddings?|features?|split"
    "|language|lang|exif|meta|metadata|info|status|has|is|with|tokens?|ocr|objects?|boxe?s?|bbox|questions?|answers?"
    "|prompts?|dataset|repo|domain|masks?|depth|seg|original"
)
_NAMES_ANOTHER = re.compile("ids?|ur[li]s?|links?|src|masks?|depth|seg")  # of them, those that may name another file
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_LONGEST_NAME = 4096  # characters of a file's name with its folders
_IN_OBJECT = ("bytes", "path", "url", "base64", "data", "file_name")  # where an object holds its image
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
_BASE64_START = re.compile(r"/9j/|_9j_|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK")  # of _MAGIC but for the short last one
_BASE64 = re.compile(r"[\w+/\s-]{64,}={0,2}\s*", re.ASCII)


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, or the NaN that tables have for it."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def image_values(record: Mapping[str, Any]) -> list[Any]:
    """The record's images as they stand in its fields.

    Raises:
      ValueError: two fields hold different images, or there is only an address of one.
    """
    given = {field: found for field in IMAGE_FIELDS if (found := _listed(record.get(field)))}
    if not given:
        given = {field: found for field in NAME_FIELDS if (found := _listed(_named(record, field)))}
    if given:
        (first, values), *others = given.items()
        for field, found in others:
            if not _same(values, found):
                raise ValueError(f"{first} and {field} both name images; put all of them into images")
        return values
    if _listed(record.get("url")):
        raise ValueError("has a url and no image; download the images first (img2dataset writes tars of them)")
    return []


def _named(record: Mapping[str, Any], field: str) -> Any:
    """The value of one of NAME_FIELDS; that of file_name may be something else than an image."""
    value = record.get(field)
    return None if field in ("file_name", "filename") and not _names_a_file(value) else value


def _listed(value: Any) -> list[Any]:
    if is_missing(value) or (isinstance(value, str | bytes | Mapping | Sequence) and not value):
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if several or (isinstance(value, np.ndarray) and value.dtype == object) else [value]


def _same(one: list[Any], other: list[Any]) -> bool:
    try:
        return bool(one == other)
    except ValueError:  # arrays
        return False


def check_all_seen(record: Mapping[str, Any], known: Sequence[str], images: Sequence[Any], where: str = "") -> None:
    """Raises ValueError if a field names something to be seen or heard that is not among `images`, the used ones.

    Args:
      known: fields that are used, or are text.
      where: the record's place in a larger one, for messages.
    """
    for field, value in record.items():
        if field in known or _says_nothing(value):
            continue
        words = [word.lower() for word in _WORD.findall(field)]
        if field in NAME_FIELDS:
            unread = _is_another(value, images)
        elif images and any(map(_ABOUT.fullmatch, words)):
            unread = is_seen(field) and not any(map(_NAMES_ANOTHER.fullmatch, words)) and _is_another(value, images)
        else:
            kind = not images and isinstance(value, str) and value.lower() in _KINDS
            unread = kind or is_seen(field) or _is_another(value, images)
        if unread:
            raise ValueError(f"{where}{field} names what is not read ({_short(value)}); images stand in images")


def is_seen(field: str) -> bool:
    """Whether a field, by its name, holds something to be seen or heard, or tells something of it."""
    words = {word.lower() for word in _WORD.findall(field)}
    return bool(_SEEN.search(field) or words & _SEEN_WORDS) or field.lower() in _WHOLE_NAMES


def _is_another(value: Any, images: Sequence[Any]) -> bool:
    """Whether a value is an image or a clip, or the name of one, and none of `images`.

    Beside images an address is taken for where one is from, and if they bring no names, any name for that of one.
    """
    if isinstance(value, Mapping):
        return any(_is_another(entry, images) for entry in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(_is_another(entry, images) for entry in value)
    if not _names_a_file(value) or any(
        value is image or (type(value) is type(image) and value == image) for image in images
    ):
        return False
    names = {files.name_of(image) for image in images if isinstance(image, str) and _is_file_name(image)}
    if not images or not isinstance(value, str) or not _is_file_name(value):
        return True
    if value.lower().startswith(("http://", "https://")):
        return False
    return files.name_of(value) not in names if names else not value.lower().endswith(IMAGE_SUFFIXES)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.size == 0
    if isinstance(value, Mapping):
        return all(map(_says_nothing, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(map(_says_nothing, value))
    return is_missing(value) or (isinstance(value, str | bytes | int | float | np.number | np.bool_) and not value)


def _names_a_file(value: Any) -> bool:
    """Whether a value is an image or a clip, or the name of one."""
    if isinstance(value, bytes):
        return value.startswith(_MAGIC)
    if isinstance(value, str):
        encoded = value[:11].lower().startswith(("data:image/", "data:video/")) or _is_base64(value)
        return encoded or _is_file_name(value)
    return isinstance(value, Image.Image)


def _is_file_name(text: str) -> bool:
    return (
        len(text) <= _LONGEST_NAME and "\n" not in text and text.lower().endswith((*IMAGE_SUFFIXES, *_OTHER_SUFFIXES))
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_image(value: Any, root: str) -> Image.Image | bytes:
    """One image: encoded bytes, or decoded where the record holds it so.

    Args:
      value: a path below `root`, an address of one of `PROTOCOLS`, a data: address, base64, encoded bytes, pixels, or
        an object with one of them as bytes, path, url, base64, data or file_name.

    Raises:
      ValueError, OSError: it is none of these, or cannot be read.
    """
    if isinstance(value, Mapping):
        value = next((value[name] for name in _IN_OBJECT if _listed(value.get(name))), None)
    if isinstance(value, str):
        return _read_text(value, root)
    if isinstance(value, np.ndarray):
        try:
            return Image.fromarray(value.squeeze(-1) if value.shape[-1:] == (1,) else value)
        except TypeError as error:
            raise ValueError(f"an array of {value.dtype}{list(value.shape)} is no image") from error
    if not isinstance(value, bytes | Image.Image):
        raise ValueError(f"an image must be a path or encoded bytes, not {type(value).__name__}")
    if isinstance(value, bytes) and _BASE64_START.match(start := value[:16].decode("latin-1")):
        return _from_base64(value.decode("latin-1"), start)
    return value


def _read_text(text: str, root: str) -> bytes:
    if text[:5].lower() == "data:" and not text.startswith("data://"):
        return _from_data(text)
    if _is_base64(text):
        return _from_base64(text, text[:16])
    protocol = text.partition("://")[0] if files.is_remote(text) else ""
    if protocol.lower() in ("http", "https"):
        raise ValueError(f"the image is an address ({_short(text)}); download it first")
    if protocol and protocol not in PROTOCOLS and not root.startswith(f"{protocol}://"):
        raise ValueError(f"addresses of {_short(protocol)}:// are not read from records; download or unpack the images")
    return read_path(files.join(root, text))


def read_path(path: str) -> bytes:
    """The bytes of an image's file. Of addresses, all but failures of disk and network is a ValueError."""
    try:
        return files.read_file(path)
    except (OSError, ValueError, UserError):
        raise
    except Exception as error:  # file systems and their packages raise many types
        raise ValueError(f"{_short(path)} cannot be read: {type(error).__name__}: {error}") from error


def _from_data(address: str) -> bytes:
    """The content of an address such as data:image/png;base64,iVBO..."""
    head, comma, content = address.partition(",")
    kind, *options = head[5:].lower().split(";")
    if not comma or not kind.startswith("image/"):
        raise ValueError(f"a data: address of {_short(kind) or 'nothing'}, not of an image")
    content_bytes = urllib.parse.unquote_to_bytes(content)
    return _from_base64(content_bytes.decode("latin-1"), kind) if "base64" in options else content_bytes


def _is_base64(text: str) -> bool:
    """Whether text is an image's file in base64."""
    return bool(_BASE64_START.match(text) and _BASE64.fullmatch(text))


def _from_base64(text: str, what: str) -> bytes:
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the image ({what}...) is broken base64: {error}") from error


def encoded(image: Image.Image | bytes | Any) -> bytes:
    """A sample's image as bytes of a file: as they are, or as PNG if it is decoded."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        return files.read_file(str(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
