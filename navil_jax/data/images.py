"""Images -> patches: any resolution, several scales, the encoder's order (paper section 3.2; released preprocessing).

An image keeps its own size unless it has too few or too many pixels, is padded with black at the bottom and the right
to whole merged units, and comes again in smaller copies, each with about half the pixels of the one before. Every copy
is made from the original image. One call handles one image, so no limit carries over between images.

EXIF rotation is not applied: an image is taken as its pixels are stored, as the released code takes it. Only the
orientation of a TIFF is, by Pillow itself, as in the released code, and that of HEIC, whose decoder applies it.
"""

import dataclasses
import functools
import io
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data.whole_image import what_is_missing
from navil_jax.errors import UserError

try:
    from navil_jax.data.resampling import cut, resize
except ImportError:  # no Numba, or one that does not fit the other packages
    from navil_jax.data.pillow_resampling import cut, resize

MAX_ASPECT_RATIO = 200  # long side against short side (released preprocessing)
# Formats of Pillow that are read; EPS and others start programs, or are of no images that people train on.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "DIB", "ICO")
try:
    import pillow_jxl  # noqa: F401  # with it Pillow reads JPEG XL
except ImportError:
    _JPEG_XL = "JPEG XL, which Pillow reads with another package: pip install pillow-jxl-plugin"
else:
    FORMATS = (*FORMATS, "JXL")
    _JPEG_XL = "a broken JPEG XL"
try:
    import pillow_heif
except ImportError:
    _HEIC = "HEIC, which Pillow reads with another package: pip install pillow-heif"
else:
    pillow_heif.register_heif_opener()  # with it Pillow reads HEIC
    FORMATS = (*FORMATS, "HEIF")
    _HEIC = "a broken HEIC"
MAX_PIXELS = 89_478_485  # of an image before it is resized, seen in the file's header; from here Pillow warns of bombs
_PNG = b"\x89PNG\r\n\x1a\n"
_NOT_READ = {  # first bytes of what people take for images
    "EPS or PostScript": (b"%!ps", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%pdf",),
    "SVG or HTML": (b"<svg", b"<?xml", b"<!doctype", b"<html", b"<!--"),
    "Photoshop": (b"8bps",),
    "a video": (b"\x1aE\xdf\xa3".lower(), b"flv\x01"),
}
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_LFS_POINTER = b"version https://git-lfs"


class Scale(NamedTuple):
    """One copy of an image: its size in pixels before padding, and the padded grid in patches."""

    height: int
    width: int
    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)
