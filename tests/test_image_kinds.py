"""Every kind of image behaves as docs/images.md says."""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made_sources import TOKENIZER
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, SourceConfig, VisionConfig
from navil_jax.data import images, transforms
from navil_jax.data.features import FeatureSource, sample_features
from navil_jax.data.formats.record_images import size_under_boxes
from navil_jax.data.images import image_patches, load_image
from navil_jax.data.sample import Sample
from navil_jax.errors import UserError

DOCS = (Path(__file__).parents[1] / "docs" / "images.md").read_text()
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
DEEP = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)  # 0 to 65520


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(source: bytes | Image.Image) -> np.ndarray:
    return np.asarray(load_image(source))


def png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG that Pillow cannot write: 2 is RGB, 4 grey with alpha."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_grey(values: np.ndarray, white_is_zero: bool) -> bytes:
    """A little-endian TIFF of one strip, as Pillow does not write it."""
    (height, width), bits, photometric = values.shape, 8 * values.itemsize, 0 if white_is_zero else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags |= {279: values.nbytes}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the strip begins: after the header and these tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return start + values.astype(values.dtype.newbyteorder("<")).tobytes()


def test_every_row_of_the_table_has_its_test() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", DOCS)
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / f"{file}.py").read_text(), test
    rows = [line for line in DOCS.split("## Speed")[0].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| kind |", "| ---")) and not row.endswith("| test |")]
    assert len(rows) > 20
    assert [row for row in rows if "`test_" not in row] == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (4, 5))).mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_is_expanded(mode: str) -> None:
    grey = Image.new(mode, (3, 2), 255 if mode == "1" else (77, 10) if mode == "LA" else 77)
    assert (pixels(encoded(grey, "PNG")) == (255 if mode == "1" else 77)).all()


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_expanded(transparent: bool) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    options = {"transparency": 0} if transparent else {}
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette, kind, **options))[0].tolist() == [[10, 20, 30], [200, 100, 50]]


def test_cmyk_is_converted_without_a_profile() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    red, green, blue = pixels(encoded(ink, "JPEG", quality=100))[8, 8]
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_grey_of_16_bits_becomes_its_upper_8(kind: str) -> None:
    result = pixels(encoded(Image.fromarray(DEEP), kind))
    np.testing.assert_array_equal(result, np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_big_endian_tiff_of_16_bits() -> None:
    big = Image.frombytes("I;16B", (8, 8), DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(encoded(big, "TIFF"))[..., 0], DEEP >> 8)


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiff_in_which_0_is_white(white_is_zero: bool) -> None:
    shallow = (DEEP >> 8).astype(np.uint8)
    wanted = 255 - shallow if white_is_zero else shallow
    for values in (shallow, DEEP):
        source = tiff_of_grey(values, white_is_zero)
        np.testing.assert_array_equal(pixels(source)[..., 0], wanted)
        np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(source)))[..., 0], wanted)


