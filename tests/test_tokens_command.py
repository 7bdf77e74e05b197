"""What images cost in tokens: numbers, drawing and command."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from navil_jax.config import Config, DataConfig, ImageConfig, ModelConfig, VisionConfig
from navil_jax.config.flags import load_config
from navil_jax.data.__main__ import main
from navil_jax.data.images import image_patches
from navil_jax.data.inspect.token_map import PAGE, draw_tokens
from navil_jax.data.prompt import image_text, image_tokens
from navil_jax.errors import UserError

ORANGE, BLUE = (255, 140, 0), (0, 220, 255)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "grey.png"
    Image.new("RGB", (640, 480), (100, 100, 100)).save(path)
    return path


@settings(max_examples=20, deadline=None)
@given(sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda s: max(s) <= 200 * min(s)))
def test_counts_are_those_of_the_patches_and_the_prompt(sizes: tuple[int, int]) -> None:
    width, height = sizes
    config = Config(images=ImageConfig(min_patches=16, max_patches=256))
    count = image_tokens(width, height, config)
    pixels = np.full((height, width, 3), 255, np.uint8)
    cut = image_patches(Image.fromarray(pixels), config.images, config.model.vision)
    text = image_text(cut.grids)
    assert count.visual_tokens == text.count("<IMG_CONTEXT>") + 1
    assert count.text_tokens == text.count("<IMG_LINE_BREAK>") + text.count("<IMG_FRAME_BREAK>") + 1
    assert count.patches == len(cut.patches)
    assert count.padding == pytest.approx((cut.patches == 0).mean())


def test_documented_example() -> None:
    count = image_tokens(640, 480, Config())
    assert [(scale.rows, scale.cols) for scale in count.scales] == [(16, 22), (22, 30), (30, 40)]
    assert (count.visual_tokens, count.text_tokens) == (554, 38)


def test_table(image: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["tokens", "--image", str(image), "--config.images.multiscale=false"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{image}: 640 x 480 pixels",
        "  scale    resized  patches  visual tokens  line breaks  frame breaks  padding",
        "      1  640 x 480  40 x 30            300           15             1     0.0%",
        "  together 318 tokens with <img> and </img>, 0.0% of the pixels are padding",
        "  fits a row: visual tokens 301 of 8,192 (4%), text tokens 17 of 8,192 (0%), patches 1,200 of 24,576 (5%)",
    ]


@pytest.mark.parametrize("slots", ["visual_slots=300", "text_slots=16", "patch_slots=1196"])
def test_an_image_that_fits_no_row_is_called_so(image: Path, capsys: pytest.CaptureFixture, slots: str) -> None:
    arguments = ["--image", str(image), "--config.images.multiscale=false", f"--config.data.{slots}"]
    assert main(["tokens", *arguments]) == 0
    assert "DOES NOT FIT A ROW: " in capsys.readouterr().out


def test_json_of_several_images_and_a_recipe(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = tmp_path / "small.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60)).save(small, exif=exif)
    recipe = str(ROOT / "configs" / "demo.py")
    given = ["tokens", "--config", recipe, "--json", "--config.images.max_patches=1024"]
    assert main([*given, "--image", str(image), "--image", str(small)]) == 0
    large, little = json.loads(capsys.readouterr().out)
    assert (large["image"], little["image"]) == (str(image), str(small))
    assert little["scales"] == [
        {"height": 60, "width": 100, "rows": 4, "cols": 8, "visual_tokens": 8, "line_breaks": 2, "frame_breaks": 1}
    ]
    assert (little["visual_tokens"], little["text_tokens"], little["total_tokens"]) == (9, 4, 13)
    assert (little["fits"], large["fits"]) == (True, False)
    data = load_config(recipe).data
    budgets = {"visual_tokens": data.visual_slots, "text_tokens": data.text_slots, "patches": data.patch_slots}
    assert large["row"] == budgets
    assert main(["tokens", "--config", recipe, "--image", str(small)]) == 0
    assert "EXIF orientation 6 is not applied" in capsys.readouterr().out


def test_drawing_shows_windows_and_the_end_of_the_image(tmp_path: Path) -> None:
    config = Config(images=ImageConfig(min_patches=16, max_patches=4096, multiscale=False))
    path = tmp_path / "drawing.png"
    draw_tokens(path, {"a": Image.new("RGB", (900, 700), (100, 100, 100))}, config)
    drawing = np.asarray(Image.open(path))[32:, 32:]  # without the margin
    (tops,) = np.nonzero((drawing == ORANGE).all(2).sum(1) > 900)
    top = tops[0]  # the upper edge; 58 x 44 patches, windows of 8
    (columns,) = np.nonzero((drawing[top : top + 700] == ORANGE).all(2).mean(0) > 0.9)
    assert {0, 128, 256, 768, 896} <= set(columns.tolist())
    assert 64 not in columns
    assert (drawing[top + 10 : top + 690, 900] == BLUE).all(1).mean() > 0.9
    assert (drawing[top + 5, 905] == 0).all()  # padding
    assert tuple(drawing[top + 40, 8]) == (100, 100, 100)


@pytest.mark.parametrize("size", [(64, 64), (3000, 100), (100, 3000), (1600, 1200)])
def test_drawings_have_one_width_and_margins(tmp_path: Path, size: tuple[int, int]) -> None:
    draw_tokens(tmp_path / "a.png", {"name " * 60: Image.new("RGB", size), "b": Image.new("RGB", size)}, Config())
    drawing = np.asarray(Image.open(tmp_path / "a.png"))
    assert drawing.shape[1] == PAGE
    for edge in (drawing[:16], drawing[-16:], drawing[:, :16], drawing[:, -16:]):
        assert (edge == 255).all()


def test_drawing_numbers_windows_on_from_scale_to_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []
    monkeypatch.setattr(
        "navil_jax.data.inspect.token_map.ImageDraw.ImageDraw.text",
        lambda self, place, text, *_, **__: written.append(text) if text.isdecimal() else None,
    )
    draw_tokens(tmp_path / "a.png", {"a": Image.new("RGB", (320, 160))}, Config(images=ImageConfig(16, 256)))
    # 4 x 8, 6 x 10, 6 x 12, 8 x 16 and 10 x 20 patches are 8, 15, 18, 32 and 50 tokens
    numbers = ((0,), (8, 20), (23, 35), (41, 57), (73, 89, 105, 113, 117, 121))
    assert written == [str(number) for scale in numbers for number in scale]
    written.clear()
    raster = Config(images=ImageConfig(16, 256, multiscale=False), model=ModelConfig(VisionConfig(window_order=False)))
    draw_tokens(tmp_path / "a.png", {"a": Image.new("RGB", (320, 160))}, raster)
    assert written == ["0", "4", "8", "40", "44", "48"]


def test_drawing_of_the_command(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "drawing.png"
    assert main(["tokens", "--image", str(image), "--out", str(path)]) == 0
    assert capsys.readouterr().err == f"drawn: {path}\n"
    assert Image.open(path).format == "PNG"


def test_mistakes(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    for arguments, said in (
        ([], "--image: no image given"),
        (["--image", str(text)], f"{text}: not an image"),
        (["--image", str(image), "--config", "nothing.py"], "nothing.py: no such config file"),
        (["--image", str(image), "--config.images.max_patch=3"], "max_patch"),
        (["--image", str(image), "--out", str(image / "a.png")], f"--out: {image}: is a file, a folder belongs there"),
    ):
        assert main(["tokens", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_models_without_images() -> None:
    with pytest.raises(UserError, match=r"config\.model\.vision is none"):
        image_tokens(64, 64, Config(model=ModelConfig(vision=None), data=DataConfig()))


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tokens", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--image a.jpg --image b.jpg --json" in text
    assert "images.max_patches = 24576" in text
