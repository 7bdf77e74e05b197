"""Boxes in texts: from every kind of coordinates to tokens, through transforms, conversion and the preview."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import jpeg, outcomes, talk, write_lines
from made_sources import BUDGETS, TOKENIZER, config
from PIL import ExifTags, Image, ImageOps

from navil_jax.config import SourceConfig
from navil_jax.data.convert import convert
from navil_jax.data.features import sample_features
from navil_jax.data.formats import open_format
from navil_jax.data.formats.records import to_sample
from navil_jax.data.grounding import boxes_in, map_boxes
from navil_jax.data.inspect.checkup import LITERAL, Checkup
from navil_jax.data.inspect.reading import view_sample
from navil_jax.data.sample import Sample
from navil_jax.data.transforms import TransformFailed, apply

ANSWER = "<ref>a cat</ref><box>[[100, 200, 550, 1000]]</box>"


def record(answer: str, question: str = "<image>\nWhere?", **more: object) -> dict:
    return {"image": jpeg(), "conversations": talk(question, answer), **more}  # of 12 x 8 pixels


@pytest.mark.parametrize(
    ("boxes", "written"),
    [
        ("0..1", "[[0.1, 0.2, 0.55, 1]]"),
        ("0..1", "[0.1,0.2,0.55,1.0]"),
        ("0..1", "(0.1,2e-1),(0.55,1)"),
        ("0..1000", "[[100, 200, 550, 1000]]"),
        ("0..1000", "(100,200),(550,1000)"),
        ("pixels", "[[1.2, 1.6, 6.6, 8]]"),
    ],
)
def test_boxes_of_every_kind_become_thousandths(boxes: str, written: str) -> None:
    sample = to_sample(record(f"<ref>a cat</ref><box>{written}</box>"), "k", boxes=boxes)
    assert sample.turns == (("<image>\nWhere?", ANSWER),)
    assert sample.grounded
    declared = {"0..1": "norm1", "0..1000": "norm1000", "pixels": "real"}[boxes]
    assert to_sample(record(f"<ref>a cat</ref><box>{written}</box>", bbox_type=declared), "k") == sample


@pytest.mark.parametrize(
    ("given", "boxes", "reason"),
    [
        (record("<box>[[1, 2, 3, 4]]</box>"), "", "boxes may be in 0..1, 0..1000 or pixels"),
        (record("<box>[[0.1, 0.2, 0.3, 0.4]]</box>"), "", "boxes may be in"),
        (record("A cat.", "What is in <box>(1,2),(3,4)</box>?"), "", "boxes may be in"),
        (record("<box>[[1, 2, 3, 4]]</box>", bbox_type="norm1"), "pixels", "said to be in 0..1 and in pixels"),
        (record("<box>[[1, 2, 3, 4]]</box>", bbox_type="xywh"), "", "bbox_type 'xywh' is unknown"),
        (record("<box>[[1, 2, 3, 4]]</box>"), "0..1", "does not lie in the image"),
        (record("<box>[[1, 2, 3, 9]]</box>"), "pixels", "(pixels, 12 x 8)"),
        (record("<box>[[-1, 2, 3, 4]]</box>"), "pixels", "does not lie in the image"),
        (record("<box>[[5, 2, 3, 4]]</box>"), "pixels", "as left, top, right, bottom"),
        (record("<box>[[1, 2, 3, 1001]]</box>"), "0..1000", "does not lie in the image"),
        (record("<box>[[0.1, 0.2, 0.3, 0.4]]</box>"), "0..1000", "from 0 to 1; which is right?"),
        (record("<box>[[0.1, 0.2, 0.3, 0.4]]</box>"), "pixels", "from 0 to 1; which is right?"),
        (record("<box>[[1, 2, 3]]</box>"), "pixels", "it must hold [[x1, y1, x2, y2]]"),
        (record("<box>[[1, 2, 3, 4], [5, 6]]</box>"), "pixels", "it must hold"),
        (record("<box>[[1, nan, 3, 4]]</box>"), "pixels", "it must hold"),
        (record("<box></box>"), "pixels", "it must hold"),
        (record("<ref>a cat<box>[[1, 2, 3, 4]]</box>"), "pixels", "<ref> is not followed by </ref>"),
        (record("</box> first"), "pixels", "</box> is not followed by"),
        (record("<box>[[1, 2, 3, 4]]</box>", "Where?") | {"image": None}, "0..1000", "boxes and no image"),
        (record("<bbox>", objects={"bbox": [[1, 2, 3, 4]]}), "", "boxes may be in"),
        (record("<bbox><bbox>", objects={"bbox": [[1, 2, 3, 4]]}), "pixels", "which stands 2 times"),
        (record("<bbox>", objects={"bbox": [[1, 2, 3]]}), "pixels", "is no box"),
    ],
)
def test_boxes_that_are_not_sure_are_refused(given: dict, boxes: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        to_sample(given, "k", boxes=boxes)
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("boxes", "box"), [("0..1", "0, 0.25, 0.5, 1"), ("0..1000", "0, 9, 9, 9"), ("pixels", "0, 2, 6, 8")]
)
def test_boxes_on_an_image_that_may_be_seen_turned_are_refused(kind: str, boxes: str, box: str) -> None:
    upright, turned = (oriented(kind, orientation) for orientation in (1, 6))
    assert to_sample(record(f"<box>[[{box}]]</box>") | {"image": upright}, "k", boxes=boxes).grounded
    with pytest.raises(ValueError, match=r"EXIF orientation 6; are they of the image as stored or as shown\? remove"):
        to_sample(record(f"<box>[[{box}]]</box>") | {"image": turned}, "k", boxes=boxes)
    assert to_sample(record("<ref>a cat</ref>") | {"image": turned}, "k", boxes=boxes).grounded


def test_what_the_refusal_of_a_turned_image_asks_for_is_taken() -> None:
    with Image.open(io.BytesIO(oriented("JPEG", 6))) as image:
        as_shown = ImageOps.exif_transpose(image)
    without_tag = Image.open(io.BytesIO(oriented("JPEG", 6))).convert("RGB")
    del without_tag.getexif()[ExifTags.Base.Orientation]
    for image, box in ((as_shown, "0, 0, 8, 12"), (without_tag, "0, 0, 12, 8")):
        sample = to_sample(record(f"<box>[[{box}]]</box>") | {"image": image}, "k", boxes="pixels")
        assert sample.turns[0][1] == "<box>[[0, 0, 1000, 1000]]</box>"


def oriented(kind: str, orientation: int) -> bytes:
    """An image of 12 x 8 pixels with this EXIF orientation."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (12, 8), "red").save(buffer, kind, exif=exif)
    return buffer.getvalue()