def test_colours_of_16_bits_become_their_upper_8() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), np.uint16)
    np.testing.assert_array_equal(pixels(png_of_16_bits(values, 2)), values >> 8)
    np.testing.assert_array_equal(pixels(png_of_16_bits(values[..., :2], 4)), (values[..., [0, 0, 0]]) >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(UserError, match="32 bits"):
        load_image(encoded(Image.new(mode, (4, 5)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_or_page_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() <= 8  # lossy kinds


def test_avif_is_read() -> None:
    assert features.check("avif")
    assert load_image(encoded(COLOURS, "AVIF")).size == (60, 40)


def test_heic_is_read_where_its_package_is() -> None:
    pytest.importorskip("pillow_heif", reason="needs pip install pillow-heif")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    blocks = Image.fromarray(np.kron(np.asarray(COLOURS)[::8, ::8], np.ones((16, 16, 1), np.uint8)))
    content = encoded(blocks, "HEIF", quality=-1, exif=exif.tobytes())
    found = pixels(content)
    turned = np.asarray(blocks.transpose(Image.Transpose.ROTATE_270))
    assert found.shape == turned.shape
    assert np.abs(found.astype(int) - turned).mean() < 4  # colours are stored as YCbCr
    assert size_under_boxes(content) == (blocks.height, blocks.width)
    for end in range(0, len(content), len(content) // 20):
        with pytest.raises(UserError):
            load_image(content[:end])


def test_heic_names_its_package_where_that_is_missing() -> None:
    if "HEIF" in images.FORMATS:
        pytest.skip("pillow-heif is installed")
    with pytest.raises(UserError, match="HEIC, which Pillow reads with another package: pip install pillow-heif"):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(pixels(encoded(COLOURS, "PNG", icc_profile=profile)), np.asarray(COLOURS))


def test_gamma_is_ignored() -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_array_equal(pixels(encoded(COLOURS, "PNG", pnginfo=info)), np.asarray(COLOURS))


def test_progressive_jpegs_are_jpegs() -> None:
    plain, progressive = (encoded(COLOURS, "JPEG", progressive=value) for value in (False, True))
    assert plain != progressive
    np.testing.assert_array_equal(pixels(plain), pixels(progressive))


def test_jpegs_are_decoded_whole() -> None:
    """Draft mode would decode at half the size and give other bytes."""
    large = COLOURS.resize((1200, 800), Image.Resampling.BICUBIC)
    content = encoded(large, "JPEG")
    drafted = Image.open(io.BytesIO(content))
    drafted.draft("RGB", (600, 400))
    assert drafted.size == (600, 400)
    limits = ImageConfig(min_patches=4, max_patches=256, multiscale=False)
    cut = image_patches(load_image(content), limits, VisionConfig()).patches
    whole = image_patches(Image.open(io.BytesIO(content)), limits, VisionConfig()).patches
    np.testing.assert_array_equal(cut, whole)
    assert (cut != image_patches(drafted, limits, VisionConfig()).patches).any()


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "BMP", "JPEG2000"])
def test_cut_off_files_are_refused(tmp_path: Path, kind: str, options: dict) -> None:
    content = encoded(COLOURS, kind, **(options if kind == "JPEG" else {}))
    path = tmp_path / "cut"
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")


def photo(mode: str = "RGB") -> Image.Image:
    walk = np.random.default_rng(1).normal(0, 30, (240, 320, 3)).cumsum(0).cumsum(1) / 20 + 128
    return Image.fromarray(walk.clip(0, 255).astype(np.uint8)).convert(mode)


def with_height(content: bytes, height: int) -> bytes:
    """A JPEG whose header says another height."""
    frame = next(m for m in re.finditer(rb"\xff[\xc0-\xc2]", content)).start()
    return content[: frame + 5] + height.to_bytes(2, "big") + content[frame + 7 :]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}], ids=str
)
def test_jpegs_with_an_end_in_the_middle_are_refused(mode: str, options: dict) -> None:
    whole = encoded(photo(mode), "JPEG", **options)
    load_image(whole)
    for broken in (whole[: len(whole) // 2] + b"\xff\xd9", with_height(whole, 480)):
        with pytest.raises(UserError, match=r"^image from bytes: only a part of the image is there: [^\n]+$"):
            load_image(broken)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000"])
def test_downloads_whose_rest_is_zero_are_refused(kind: str, share: float) -> None:
    whole = encoded(photo(), kind)
    begun = whole[: int(len(whole) * share)]
    with pytest.raises(UserError, match=r"^image from bytes: [^\n]+$"):
        load_image(begun + bytes(len(whole) - len(begun)))


@pytest.mark.parametrize("interlaced", [0, 1])
def test_pngs_whose_pixels_end_early_are_refused(interlaced: int) -> None:
    def png(rows: bytes) -> bytes:
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 60, 40, 8, 2, 0, 0, interlaced)), (b"IDAT", zlib.compress(rows)))
        parts = ((n, c, zlib.crc32(n + c)) for n, c in (*chunks, (b"IEND", b"")))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(c)) + n + c + struct.pack(">I", x) for n, c, x in parts
        )

    passes = [(8, 5), (7, 5), (15, 5), (15, 10), (30, 10), (30, 20), (60, 20)] if interlaced else [(60, 40)]
    noise = np.random.default_rng(0).integers(1, 256, 3 * 60 * 40, np.uint8).tobytes()
    rows, start = b"", 0
    for width, height in passes:
        for _ in range(height):
            rows, start = rows + b"\0" + noise[start : start + 3 * width], start + 3 * width
    load_image(png(rows))
    for cut in (len(rows) // 2, len(rows) - 181):
        with pytest.raises(UserError, match=r"^image from bytes: [^\n]+$"):
            load_image(png(rows[:cut]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("level", [0, 127, 128, 255])
def test_images_of_one_colour_are_whole(kind: str, level: int) -> None:
    more: dict[str, list[dict]] = {"JPEG": [{"optimize": True}, {"progressive": True}], "WEBP": [{"lossless": True}]}
    for options in ({}, *more.get(kind, [])):
        for side in (1, 17, 800):
            assert load_image(encoded(Image.new("RGB", (side, side), (level,) * 3), kind, **options)).size == (
                side,
                side,
            )


def test_bytes_behind_a_whole_image_are_no_fault() -> None:
    grey = photo()
    grey.paste((128, 128, 128), (0, 200, 320, 240))
    for kind in ("JPEG", "WEBP"):
        content = encoded(grey, kind)
        np.testing.assert_array_equal(pixels(content), pixels(content + bytes(len(content))))


def test_empty_files_and_text_are_refused(tmp_path: Path) -> None:
    for content, reason in ((b"", "the file is empty"), (b"not an image", "not an image that Pillow can read")):
        path = tmp_path / "image.png"
        path.write_bytes(content)
        for source, name in ((path, str(path)), (content, "image from bytes")):
            with pytest.raises(UserError, match=f"^{re.escape(name)}: {reason}$"):
                load_image(source)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 14_000])  # over the limit; twice over, where Pillow refuses by itself
def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    content += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT"
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"over the limit of 89,478,485"):
        load_image(content)


