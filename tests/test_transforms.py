"""Transforms by name: the same draws as ever, the order of a source's list, one's own, and names that do not exist."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from made_sources import TOKENIZER, config
from PIL import Image

from navil_jax.config import Config, SourceConfig
from navil_jax.data.features import FeatureSource, Skipped, Usable
from navil_jax.data.pipeline import batch_spec
from navil_jax.data.sample import Sample
from navil_jax.data.sources import open_source
from navil_jax.data.transforms import TRANSFORMS, apply, find_transform, jpeg, resolution
from navil_jax.errors import UserError

IMAGE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (480, 640, 3), np.uint8))
SAMPLE = Sample("a", (IMAGE, IMAGE), (("What?", "Noise."),))


@dataclasses.dataclass(frozen=True)
class OneSample:
    """A source of one sample with a grey image."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample("grey", (Image.new("L", (40, 40), 7),), (("What?", "Grey."),))

    def texts(self) -> list[str]:
        return []


def features(*names: str) -> Usable | Skipped:
    settings: Config = config(sources=(SourceConfig("a", transforms=names),))
    source = FeatureSource(OneSample(), "a", 0, settings, TOKENIZER, batch_spec(settings).budgets, training=True)
    return source.read(0, place=3)


def decoded_in_rgb(sample: Sample, seeds: tuple[int, ...]) -> Sample:
    (image,) = sample.images
    assert isinstance(image, Image.Image)
    return dataclasses.replace(sample, turns=(("Mode?", image.mode), ("Seeds?", " ".join(map(str, seeds)))))


def refuses(sample: Sample, seeds: tuple[int, ...]) -> Sample:
    raise UserError("too grey")


def fails(sample: Sample, seeds: tuple[int, ...]) -> Sample:
    raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("seeds", "size", "quality"),
    [((0, 0, 0, 0), (622, 466), 75), ((3, 1, 7, 12), (329, 247), 99), ((1, 0, 5, 100_000), (469, 351), 93)],
)
def test_draws_are_those_of_older_runs(seeds: tuple[int, ...], size: tuple[int, int], quality: int, tmp_path: Path):
    assert resolution(SAMPLE, seeds).images[0].size == size
    IMAGE.save(tmp_path / "a.jpg", quality=quality)
    np.testing.assert_array_equal(np.asarray(jpeg(SAMPLE, seeds).images[0]), np.asarray(Image.open(tmp_path / "a.jpg")))


def test_images_of_a_sample_change_in_different_ways() -> None:
    sizes = {image.size for image in resolution(SAMPLE, (0, 0, 0, 0)).images}
    assert len(sizes) == 2


def test_transforms_are_applied_in_the_order_of_the_list() -> None:
    both = apply(["resolution", "jpeg"], SAMPLE, (0,))
    one_after_the_other = jpeg(resolution(SAMPLE, (0,)), (0,))
    assert [np.asarray(image).tobytes() for image in both.images] == [
        np.asarray(image).tobytes() for image in one_after_the_other.images
    ]
    assert apply((), SAMPLE, (0,)) is SAMPLE


def test_a_transform_of_one_s_own_sees_decoded_images_and_the_seeds() -> None:
    usable = features(f"{__name__}:decoded_in_rgb")
    assert isinstance(usable, Usable)
    text = TOKENIZER.decode(usable.features["text_tokens"].tolist(), skip_special=True)
    assert "RGB" in text
    assert "0 0 0 3" in text


def test_a_sample_that_a_transform_refuses_is_bad_and_other_errors_end_the_run() -> None:
    skipped = features(f"{__name__}:refuses")
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "too grey"
    said = (
        r"source a, sample 0 \(grey\): transform \w+:fails raised ZeroDivisionError: oh \(\S+test_transforms.py:\d+\)"
    )
    with pytest.raises(UserError, match=said):
        features(f"{__name__}:fails")


@pytest.mark.parametrize(
    "value", [None, 5, Sample("a", (), ()), Sample("a", (3,), (("q", "a"),)), Sample("a", (), ("ab",))]
)
def test_what_is_no_sample_ends_the_run(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS, "jpeg", lambda sample, seeds: value)
    find_transform.cache_clear()
    with pytest.raises(UserError, match=r"transform jpeg gave .*, not a Sample with its images and turns"):
        features("jpeg")
    find_transform.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpg", r"transforms: no 'jpg'; the nearest is 'jpeg', all are jpeg, resolution; or module:name of your own"),
        (":jpeg", "transforms: no ':jpeg'; the nearest is 'jpeg'"),
        (
            "no_such_module:flip",
            "transforms: no_such_module:flip: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "navil_jax.data.transforms:flip",
            "transforms: navil_jax.data.transforms:flip: AttributeError: module .* has no attribute",
        ),
    ],
)
def test_unknown_transforms_stop_before_anything_is_read(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_source(SourceConfig("scenes", transforms=("jpeg", name)), "train")
    assert "\n" not in str(error.value)


def test_names_of_the_registry_are_those_of_its_functions() -> None:
    assert {name: find_transform(name).__name__ for name in TRANSFORMS} == {name: name for name in TRANSFORMS}
