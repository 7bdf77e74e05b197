"""Images to patches, against outputs of the released preprocessing and by properties."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data.images import image_patches, largest_scale, load_image, plan_scales, smart_resize, window_order
from navil_jax.data.pillow_resampling import resize_image
from navil_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
IMAGES = json.loads((GOLDEN / "preprocessing" / "golden.json").read_text())
SETTINGS = {
    name: ImageConfig(min_patches=s["min_num"], max_patches=s["max_num"], scale_factor=s["scale_downsample_ratio"])
    for name, s in IMAGES["settings"].items()
}
RASTER = VisionConfig(window_order=False)
MODEL_CASES = ["internlm2_small", "internlm2_windowed", "qwen3_small", "qwen3_small_tied"]


def resize_calls(scales: list) -> list[list[int]]:
    """Sizes in the order of the decisions: largest first."""
    return [[scale.height, scale.width] for scale in reversed(scales)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", IMAGES["images"])
def test_released_images(name: str, setting: str) -> None:
    expected = IMAGES["images"][name][setting]
    tensors = load_file(GOLDEN / "preprocessing" / f"pixels_{setting}.safetensors")
    image = load_image(GOLDEN / "preprocessing" / f"{name}.png")
    result = image_patches(image, SETTINGS[setting], RASTER)
    assert [[1, *grid] for grid in result.grids] == expected["grids"]
    assert result.blocks.max() == expected["num_scales"][0]
    pixels = tensors[f"{name}.pixels_u8"].reshape(-1, 768)
    assert result.patches.shape == pixels.shape
    if (name, setting) != ("tall_1x8", "small"):  # made by Pillow 13, columns first: see test_resampling for its bytes
        np.testing.assert_array_equal(result.patches, pixels)
    decisions = [call["out"] for call in expected["resize_calls"]]
    sizes = resize_calls(plan_scales(image.height, image.width, SETTINGS[setting], RASTER))
    assert sizes == decisions[: len(sizes)]
    assert len(decisions) - len(sizes) <= 1  # the last decision may be one that did not shrink


@pytest.mark.parametrize("kind", ["random_sizes", "single_precision_decides"])
def test_released_scales(kind: str) -> None:
    cases = json.loads((GOLDEN / "preprocessing" / "multiscale.json").read_text())[kind]
    assert cases
    for case in cases:
        scales = plan_scales(case["h"], case["w"], SETTINGS[case["setting"]], RASTER)
        assert [[1, scale.rows, scale.cols] for scale in scales] == case["grids"], case
        assert resize_calls(scales) == case["resized_hw"][: len(scales)], case


@pytest.mark.parametrize("factor", [32, 1])
def test_released_sizes(factor: int) -> None:
    for height, width, least, most, expected in json.loads(
        (GOLDEN / "preprocessing" / "smart_resize.json").read_text()
    )[f"factor_{factor}"]:
        if isinstance(expected, str):
            with pytest.raises(UserError):
                smart_resize(height, width, factor, least, most)
        else:
            assert list(smart_resize(height, width, factor, least, most)) == expected


def test_released_errors() -> None:
    small = SETTINGS["small"]
    assert IMAGES["errors"]["wide 1000x5 (aspect 200)"]["result"] == [
        [1, scale.rows, scale.cols] for scale in plan_scales(5, 1000, small, RASTER)
    ]
    assert IMAGES["errors"]["picture of height 2 (50x2)"]["result"] == [
        [1, scale.rows, scale.cols] for scale in plan_scales(2, 50, small, RASTER)
    ]
    assert IMAGES["errors"]["picture 3x3"]["result"] == [
        [1, scale.rows, scale.cols] for scale in plan_scales(3, 3, small, RASTER)
    ]
    for height, width in ((4, 1000), (1000, 4), (0, 5)):
        with pytest.raises(UserError):
            plan_scales(height, width, small, RASTER)


@pytest.mark.parametrize("height", [1, 3])
def test_flat_images_are_images(height: int) -> None:
    """The released code breaks on height 1 and takes height 3 for the channel axis."""
    pixels = np.arange(height * 50 * 3, dtype=np.uint8).reshape(height, 50, 3)
    result = image_patches(load_image(Image.fromarray(pixels)), SETTINGS["small"], RASTER)
    flat = plan_scales(height, 50, SETTINGS["small"], RASTER)
    assert result.grids == tuple((scale.rows, scale.cols) for scale in flat)
    assert all(rows < cols for rows, cols in result.grids)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_image_s_scales_do_not_depend_on_the_images_before_it(setting: str) -> None:
    """The released code carries the size limit of an image over to the next one of a call."""
    several = IMAGES["one_call_with_several_pictures"][setting]
    alone = []
    for name in several["pictures"]:
        image = load_image(GOLDEN / "preprocessing" / f"{name}.png")
        alone += [[1, *grid] for grid in image_patches(image, SETTINGS[setting], RASTER).grids]
    assert alone == [grid for name in several["pictures"] for grid in IMAGES["images"][name][setting]["grids"]]
    assert alone != several["grids"]


def _model_case(name: str) -> tuple[dict, dict, list[Image.Image], ImageConfig]:
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    settings = ImageConfig(
        min_patches=config["min_dynamic_patch"],
        max_patches=config["max_dynamic_patch"],
        scale_factor=config["scale_downsample_ratio"],
    )
    images = [load_image(path) for path in sorted(folder.glob("image_*.png"))]
    return load_file(folder / "golden.safetensors"), config, images, settings


@pytest.mark.parametrize("name", MODEL_CASES)
def test_model_inputs(name: str) -> None:
    tensors, config, images, settings = _model_case(name)
    raster = [image_patches(image, settings, RASTER) for image in images]
    assert [[1, *grid] for one in raster for grid in one.grids] == tensors["inputs.image_grid_thw"].tolist()
    assert [len(one.grids) for one in raster] == tensors["inputs.num_scales"].tolist()
    patches = np.concatenate([one.patches for one in raster])
    np.testing.assert_array_equal(patches, tensors["inputs.pixel_u8"].reshape(-1, 768))

    windowed = VisionConfig(window_size=config["vision_config"]["window_size"])
    in_windows = np.concatenate([image_patches(image, settings, windowed).patches for image in images])
    units = patches.reshape(-1, 4, 768)
    np.testing.assert_array_equal(in_windows.reshape(-1, 4, 768), units[tensors["vision.window_index"]])


@pytest.mark.parametrize("name", MODEL_CASES)
def test_window_order_is_the_released_one(name: str) -> None:
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    parts, start = [], 0
    for _, rows, cols in tensors["inputs.image_grid_thw"]:
        parts.append(start + window_order(rows // 2, cols // 2, 4))
        start += rows * cols // 4
    np.testing.assert_array_equal(np.concatenate(parts), tensors["vision.window_index"])


def test_window_order_example() -> None:
    assert window_order(2, 3, 2).tolist() == [0, 1, 3, 4, 2, 5]


@given(rows=st.integers(1, 20), cols=st.integers(1, 20), side=st.integers(1, 6))
def test_windows_are_whole_and_in_order(rows: int, cols: int, side: int) -> None:
    order = window_order(rows, cols, side)
    assert sorted(order) == list(range(rows * cols))
    windows = (order // cols // side) * -(-cols // side) + order % cols // side
    assert (np.diff(windows) >= 0).all()
    assert all((np.diff(order[windows == window]) > 0).all() for window in set(windows))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 150), height=st.integers(1, 150), windows=st.booleans())
def test_every_pixel_lands_where_its_coordinates_say(width: int, height: int, windows: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    vision = VisionConfig(window_order=windows)
    images = ImageConfig(min_patches=1, max_patches=64)
    image = Image.fromarray(pixels)
    result = image_patches(image, images, vision)
    for number, scale in enumerate(plan_scales(height, width, images, vision), start=1):
        here = result.blocks == number
        canvas = np.zeros((scale.rows * 16, scale.cols * 16, 3), np.uint8)
        for patch, (row, col) in zip(result.patches[here], result.coords[here], strict=True):
            canvas[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = patch.reshape(3, 16, 16).transpose(1, 2, 0)
        expected = resize_image(image, scale.width, scale.height)
        np.testing.assert_array_equal(canvas[: scale.height, : scale.width], np.asarray(expected))
        assert not canvas[scale.height :].any()
        assert not canvas[:, scale.width :].any()
        assert here.sum() == scale.rows * scale.cols
    assert (np.diff(result.blocks) >= 0).all()


def test_order_of_patches_example() -> None:
    vision, images = VisionConfig(), ImageConfig(min_patches=1, multiscale=False)
    result = image_patches(Image.new("RGB", (64, 32)), images, vision)
    assert [f"{row}{col}" for row, col in result.coords] == ["00", "01", "10", "11", "02", "03", "12", "13"]
    assert result.patches.dtype == np.uint8
    assert {result.coords.dtype, result.blocks.dtype} == {np.dtype("int32")}


@given(
    short=st.integers(1, 600),
    ratio=st.floats(1, 200),
    patches=st.tuples(st.integers(4, 4096), st.integers(4, 4096)).map(sorted),
)
def test_no_scale_is_larger_than_the_largest(short: int, ratio: float, patches: list[int]) -> None:
    images = ImageConfig(min_patches=patches[0], max_patches=patches[1])
    scales = plan_scales(short, int(short * ratio), images, VisionConfig())
    assert max(scale.rows * scale.cols for scale in scales) <= largest_scale(images, VisionConfig())


def test_one_scale() -> None:
    one = dataclasses.replace(SETTINGS["small"], multiscale=False)
    assert plan_scales(192, 256, one, RASTER) == plan_scales(192, 256, SETTINGS["small"], RASTER)[-1:]


def test_paper_grids() -> None:
    def grids(height: int, width: int) -> list[tuple[int, int]]:
        return [(scale.rows, scale.cols) for scale in plan_scales(height, width, ImageConfig(), RASTER)]

    assert grids(448, 448) == [(20, 20), (28, 28)]
    assert grids(480, 640) == [(16, 22), (22, 30), (30, 40)]
    assert grids(1024, 1024) == [(18, 18), (24, 24), (34, 34), (46, 46), (64, 64)]
    assert sum(rows * cols // 4 for rows, cols in grids(3000, 2000)) == 12013


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_paths_bytes_and_images_are_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    (tmp_path / "a.png").write_bytes(png(image))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), png(image), image):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_alpha_is_dropped_not_blended() -> None:
    assert load_image(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)


def test_exif_rotation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "rotated.jpg", exif=exif)
    assert load_image(tmp_path / "rotated.jpg").size == (30, 20)


def test_bad_files_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    files = {
        "cut.png": png(noise)[:3000],
        "text.png": b"not an image",
        "empty.png": b"",
        "header.png": png(noise)[:30],
        "wide.png": png(Image.new("RGB", (402, 2))),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    noise.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    for name in (*files, "cut.jpg", "missing.png", "."):
        with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    for content in files.values():
        with pytest.raises(UserError, match="bytes"):
            load_image(content)
