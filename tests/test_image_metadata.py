"""What stands around an image's pixels, and files that are no images: docs/images.md says what becomes of them."""

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

import navil_jax
from navil_jax.data.images import FORMATS, load_image
from navil_jax.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
COLOURS = Image.fromarray(PIXELS)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    COLOURS.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, broken: bool = False) -> bytes:
    checksum = zlib.crc32(name + content) ^ broken
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)
JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(JPEG)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [False, True])
def test_large_texts_and_profiles_spoil_no_pixels(zipped: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 400_000, zip=zipped)
    for options in ({"pnginfo": info}, {"icc_profile": bytes(3_000_000)}):
        np.testing.assert_array_equal(np.asarray(load_image(encoded("PNG", **options))), PIXELS)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"pHYs", b"tIME", b"tRNS", b"prVt"]),
    content=st.binary(max_size=40) | st.just(b"a\0\0" + zlib.compress(bytes(3_000_000))),
    broken=st.booleans(),
    end=st.booleans(),
)
def test_broken_chunks_around_the_pixels_of_a_png(name: bytes, content: bytes, broken: bool, end: bool) -> None:
    place = len(PNG) - 12 if end else 33
    damaged = PNG[:place] + chunk(name, content, broken) + PNG[place:]
    np.testing.assert_array_equal(np.asarray(load_image(damaged)), PIXELS)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from(
        [
            (0xE1, b"Exif\0\0"),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
            (0xE2, b"ICC_PROFILE\0"),
            (0xE2, b"MPF\0"),
            (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
            (0xFE, b""),
        ]
    ),
    content=st.binary(max_size=40)
    | st.sampled_from([b"II*\0\x08\0\0\0\xff\xff", b"IIU\0\x18\0\0\0", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0"]),
)
def test_damaged_exif_and_others_keep_the_pixels_of_a_jpeg(start: tuple[int, bytes], content: bytes) -> None:
    marker, name = start
    segment = struct.pack(">BBH", 0xFF, marker, len(name + content) + 2) + name + content
    np.testing.assert_array_equal(np.asarray(load_image(JPEG[:2] + segment + JPEG[2:])), JPEG_PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_is_applied_by_pillow(orientation: int) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[ExifTags.Base.Orientation] = orientation
    turns = Image.Transpose
    upright = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    wanted = COLOURS.transpose(upright[orientation]) if orientation > 1 else COLOURS
    np.testing.assert_array_equal(np.asarray(load_image(encoded("TIFF", tiffinfo=info))), np.asarray(wanted))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_of_other_kinds_is_left_alone(kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert load_image(encoded(kind, exif=exif)).size == (30, 20)


def test_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    for source in (tmp_path / "a.jpg", EPS, Image.open(io.BytesIO(EPS))):
        with pytest.raises(UserError, match=r"EPS.* is not read; convert it"):
            load_image(source)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"%PDF-1.7", "PDF"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or HTML"),
        (b"<!DOCTYPE html><html>403 Forbidden</html>", "SVG or HTML"),
        (b"<!docType HTML>", "SVG or HTML"),
        (b"\xef\xbb\xbf <svg/>", "SVG or HTML"),
        (b"<!-- x --><svg/>", "SVG or HTML"),
        (b"8BPS\0\1", "Photoshop"),
    ],
)
def test_files_that_are_no_images_are_named(content: bytes, kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind}, which is not read; convert it"):
        load_image(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a", "a pointer of Git LFS, not the image"),
        (b"\0\0\0\x18ftypheis" + bytes(20), r"HEIC, which Pillow reads with .* pillow-heif|a broken HEIC"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "a video"),
    ],
)
def test_other_files_in_the_place_of_images_are_named(content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_image(content)


def test_the_package_opens_images_of_named_formats_only() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
    calls = []
    for path in Path(navil_jax.__file__).parent.rglob("*.py"):
        calls += re.findall(r"Image\.open\([^\n]*", path.read_text())
    assert len(calls) == 7
    assert [call for call in calls if "formats=" not in call] == []