class ImagePatches:
    """The patches of one image in the order in which the encoder reads them; p patches over all scales."""

    patches: np.ndarray  # [p, 3 * patch_size**2] uint8, each patch channel first
    coords: np.ndarray  # [p, 2] int32, (row, column) in the patch's own scale
    blocks: np.ndarray  # [p] int32, number of the scale, from 1
    grids: tuple[tuple[int, int], ...]  # (rows, columns) in patches, smallest scale first


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float | np.float32
) -> tuple[int, int]:
    """The size that an image gets: its own unless the pixels leave [min_pixels, max_pixels]; ratio kept.

    Args:
      height, width: of the image, in pixels.
      factor: both sides become multiples of it (the released preprocessing uses 1).
      min_pixels, max_pixels: limits of height * width. A float32 maximum is divided in single precision, as the
        released code does for every scale after the first; in rare sizes that moves a side by one pixel.

    Raises:
      UserError: a side is shorter than factor, or the sides' ratio is above 200.

    Example: smart_resize(192, 256, 1, 65536, 6291456) -> (222, 296)
    """
    if min(height, width) < factor:
        raise UserError(f"image of {width} x {height} pixels: both sides must have at least {factor}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(f"image of {width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(_ratio(height * width, max_pixels))
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def _ratio(pixels: int, max_pixels: float | np.float32) -> float:
    """pixels / max_pixels; in float32, by way of the rounded reciprocal, where max_pixels is a float32."""
    if isinstance(max_pixels, np.float32):
        return float(np.float32(1) / max_pixels * np.float32(pixels))
    return pixels / max_pixels


def plan_scales(height: int, width: int, images: ImageConfig, vision: VisionConfig) -> list[Scale]:
    """The scales of a picture of height x width pixels, smallest first (released preprocessing).

    Raises:
      UserError: as `smart_resize` with factor 1.

    Example, with the defaults: 640 wide, 480 high -> patch grids 16 x 22, 22 x 30, 30 x 40
    """
    return list(_scales(height, width, images, vision))


@functools.lru_cache(maxsize=4096)
def _scales(height: int, width: int, images: ImageConfig, vision: VisionConfig) -> list[Scale]:
    area = vision.patch_size**2
    unit = vision.patch_size * vision.merge_size
    min_pixels: int = images.min_patches * area
    max_pixels: int | np.float32 = images.max_patches * area
    scales: list[Scale] = []
    while True:
        new_height, new_width = smart_resize(height, width, 1, min_pixels, max_pixels)
        rows, cols = (-(-side // unit) * vision.merge_size for side in (new_height, new_width))
        if scales and rows * cols >= scales[0].rows * scales[0].cols:
            return scales
        scales.insert(0, Scale(new_height, new_width, rows, cols))
        max_pixels = np.float32(rows * cols * area) * np.float32(images.scale_factor**2)
        if not images.multiscale or max_pixels < min_pixels:
            return scales


def largest_scale(images: ImageConfig, vision: VisionConfig) -> int:
    """No scale of any image has more patches: rounding up to whole units adds most to one that is long and thin."""
    unit, pixels = vision.patch_size * vision.merge_size, images.max_patches * vision.patch_size**2
    short = math.sqrt(pixels / MAX_ASPECT_RATIO)
    units = math.prod((side + unit + 1) / unit for side in (short, short * MAX_ASPECT_RATIO))
    return math.floor(units) * vision.unit_patches


def load_image(source: str | Path | bytes | Image.Image, name: str = "") -> Image.Image:
    """Decodes an image to RGB as the released code does: alpha is dropped, grey and palette are expanded.

    Grey images of 16 bits become their upper 8, as Pillow makes colours of 16 bits; the released code clips them to
    white. A TIFF in which 0 is white is inverted, which Pillow does at 8 bits only. docs/images.md says what becomes of
    every kind of image.

    Args:
      source: a path, a file's bytes, or an image. Of an animation or of several pages the first counts.
      name: of the image in messages; empty: the path.

    Raises:
      UserError: missing, not an image, broken or cut off, of more than `MAX_PIXELS` pixels, empty, one side over 200
        times the other, or of 32-bit pixels. The message names the image.
      TypeError: it is none of these.
    """
    if not isinstance(source, str | os.PathLike | bytes | Image.Image):
        array = "; PIL.Image.fromarray(array) makes one of an array" if isinstance(source, np.ndarray) else ""
        raise TypeError(f"an image must be a path, bytes or a PIL image, not {type(source).__name__}{array}")
    if isinstance(source, str) and not source:
        raise UserError(f"{name or 'an image'}: is an empty name; give a path or the bytes of a file")
    if isinstance(source, Image.Image):
        return _to_rgb(_loaded(source, name or getattr(source, "filename", "") or "image"), name or "image")
    name = name or ("image from bytes" if isinstance(source, bytes) else str(source))
    try:
        image = _loaded(_open(source, name), name)
    except UserError:
        if (bare := without_metadata(source)) is None:
            raise
        image, source = _loaded(_open(bare, name), name), bare
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    if missing := what_is_missing(content, image):
        raise UserError(f"{name}: only a part of the image is there: {missing}; get the file again")
    return _to_rgb(image, name)


def _loaded(image: Image.Image, name: str) -> Image.Image:
    if image.format not in (None, "MPO", *FORMATS):
        raise UserError(f"{name}: {image.format} is not read; convert it to JPEG or PNG")
    _check_size(image.size, name)
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise UserError(f"{name}: broken or cut off image ({error})") from error
    return image


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise UserError(f"{name}: is a folder; name a file") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: {_what_it_is(source)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: over the limit of {MAX_PIXELS:,} pixels; shrink it") from error
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise UserError(f"{name}: cannot read the image ({error})") from error


def without_metadata(source: str | Path | bytes) -> bytes | None:
    """A JPEG or PNG without texts, colour profile and EXIF; None: it is neither, cannot be read, or has none of them.

    Pillow refuses files in which one of these is broken, or a PNG's are larger than 1 MiB, whatever the pixels are.
    """
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    kept = _png_chunks(content) if content.startswith(_PNG) else _jpeg_segments(content)
    bare = b"".join(kept)
    return bare if 0 < len(bare) < len(content) else None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The signature and the critical chunks, whose names begin with a capital."""
    yield _PNG
    position = len(_PNG)
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")  # length, kind, content, checksum
        if content[position + 4 : position + 5].isupper():
            yield content[position:end]
        position = end


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """All but comments and the segments of applications; those of JFIF and Adobe, which say what colours mean, stay."""
    if not content.startswith(b"\xff\xd8\xff"):
        return
    yield content[:2]
    position = 2
    while content[position : position + 1] == b"\xff" and (marker := content[position + 1 : position + 2]) != b"\xda":
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker in b"\xe0\xee" or not (marker == b"\xfe" or b"\xe0" <= marker <= b"\xef"):
            yield content[position:end]
        position = end
    yield content[position:]


def _what_it_is(source: str | Path | bytes) -> str:
    """Why Pillow does not know a file, as far as its first bytes tell."""
    if isinstance(source, bytes):
        start = source[:64]
    else:
        with open(source, "rb") as file:
            start = file.read(64)
    if not start:
        return "the file is empty"
    if start.startswith(_LFS_POINTER):
        return "a pointer of Git LFS, not the image itself; git lfs pull fetches it"
    for kind, magic in _NOT_READ.items():
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(magic):
            return f"{kind}, which is not read; convert it to JPEG or PNG"
    if start.startswith(_JXL):
        return _JPEG_XL
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return _HEIC
    if start[4:8] == b"ftyp" and start[8:10] != b"av":
        return "a video (MP4 or the like), which is not read; save frames of it as JPEG"
    return "not an image that Pillow can read"


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(width, height) < 1:
        raise UserError(f"{name}: the image has no pixels ({width} x {height})")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(f"{name}: {width} x {height}, one side is over {MAX_ASPECT_RATIO} times the other; crop it")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels are over the limit of {MAX_PIXELS:,}; shrink it")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow reads PGM up to 65535
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        white_is_zero = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return Image.fromarray(255 - grey if white_is_zero else grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"{name}: pixels of 32 bits, of which nobody knows what is white; save it with 8 or 16 bits")
    return image.convert("RGB")


def window_order(rows: int, cols: int, window_units: int) -> np.ndarray:
    """Order in which the released encoder reads the merged units of one scale: window by window.

    Args:
      rows, cols: of the scale, in merged units.
      window_units: side of a window in merged units. Windows at the right and bottom edge are smaller.

    Returns:
      [rows * cols] int64: place i of the encoder holds raster unit order[i].

    Example: rows 2, cols 3, windows of 2 -> 0 1 3 4 2 5
    """
    row, col = np.divmod(np.arange(rows * cols), cols)
    return np.lexsort((col, row, col // window_units, row // window_units))


def image_patches(image: Image.Image, images: ImageConfig, vision: VisionConfig) -> ImagePatches:
    """Resizes, pads and cuts one RGB image.

    Whole scales follow one another, smallest first. In a scale the merged units stand in window order (raster order if
    not vision.window_order), and the merge_size**2 patches of a unit row by row.

    Raises:
      UserError: as `plan_scales`.

    Example of one scale of 2 x 4 patches, as (row, column): 00 01 10 11 02 03 12 13
    """
    scales = plan_scales(image.height, image.width, images, vision)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)
    counts = [scale.rows * scale.cols for scale in scales]
    patches = np.empty((sum(counts), vision.patch_dim), np.uint8)
    coords = []
    for scale, end in zip(scales, itertools.accumulate(counts), strict=True):
        order, places = _reading_order(
            scale.rows // vision.merge_size,
            scale.cols // vision.merge_size,
            vision.merge_size,
            vision.window_size // vision.merge_size if vision.window_order else None,
        )
        canvas = np.zeros((scale.rows * vision.patch_size, scale.cols * vision.patch_size), np.uint32)
        resize(pixels, scale.height, scale.width, canvas)
        cut(canvas, order, vision.merge_size, vision.patch_size, patches[end - len(places) : end])
        coords.append(places)
    blocks = np.repeat(np.arange(1, len(scales) + 1, dtype=np.int32), counts)
    return ImagePatches(patches, np.concatenate(coords), blocks, tuple((scale.rows, scale.cols) for scale in scales))


@functools.lru_cache(maxsize=1024)
def _reading_order(
    unit_rows: int, unit_cols: int, merge: int, window_units: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Raster numbers of the merged units [n] int64 as they are read, and their patches' coordinates [n * m * m, 2]."""
    if window_units is None:
        order = np.arange(unit_rows * unit_cols)
    else:
        order = window_order(unit_rows, unit_cols, window_units)
    grid = np.indices((unit_rows * merge, unit_cols * merge), np.int32).reshape(2, unit_rows, merge, unit_cols, merge)
    coords = grid.transpose(1, 3, 2, 4, 0).reshape(unit_rows * unit_cols, merge**2, 2)[order].reshape(-1, 2)
    order.flags.writeable = coords.flags.writeable = False  # shared by all images of this size
    return order, coords