def test_objects_of_ms_swift_fill_their_marks() -> None:
    objects = {"ref": ["a cat", "a dog"], "bbox": [[0.6, 0.8, 6, 8], [0, 0, 12, 4]], "bbox_type": "real"}
    given = record("<bbox> and <ref-object><bbox>", "<image>Where is <ref-object>?", objects=objects)
    sample = to_sample(given, "k")
    box, other = "<box>[[50, 100, 500, 1000]]</box>", "<box>[[0, 0, 1000, 500]]</box>"
    assert sample.turns == (("<image>Where is <ref>a cat</ref>?", f"{box} and <ref>a dog</ref>{other}"),)
    assert sample.unused == ()
    plain = to_sample(record("A cat.", objects={"bbox": [[1, 2, 3, 4]], "category": [3]}), "k")
    assert (plain.grounded, plain.unused) == (False, ("objects",))


def test_images_of_other_sizes_leave_no_doubt_about_shares_alone() -> None:
    other = Image.new("RGB", (20, 20))
    given = record("<box>[[1, 2, 3, 4]]</box>", "<image><image>") | {"image": [jpeg(), np.asarray(other)]}
    with pytest.raises(ValueError, match="different sizes"):
        to_sample(given, "k", boxes="pixels")
    assert to_sample(given, "k", boxes="0..1000").grounded
    assert to_sample(given | {"image": [jpeg(), jpeg(7)]}, "k", boxes="pixels").grounded


def test_without_boxes_a_source_with_coordinates_stays_plain() -> None:
    plain = to_sample(record("A cat."), "k", boxes="pixels")
    assert plain == to_sample(record("A cat."), "k")
    assert not plain.grounded
    words = to_sample(record("The HTML tags <box> and <ref>."), "k")
    assert not words.grounded


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_coordinates_come_back(data: st.DataObject) -> None:
    """Whole thousandths are the same by way of shares and of pixels of an image of any size."""
    xs, ys = (sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2))) for _ in range(2))
    box = (xs[0], ys[0], xs[1], ys[1])
    width, height = data.draw(st.integers(3, 3000)), data.draw(st.integers(3, 3000))
    image = np.zeros((height, width), np.uint8)
    pixels = [box[0] * width / 1000, box[1] * height / 1000, box[2] * width / 1000, box[3] * height / 1000]
    for boxes, numbers in (("pixels", pixels), ("0..1", [side / 1000 for side in box]), ("0..1000", box)):
        answer = f"<box>[[{', '.join(map(repr, numbers))}]]</box>"
        if boxes == "pixels" and max(numbers) <= 1 and any(number % 1 for number in numbers):
            continue  # refused: they could be shares
        sample = to_sample(record(answer) | {"image": image}, "k", boxes=boxes)
        assert boxes_in(sample.turns[0][1]) == [box]


def learnt_ids(sample: Sample) -> list[int]:
    features = sample_features(sample, config(), TOKENIZER)
    return features["text_targets"][features["text_weights"] > 0].tolist()