def test_limit_holds_for_decoded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    assert load_image(Image.new("RGB", (10, 20))).size == (10, 20)
    with pytest.raises(UserError, match="10 x 21 pixels are over the limit of 200"):
        load_image(Image.new("RGB", (10, 21)))


@pytest.mark.parametrize("size", [(201, 1), (2, 402)])
def test_extreme_ratios_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="over 200 times the other"):
        load_image(encoded(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 3)])
def test_sides_of_one_pixel_are_images(size: tuple[int, int]) -> None:
    image = load_image(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"))
    cut = image_patches(image, ImageConfig(min_patches=4, max_patches=512), VisionConfig())
    assert cut.patches[0].reshape(3, 256)[:, 0].tolist() == [9, 8, 7]


def test_messages_name_the_sample() -> None:
    sample = Sample("web/0001", images=(encoded(COLOURS, "PNG"), b""), turns=(("a", "b"),))
    with pytest.raises(UserError, match=r"^web/0001, image 2: the file is empty$"):
        sample_features(sample, Config(), None)


def transformed(image: Image.Image, names: Sequence[str], seeds: tuple[int, ...]) -> Image.Image:
    sample = transforms.apply(names, Sample("a", (image,), (("q", "a"),)), seeds)
    (changed,) = sample.images
    assert isinstance(changed, Image.Image)
    return changed


def test_jpeg_augmentation_is_a_jpeg_of_the_drawn_quality() -> None:
    copies = [encoded(COLOURS, "JPEG", quality=quality) for quality in range(75, 101)]
    seen = set()
    for sample in range(40):
        changed = np.asarray(transformed(COLOURS, ["jpeg"], (0, 1, sample)))
        seen.add(next(n for n, copy in enumerate(copies, 75) if (pixels(copy) == changed).all()))
    assert len(seen) > 10


def test_resolution_augmentation_shrinks_and_keeps_the_ratio() -> None:
    sizes = [transformed(COLOURS, ["resolution"], (0, 0, sample)).size for sample in range(40)]
    assert len(set(sizes)) > 10
    assert all(30 <= width <= 60 and abs(height * 60 / 40 - width) <= 1.5 for width, height in sizes)
    assert transformed(Image.new("RGB", (200, 1)), ["resolution"], (0,)).size == (200, 1)
    both = transformed(COLOURS, ["resolution", "jpeg"], (0, 0, 3))
    assert both.size == sizes[3]
    assert (np.asarray(both) != np.asarray(transformed(COLOURS, ["resolution"], (0, 0, 3)))).any()


def test_augmentation_follows_from_seed_and_sample() -> None:
    first, again, other, seeded = (
        np.asarray(transformed(COLOURS, ["jpeg"], seeds)) for seeds in ((0, 0, 5), (0, 0, 5), (0, 0, 6), (1, 0, 5))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != seeded).any()


class OneImage:
    """A source of one image under any index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"one/{index}", images=(COLOURS,), turns=(("What?", "Dots."),))


@pytest.mark.parametrize(("switch", "training"), [(True, True), (True, False), (False, True)])
def test_only_training_samples_of_sources_with_transforms_change(switch: bool, training: bool) -> None:
    config = Config(
        model=ModelConfig(special_token_ids=TOKENIZER.special_token_ids),
        images=ImageConfig(min_patches=4, max_patches=64),
        data=DataConfig(sources=(SourceConfig("one", transforms=("jpeg",) if switch else ()),), seed=3),
    )
    budgets = {"visual_tokens": 100, "text_tokens": 100, "patches": 100}
    source = FeatureSource(OneImage(), "one", 0, config, TOKENIZER, budgets, training=training)
    plain = image_patches(COLOURS, config.images, config.model.vision).patches
    image = transformed(COLOURS, ["jpeg"], (3, 0, 7, 12))
    changed = image_patches(image, config.images, config.model.vision).patches
    assert (plain != changed).any()
    np.testing.assert_array_equal(
        source.read(7, place=12).features["patches"], changed if switch and training else plain
    )


def test_threads_resize_at_the_same_time_alike() -> None:
    limits = ImageConfig(min_patches=4, max_patches=64)
    alone = image_patches(COLOURS, limits, VisionConfig()).patches
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: image_patches(COLOURS, limits, VisionConfig()).patches, range(40)))
    assert all((patches == alone).all() for patches in together)


def test_jpeg_xl_is_read_where_its_package_is() -> None:
    pytest.importorskip("pillow_jxl", reason="needs pip install pillow-jxl-plugin")
    content = encoded(COLOURS, "JXL", lossless=True)
    np.testing.assert_array_equal(pixels(content), np.asarray(COLOURS))
    for end in range(0, len(content), len(content) // 40):
        with pytest.raises(UserError):
            load_image(content[:end])
    with pytest.raises(UserError, match="cannot read the image"):
        load_image(content[: len(content) // 2] + bytes(len(content) // 2))


def test_jpeg_xl_names_its_package_where_that_is_missing() -> None:
    if "JXL" in images.FORMATS:
        pytest.skip("pillow-jxl-plugin is installed")
    for start in (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"):
        with pytest.raises(UserError, match="pip install pillow-jxl-plugin"):
            load_image(start + bytes(40))
