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
from PIL import ExifTags, Image

from navil_jax.data.formats import files
from navil_jax.data.images import FORMATS
from navil_jax.errors import UserError

IMAGE_FIELDS: tuple[str, ...] = ("images", "image", "jpg", "jpeg", "png", "webp", "img", "imgs", "picture", "photo")
# Hold images where none of IMAGE_FIELDS does.
_PATH_FIELDS = ("image_path", "image_paths", "img_path", "image_file", "image_files")
NAME_FIELDS = ("file_name", "filename", "image_name", "image_filename", "image_file_name", *_PATH_FIELDS)
_NAMES_OF_ANY = ("file_name", "filename")  # of them, those that may name another thing than an image
IMAGE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2")
IMAGE_SUFFIXES += (".jxl", ".heic", ".heif")  # each with a package of its own
CLIP_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")
_SOUNDS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus", ".wma", ".aiff")
_SHAPES = (".ply", ".pcd", ".las", ".laz", ".obj", ".glb", ".gltf", ".stl", ".npy", ".npz", ".exr", ".dcm", ".nii")
_OTHER_SUFFIXES = (".svg", ".eps", ".tga", ".ppm", ".pgm", *CLIP_SUFFIXES, *_SOUNDS, *_SHAPES)
# Of addresses in records. A server that does not answer ends a run, so no record may name just any.
PROTOCOLS = ("file", "memory", "gs", "gcs", "s3", "s3a", "az", "abfs", "abfss")

_SEEN = re.compile(r"image|img|video|pict?ure|photo|screenshot|thumbnail|pixel|audio|point_?cloud", re.IGNORECASE)
_SEEN_WORDS = {"pic", "pics", "clip", "clips", "frames", "visual", "visuals", "depth", "lidar"}
_WHOLE_NAMES = {"frame", "media", "vision", "sound"}
_WHOLE_NAMES |= {end[1:] for end in (*IMAGE_SUFFIXES, *_OTHER_SUFFIXES) if end not in _SHAPES}
_KINDS = {"image", "images", "video", "videos"}  # of a record, as its type or modality
# Words in the name of a field that tells something of an image beside it.
_ABOUT = re.compile(
    "ids?|index|idx|n|num|numbers?|counts?|no|width|height|w|h|sizes?|shape|ratio|aspect|ur[li]s?|links?|src|source|titles?"
    "|names?|alt|captions?|descriptions?|texts?|tags?|labels?|class|classes|category|type|format|mode|hash|sha|md|phash"
    "|license|date|time|timestamp|author|credit|scores?|aesthetic|quality|similarity|clip|embeddings?|features?|split"
    "|language|lang|exif|meta|metadata|info|status|has|is|with|tokens?|ocr|objects?|boxe?s?|bbox|questions?|answers?"
    "|prompts?|dataset|repo|domain|masks?|seg|original"
)
_NAMES_ANOTHER = re.compile("ids?|ur[li]s?|links?|src|masks?|seg")  # of them, those that may name another file
_HOLDS_ANOTHER = re.compile("masks?|seg")  # and those that may hold one
_OWN_NAME = re.compile("(?:files?|paths?|folders?|dir|base)(?:name|path)?|keys?|u?uid|origin|location")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_QUERY = re.compile(r"\?\w+=\S*$")  # of an address
_LONGEST_NAME = 4096  # characters of a file's name with its folders
_IN_OBJECT = ("bytes", "path", "url", "base64", "data", "file_name")  # where an object holds its image
# First bytes of images, clips, sounds and clouds of points.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|RIFF|II\*\0|MM\0\*|BM.{4}\0{4}|.{4}ftyp|\0{3}\x0cj[Px]|\x1aE\xdf\xa3|OggS|ID3|fLaC"
    rb"|\x93NUMPY|ply\r?\n|# \.PCD|LASF|v/1\x01|8BPS|FLV\x01|\0\0\x01[\xba\xb3]",
    re.DOTALL,
)
_DATA = re.compile("data:(?:image|video|audio|model)/", re.IGNORECASE)
_BASE64_START = re.compile(r"/9j/|_9j_|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK")  # of _MAGIC but for the short last one
_PNG_EXIF = (
    b"eXIf",
    b"Raw profile type exif",
    b"XML:com.adobe.xmp",
)  # without any, Pillow decodes a PNG to look for it
_BASE64 = re.compile(r"[\w+/\s-]{64,}={0,2}\s*", re.ASCII)


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, or the NaN that tables have for it."""
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def image_values(record: Mapping[str, Any]) -> list[Any]:
    """The record's images as they stand in its fields.

    Raises:
      ValueError: two fields hold different images, one is there and empty, or there is only an address of one.
    """
    given = _given(record, IMAGE_FIELDS) or _given(record, NAME_FIELDS)
    if given:
        (first, values), *others = given.items()
        for field, found in others:
            if not same(values, found):
                raise ValueError(f"{first} and {field} both name images; put all of them into images")
        return values
    for field in (*IMAGE_FIELDS, *NAME_FIELDS):
        if field not in _NAMES_OF_ANY and _listed(record.get(field)):
            raise ValueError(f"{field} is there and empty; a sample of text alone has none, or null")
    if is_given(record.get("url")):
        raise ValueError("has a url and no image; download the images first (img2dataset writes tars of them)")
    return []


def _given(record: Mapping[str, Any], fields: Sequence[str]) -> dict[str, list[Any]]:
    """The images of those of the fields that hold any. ValueError for a list with an empty one among others."""
    given = {}
    for field in fields:
        value = record.get(field)
        if field in _NAMES_OF_ANY and not _names_a_file(value):
            continue
        found = _listed(value)
        empty = [number for number, image in enumerate(found, 1) if _says_nothing(image)]
        if len(empty) < len(found):
            if empty:
                raise ValueError(
                    f"{field}: image {empty[0]} of {len(found)} is empty; an image must be a path or encoded bytes"
                )
            given[field] = found
    return given


def _listed(value: Any) -> list[Any]:
    """What stands in a field, as a list; none if it is absent, null or a list without entries."""
    if is_missing(value):
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if several or (isinstance(value, np.ndarray) and value.dtype == object) else [value]


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal; arrays, which say so element by element, are taken for different ones."""
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
        if field in known or not is_given(value):
            continue
        words = [word.lower() for word in _WORD.findall(field)]
        if field in NAME_FIELDS:
            unread = _is_another(value, images)
        elif images and any(map(_ABOUT.fullmatch, words)):
            named = is_seen(field) and not any(map(_NAMES_ANOTHER.fullmatch, words)) and _is_another(value, images)
            unread = named or (not any(map(_HOLDS_ANOTHER.fullmatch, words)) and _holds_another(value, images))
        else:
            kind = not images and isinstance(value, str) and value.lower() in _KINDS
            is_own = any(map(_OWN_NAME.fullmatch, words))
            number = "depth" in words and isinstance(value, int | float | np.number)  # of a tree, of a search
            unread = kind or (is_seen(field) and not number) or _is_another(value, images, is_own)
        if unread:
            raise ValueError(f"{where}{field} names what is not read ({_short(value)}); images stand in images")