def test_markers_are_tokens_in_grounded_samples_alone() -> None:
    sample = to_sample(record(ANSWER, "<image>\nWhere is <ref>a cat</ref>?"), "k", boxes="0..1000")
    assert learnt_ids(sample) == TOKENIZER.encode(f"{ANSWER}<|im_end|>", allow_special=True)
    assert TOKENIZER.token_id("<box>") in learnt_ids(sample)
    tokens = sample_features(sample, config(), TOKENIZER)["text_tokens"].tolist()
    assert tokens.count(TOKENIZER.token_id("<ref>")) == 2  # also in the question
    plain = dataclasses.replace(sample, grounded=False)
    assert learnt_ids(plain) == [*TOKENIZER.encode(ANSWER, allow_special=False), TOKENIZER.token_id("<|im_end|>")]


def test_what_is_converted_stays_grounded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    answer = "<ref>a cat</ref><box>[[1.2, 1.6, 6.6, 8]]</box>"
    lines = [{"image": "a.jpg", "conversations": talk("Where?", answer)}, {"conversations": talk("Hi", "Ho")}]
    source = open_format("llava", write_lines(tmp_path / "a.jsonl", lines), boxes="pixels")
    convert(source, str(tmp_path / "out"))
    written = outcomes(open_format("array_record", str(tmp_path / "out")))
    assert sorted(map(str, written)) == sorted(map(str, outcomes(source)))
    assert sum(sample.grounded for sample in written) == 1


def mirror(sample: Sample, seeds: tuple[int, ...]) -> Sample:
    mirrored = dataclasses.replace(sample, images=tuple(ImageOps.mirror(image) for image in sample.images))
    return map_boxes(mirrored, lambda box: (1 - box[2], box[1], 1 - box[0], box[3]))


def test_boxes_follow_transforms_or_these_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{mirror.__module__}:mirror"
    sample = Sample("k", (Image.new("RGB", (40, 40)),), (("Where?", ANSWER),), grounded=True)
    for built_in in ("jpeg", "resolution"):
        assert apply([built_in], sample, (0,)).turns == sample.turns
    with pytest.raises(TransformFailed, match=r"changes images of a sample with boxes.*mirror.keeps_boxes = True"):
        apply([name], sample, (0,))
    apply([name], dataclasses.replace(sample, grounded=False), (0,))
    monkeypatch.setattr(mirror, "keeps_boxes", True, raising=False)
    turns = apply([name], sample, (0,)).turns
    assert turns == (("Where?", "<ref>a cat</ref><box>[[450, 200, 900, 1000]]</box>"),)


def test_the_preview_draws_boxes_without_the_padding() -> None:
    image = Image.new("RGB", (80, 48), (9, 200, 30))
    sample = Sample("k", (image,), (("Where?", "<box>[[250, 500, 1000, 1000]]</box>"),), grounded=True)
    settings = config()
    settings = dataclasses.replace(settings, images=dataclasses.replace(settings.images, multiscale=False))
    view = view_sample(sample_features(sample, settings, TOKENIZER), TOKENIZER, settings.model.vision)
    assert view.images[0].size == (96, 64)
    drawn = np.argwhere((np.asarray(view.images[0]) == (255, 0, 80)).all(axis=2))
    assert np.abs(drawn.min(axis=0) - (24, 20)).max() <= 1
    assert np.abs(drawn.max(axis=0) - (48, 80)).max() <= 1
    plain = dataclasses.replace(sample, grounded=False)
    view = view_sample(sample_features(plain, settings, TOKENIZER), TOKENIZER, settings.model.vision)
    assert not (np.asarray(view.images[0]) == (255, 0, 80)).all(axis=2).any()


def test_the_doctor_takes_markers_of_grounded_samples_for_tokens() -> None:
    budgets = {name.replace("slots", "tokens").replace("patch_tokens", "patches"): n for name, n in BUDGETS.items()}
    checkup = Checkup([], "a", config(), TOKENIZER, budgets)
    sample = Sample("k", (Image.new("RGB", (40, 40)),), (("Where?", ANSWER),), grounded=True)
    features = sample_features(sample, config(), TOKENIZER)
    note = checkup.note(sample)
    assert not note["flags"] & LITERAL
    assert note["text_tokens"] == len(features["text_tokens"])
    assert checkup.note(dataclasses.replace(sample, grounded=False))["flags"] & LITERAL


def test_a_recipe_names_the_coordinates(tmp_path: Path) -> None:
    from navil_jax.data.sources import open_source

    lines = [{"image": "a.jpg", "conversations": talk("Where?", "<box>[0.1, 0.2, 0.3, 0.4]</box>")}]
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = write_lines(tmp_path / "a.jsonl", lines)
    (sample,) = outcomes(open_source(SourceConfig("a", kind="llava", path=path, boxes="0..1"), "train"))
    assert isinstance(sample, Sample)
    assert sample.turns[0][1] == "<box>[[100, 200, 300, 400]]</box>"
    (reason,) = outcomes(open_source(SourceConfig("a", kind="llava", path=path), "train"))
    assert "say which" in str(reason)
