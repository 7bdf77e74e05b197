"""Resizing and cutting, compiled and by Pillow and NumPy: the same bytes, the width first, with any Pillow."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data import pillow_resampling, resampling
from navil_jax.data.images import image_patches
from navil_jax.data.sample import Sample
from navil_jax.data.transforms import resolution

GOLDEN = Path(__file__).parent / "golden" / "preprocessing"
SCREENSHOT = Image.open(GOLDEN / "screenshot_360x800.png").convert("RGB")
ORDER = json.loads((GOLDEN / "resize_order.json").read_text())
RESIZED = [(*case["size"], case["sha256"]) for case in ORDER["resized"]]
BOTH = pytest.mark.parametrize("code", [resampling, pillow_resampling], ids=["compiled", "pillow"])
NO_NUMBA = """
import sys
sys.modules["numba"] = None
from PIL import Image
from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data.images import image_patches
patches = image_patches(Image.open(sys.argv[1]).convert("RGB"), ImageConfig(), VisionConfig()).patches
sys.stdout.buffer.write(patches.tobytes())
"""


def random_image(height: int, width: int, seed: int, extremes: bool = False) -> Image.Image:
    random = np.random.default_rng(seed)
    values = (
        random.integers(0, 2, (height, width, 3)) * 255 if extremes else random.integers(0, 256, (height, width, 3))
    )
    return Image.fromarray(values.astype(np.uint8))


def bicubic(code: ModuleType, image: Image.Image, height: int, width: int) -> np.ndarray:
    source = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)
    canvas = np.zeros((height + 2, width + 1), np.uint32)
    code.resize(source, height, width, canvas)
    assert not canvas[height:].any()
    assert not canvas[:, width:].any()
    return canvas[:height, :width].copy().view(np.uint8).reshape(height, width, 4)[..., :3]


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@BOTH
@pytest.mark.parametrize(("width", "height", "sha256"), RESIZED)
def test_tall_images_are_resized_as_in_training(code: ModuleType, width: int, height: int, sha256: str) -> None:
    assert digest(bicubic(code, SCREENSHOT, height, width)) == sha256


@pytest.mark.parametrize(("width", "height", "sha256"), RESIZED)
def test_images_are_resized_as_in_training(width: int, height: int, sha256: str) -> None:
    assert digest(np.asarray(pillow_resampling.resize_image(SCREENSHOT, width, height))) == sha256


@BOTH
def test_another_tall_image_is_resized_as_by_older_pillows(code: ModuleType) -> None:
    """Digests by Pillow 11.3.0, 12.1.1 and 12.3.0, which agree; the sizes are scales of this image."""
    image = Image.open(GOLDEN / "tall_1x8.png").convert("RGB")
    for width, height, begin in ((35, 286, "503a839e"), (37, 300, "86ea9bdb"), (43, 350, "82dbb34c")):
        assert digest(bicubic(code, image, height, width)).startswith(begin)


def test_changed_images_are_resized_with_the_width_first() -> None:
    for height, width in ((1200, 40), (400, 300)):
        image = random_image(height, width, 0)
        (changed,) = resolution(Sample("a", (image,), ()), (0,)).images
        narrow = image.resize((changed.width, height), Image.Resampling.BICUBIC)
        assert changed.height < height
        assert changed == narrow.resize(changed.size, Image.Resampling.BICUBIC)


@settings(max_examples=200, deadline=None)
@given(
    before=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    after=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    extremes=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(before=(90, 40), after=(20, 39), extremes=False, seed=0)  # Pillow 13 alone would resize the height first
@example(before=(400, 2), after=(40, 1), extremes=False, seed=0)  # Pillow 12.3, too
def test_resizing_is_pillow_s_in_every_byte(
    before: tuple[int, int], after: tuple[int, int], extremes: bool, seed: int
) -> None:
    image = random_image(*before, seed, extremes)
    narrow = image.resize((after[1], before[0]), Image.Resampling.BICUBIC)
    expected = np.asarray(narrow.resize((after[1], after[0]), Image.Resampling.BICUBIC))
    for code in (resampling, pillow_resampling):
        np.testing.assert_array_equal(bicubic(code, image, *after), expected)


@BOTH
@pytest.mark.parametrize(
    ("size", "smaller"), [((640, 480), (452, 339)), ((1900, 300), (760, 120)), ((700, 99), (900, 127))]
)
def test_resizing_of_photo_sizes(code: ModuleType, size: tuple[int, int], smaller: tuple[int, int]) -> None:
    """Sizes in which every Pillow resizes the width first."""
    image = random_image(size[1], size[0], 1)
    expected = image.resize(smaller, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(bicubic(code, image, smaller[1], smaller[0]), np.asarray(expected))


@settings(max_examples=50, deadline=None)
@given(
    units=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    merge=st.integers(1, 3),
    side=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_cutting_is_the_same_in_every_byte(units: tuple[int, int], merge: int, side: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = [count * merge * side for count in units]
    canvas = random.integers(0, 1 << 32, shape, np.uint32)
    order = random.permutation(units[0] * units[1])
    compiled, plain = (np.empty((len(order) * merge**2, 3 * side**2), np.uint8) for _ in range(2))
    resampling.cut(canvas, order, merge, side, compiled)
    pillow_resampling.cut(canvas, order, merge, side, plain)
    np.testing.assert_array_equal(compiled, plain)


def test_images_without_numba() -> None:
    path = GOLDEN / "screenshot_360x800.png"
    plain = subprocess.run([sys.executable, "-c", NO_NUMBA, path], capture_output=True, check=True).stdout
    assert plain == image_patches(SCREENSHOT, ImageConfig(), VisionConfig()).patches.tobytes()


def test_compiles_where_compiled_code_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_really = resampling.numba.njit

    def njit(cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_really(**options)

    monkeypatch.setattr(resampling.numba, "njit", njit)
    assert resampling.compiled(lambda x: x + 1)(2) == 3