def is_seen(field: str) -> bool:
    """Whether a field, by its name, holds something to be seen or heard, or tells something of it."""
    words = {word.lower() for word in _WORD.findall(field)}
    return bool(_SEEN.search(field) or words & _SEEN_WORDS) or field.lower() in _WHOLE_NAMES


def _is_another(value: Any, images: Sequence[Any], is_own: bool = True) -> bool:
    """Whether a value is an image or a clip, or the name of one, and none of `images`.

    Beside images an address is taken for where one is from.

    Args:
      is_own: whether any image's name is taken for that of one of `images` where these bring no names.
    """
    if _holds_another(value, images):
        return True
    if isinstance(value, Mapping):
        return any(_is_another(entry, images, is_own) for entry in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        several = [entry for entry in value if _names_a_file(entry)]
        if images and len(several) > 1:
            alike, is_own = (
                zip(several, images, strict=False),
                is_own and not any(_holds_another(e, ()) for e in several),
            )
            return len(several) != len(images) or any(_is_another(entry, [image], is_own) for entry, image in alike)
        return any(_is_another(entry, images, is_own) for entry in value)
    if not isinstance(value, str) or not _is_file_name(value) or value in [i for i in images if isinstance(i, str)]:
        return False
    if not images or value.lower().startswith(("http://", "https://")):
        return not images
    names = {files.name_of(name) for image in images if (name := _own_name(image))}
    return files.name_of(value) not in names if names else not (is_own and value.lower().endswith(IMAGE_SUFFIXES))


def _own_name(image: Any) -> str:
    """The name of its file that an image brings; empty: none."""
    if isinstance(image, Mapping):
        image = next((image[name] for name in ("path", "file_name") if is_given(image.get(name))), None)
    return image if isinstance(image, str) and _is_file_name(image) else ""


def _holds_another(value: Any, images: Sequence[Any]) -> bool:
    """Whether a value is an image or a clip itself, not by name, and none of `images`; or an object for one."""
    if any(value is image or (type(value) is type(image) and same(value, image)) for image in images):
        return False
    if isinstance(value, Mapping):
        is_image = {"bytes", "path"} <= value.keys() and is_given(value)
        return is_image or any(_holds_another(entry, images) for entry in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return any(_holds_another(entry, images) for entry in value)
    if isinstance(value, np.ndarray):
        pixels = value.dtype == np.uint8 and value.ndim > 1
        return pixels or (value.dtype == object and any(_holds_another(entry, images) for entry in value.flat))
    if isinstance(value, bytes):
        return bool(_MAGIC.match(value))
    if isinstance(value, str):
        return bool(_DATA.match(value)) or _is_base64(value)
    return isinstance(value, Image.Image)


def is_given(value: Any) -> bool:
    """Whether a field says anything: no null, nothing empty, no zero, and no list or object of these alone."""
    return not _says_nothing(value)


def is_there(value: Any) -> bool:
    """As `is_given`, where zeros and false say something, too."""
    return not _says_nothing(value, zeros=False)


def _says_nothing(value: Any, zeros: bool = True) -> bool:
    """Args: zeros: whether numbers of 0 say nothing."""
    if isinstance(value, np.ndarray):
        return value.size == 0
    if isinstance(value, Mapping):
        return all(_says_nothing(entry, zeros) for entry in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return all(_says_nothing(entry, zeros) for entry in value)
    if isinstance(value, str | bytes):
        return not value.strip()
    return is_missing(value) or (zeros and isinstance(value, int | float | np.number | np.bool_) and not value)


def _names_a_file(value: Any) -> bool:
    """Whether a value is an image or a clip, or the name of one."""
    return _holds_another(value, ()) or (isinstance(value, str) and _is_file_name(value))


def _is_file_name(text: str) -> bool:
    if len(text) > _LONGEST_NAME or "\n" in text.strip():
        return False
    return _QUERY.sub("", text.strip()).lower().endswith((*IMAGE_SUFFIXES, *_OTHER_SUFFIXES))


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
        value = next((value[name] for name in _IN_OBJECT if is_given(value.get(name))), None)
    if is_missing(value) or (isinstance(value, str | bytes) and not value.strip()):
        raise ValueError("an image is empty; it must be a path or encoded bytes")
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
    try:
        return read_path(files.join(root, text))
    except FileNotFoundError as error:
        if text == text.strip():
            raise
        raise ValueError(f"no such file: {_short(ascii(text))}, a name with blanks or line ends around it") from error


def read_path(path: str) -> bytes:
    """The bytes of an image's file. Of addresses, all but failures of disk and network is a ValueError."""
    if "\0" in path:
        raise ValueError(f"the name of an image has a null byte ({_short(path.replace(chr(0), '?'))})")
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


def size_under_boxes(image: Image.Image | bytes) -> tuple[int, int]:
    """(width, height) of an image that has boxes, of a file from its header.

    Raises:
      ValueError: it is no image, or it has an EXIF orientation, and nothing says whether the boxes are of the image as
        its pixels are stored or as programs show it.
    """
    try:
        opened = Image.open(io.BytesIO(image), formats=FORMATS) if isinstance(image, bytes) else image
        is_plain = isinstance(image, bytes) and opened.format == "PNG" and not any(mark in image for mark in _PNG_EXIF)
        orientation = 1 if is_plain else opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow raises many types on broken files
        raise ValueError(f"size and orientation of an image cannot be read: {error}") from error
    if orientation in range(2, 9):
        raise ValueError(
            f"has boxes and an image with EXIF orientation {orientation}; are they of the image as stored or as shown? "
            "remove the tag, or store the image turned (PIL.ImageOps.exif_transpose)"
        )
    return opened.size


def encoded(image: Image.Image | bytes | Any) -> bytes:
    """A sample's image as bytes of a file: as they are, or as PNG if it is decoded."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        return files.read_file(str(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
