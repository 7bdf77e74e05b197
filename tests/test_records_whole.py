"""A record is used whole, or is bad with a reason: nothing to be seen is left out, no caption is made of nothing."""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import jpeg, outcomes, talk, write_lines
from PIL import Image

from navil_jax.data.formats import open_format
from navil_jax.data.formats.placeholders import placeholders
from navil_jax.data.formats.records import to_sample
from navil_jax.data.sample import Sample

RED, BLUE = jpeg(200), jpeg(90)
PNG_BUFFER = io.BytesIO()
Image.new("RGB", (9, 7), "green").save(PNG_BUFFER, "PNG")
PNG = PNG_BUFFER.getvalue()
BASE64 = base64.b64encode(PNG).decode()
DATA = f"data:image/png;base64,{BASE64}"
ANSWER = {"role": "assistant", "content": "Red."}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAVIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jpg").write_bytes(RED)
    (tmp_path / "b.jpg").write_bytes(BLUE)
    return tmp_path


def read(folder: Path, *records: object) -> list[Sample | str]:
    return outcomes(open_format("llava", write_lines(folder / "x.jsonl", records)))


def asked(*parts: dict) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}, ANSWER]}


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"file_name": "a.jpg", "text": "x"}, (RED,)),
        ({"image_path": "a.jpg", "question": "q", "answer": "x"}, (RED,)),
        ({"img": "a.jpg", "conversations": talk("q", "x")}, (RED,)),
        ({"image_file": "a.jpg", "messages": [{"role": "user", "content": "q"}, ANSWER]}, (RED,)),
        ({"images": [], "image": "a.jpg", "text": "x"}, (RED,)),
        ({"images": ["a.jpg"], "image": "a.jpg", "text": "x"}, (RED,)),
        ({"image": "a.jpg", "file_name": "folder/a.jpg", "image_id": 7, "image_width": 12, "text": "x"}, (RED,)),
        ({"image": "a.jpg", "video": None, "videos": [], "frames": "", "text": "x"}, (RED,)),
        ({"image": "a.jpg", "id": "coco/b.jpg", "mask": "m.png", "image_url": "http://x/b.jpg", "text": "x"}, (RED,)),
        ({"image": "a.jpg", "image_source": "coco", "photo_from": "", "page": "http://x/b.jpg", "text": "x"}, (RED,)),
        ({"image": "a.jpg", "clip_score": 0.3, "url": "http://x.org/a.jpg", "text": "x"}, (RED,)),
        ({"file_name": "page.txt", "id": 3, "num_images": 0, "text": "x"}, ()),
        ({"image": DATA, "text": "x"}, (PNG,)),
        ({"image": DATA.replace("image/png", "IMAGE/PNG;charset=x"), "text": "x"}, (PNG,)),
        ({"image": BASE64, "text": "x"}, (PNG,)),
        ({"image": {"data": BASE64}, "text": "x"}, (PNG,)),
        ({"image": "a.jpg", "type": "video", "text": "x"}, (RED,)),
        ({"image": base64.b64encode(RED).decode(), "text": "x"}, (RED,)),
        ({"image": base64.urlsafe_b64encode(RED).decode().rstrip("="), "text": "x"}, (RED,)),
        ({"image": base64.encodebytes(PNG).decode(), "text": "x"}, (PNG,)),
        (asked({"type": "image", "image": "a.jpg"}), (RED,)),
        (asked({"type": "image", "url": "a.jpg"}), (RED,)),
        (asked({"type": "image", "image": "a.jpg", "min_pixels": 5, "resized_height": 28}), (RED,)),
        (asked({"type": "image_url", "image_url": {"url": "a.jpg"}}), (RED,)),
        (asked({"type": "image_url", "image_url": {"url": DATA}}), (PNG,)),
        (asked({"type": "input_image", "image_url": DATA}), (PNG,)),
        (asked({"type": "image", "image": {"bytes": None, "path": "a.jpg"}, "text": None}), (RED,)),
        (asked({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}), (PNG,)),
        (asked({"image": "a.jpg"}, {"image": "b.jpg"}), (RED, BLUE)),
        ({**asked({"type": "image"}), "images": ["a.jpg"]}, (RED,)),
        ({**asked({"type": "image", "index": 0}), "images": ["a.jpg"]}, (RED,)),
        ({**asked({"type": "image", "image": "a.jpg"}), "images": ["a.jpg"]}, (RED,)),
    ],
)
def test_images_are_found_where_they_clearly_stand(folder: Path, record: dict, images: tuple[bytes, ...]) -> None:
    (found,) = read(folder, record)
    assert isinstance(found, Sample), found
    assert found.images == images


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"video": "c.mp4", "conversations": talk("What?", "x")}, "no such file"),
        ({"conversations": talk("<video>\nWhat?", "x")}, "its text has <video> and it has no image"),
        ({"image": "a.jpg", "conversations": talk("<image><video>What?", "x")}, "it has no such video"),
        ({"image": "a.jpg", "video": "c.mp4", "text": "x"}, "no such file"),
        ({"clip": "c.mp4", "text": "x"}, "clip names what is not read"),
        ({"path": "c.MP4", "text": "x"}, "path names what is not read"),
        ({"image1": "a.jpg", "text": "x"}, "image1 names what is not read"),
        ({"image": "a.jpg", "image_2": "b.jpg", "text": "x"}, "image_2 names what is not read"),
        ({"Image": "a.jpg", "text": "x"}, "Image names what is not read"),
        ({"baseImage": {"path": "a.jpg"}, "text": "x"}, "baseImage names what is not read (dict)"),
        ({"image_id": 17, "text": "x"}, "image_id names what is not read"),
        ({"meta": {"photo": ["a.jpg"]}, "text": "x"}, "meta names what is not read"),
        ({"source": DATA, "text": "x"}, "source names what is not read"),
        ({"pixel_values": [[1, 2]], "text": "x"}, "pixel_values names what is not read"),
        ({"modality": "video", "text": "x"}, "modality names what is not read (video)"),
        ({"frames_dir": "there", "text": "x"}, "frames_dir names what is not read (there)"),
        ({"image": "a.jpg", "visual_input": "there", "text": "x"}, "visual_input names what is not read (there)"),
        ({"image": "a.jpg", "images": ["b.jpg"], "text": "x"}, "images and image both name images"),
        ({"image": "a.jpg", "file_name": "b.jpg", "text": "x"}, "file_name names what is not read (b.jpg)"),
        ({"image": "a.jpg", "reference": "b.jpg", "text": "x"}, "reference names what is not read (b.jpg)"),
        ({"image": "a.jpg", "source_image": "b.jpg", "text": "x"}, "source_image names what is not read (b.jpg)"),
        (
            {"image": "a.jpg", "original_image": {"bytes": DATA}, "text": "x"},
            "original_image names what is not read (dict)",
        ),
        ({"image": DATA, "reference": ["c.mp4"], "text": "x"}, "reference names what is not read (list)"),
        (asked({"type": "video", "video": "c.mp4"}), "part 1: is of type video, which is not read"),
        (asked({"type": "image", "image": "a.jpg", "url": "b.jpg"}), "part 1: names 2 images"),
        (asked({"type": "text", "text": "x", "image": "a.jpg"}), "part 1: image names what is not read"),
        (asked({"type": "image", "file_id": "f-1", "source": {"file_id": "f-1"}}), "names a file on a server"),
        ({**asked({"type": "image", "index": 1}), "images": ["a.jpg"]}, "image 1 stands where image 0 is due"),
        ({**asked({"type": "image", "image": "a.jpg"}), "images": ["b.jpg"]}, "give all in one way"),
        (asked({"type": "image"}), "0 images but <image> stands 1 times"),
        (asked({"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}), "download it first"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "image"}]}]},
            "an image can stand in a question only",
        ),
        (
            {"conversations": [{"from": "human", "value": "q", "image": "a.jpg"}, *talk("q", "a")[1:]]},
            "conversations 1",
        ),
        ({"turns": [{"question": "q", "answer": "a", "image": "a.jpg"}]}, "turns 1: image names what is not read"),
        ({"turns": ["ab"]}, "turns 1: must be a question and an answer"),
        ({"turns": "ab"}, "turns: must be a list"),
        ({"conversations": json.dumps(talk("q", "a"))}, "conversations: must be a list"),
        ({"caption": ["one", "two"]}, "caption, part 1: must be an object with type and text, not str"),
        ({"image": "data:video/mp4;base64,AAAA", "text": "x"}, "a data: address of video/mp4, not of an image"),
        ({"image": "data:image/png;base64,A", "text": "x"}, "broken base64"),
        ({"image": "ftp://x.org/a.jpg", "text": "x"}, "addresses of ftp:// are not read from records"),
        ({"image": {"bytes": None, "path": "zip://a.jpg::x.zip"}, "text": "x"}, "addresses of zip:// are not read"),
        ({"image": "HTTPS://x.org/a.jpg", "text": "x"}, "download it first"),
        ({"text": "<image> A cat."}, "its text has <image> and it has no image"),
        ({"image": "a.jpg", "caption": math.nan}, "has none of"),
        ({"image": "a.jpg", "caption": math.inf}, "caption: must be text, not inf"),
        ({"question": "q", "answer": -math.inf}, "answer: must be text, not -inf"),
        ({"image": "a.jpg", "caption": "\u200b"}, "caption: answer 1 is empty"),
        ({"image": "a.jpg", "caption": "\0 \ufeff\u2028"}, "caption: answer 1 is empty"),
        ({"image": "a.jpg\n", "caption": "x"}, "a name with blanks or line ends around it"),
    ],
)
def test_what_is_not_used_makes_a_record_bad(folder: Path, record: dict, reason: str) -> None:
    (found,) = read(folder, record)
    assert isinstance(found, str), found
    assert reason in found


@pytest.mark.parametrize(
    "mark",
    [
        "<|image|>",
        "<ImageHere>",
        "<|image_pad|>",
        "<|vision_start|>",
        "[IMG]",
        "<img>a.jpg</img>",
        "<image_placeholder>",
        "<Image>",
        "<|image_1|>",
        "<start_of_image>",
        "<image_soft_token>",
        "<video>",
        "<|video_pad|>",
        "<__media__>",
        "<im_patch>",
        "[img-12]",
        "<image_00>",
        "</image>",
        "<image/>",
        "<audio>",
        "<|audio_pad|>",
        "&lt;image&gt;",
    ],
)
def test_placeholders_of_other_software_are_found(folder: Path, mark: str) -> None:
    assert placeholders([f"a{mark}b", "<image><img>"]) == [mark]
    alone, beside = read(
        folder, {"conversations": talk(f"{mark}What?", "x")}, {"image": "a.jpg", "conversations": talk(mark, "x")}
    )
    assert mark in alone
    assert isinstance(beside, str) == ("video" in mark or "audio" in mark)


@pytest.mark.parametrize(
    "mark", ["< image >", "![](a.jpg)", "![A cat.](x/a.png)", "<img src='a.jpg'>", '<img alt="" src="a.webp"/>']
)
def test_images_that_a_question_shows_by_other_means_are_missed(folder: Path, mark: str) -> None:
    asks, answers = talk(f"{mark}\nWhat?", "x"), talk("Write HTML.", f"So: {mark}.")
    alone, beside, written = read(
        folder, {"conversations": asks}, {"image": "a.jpg", "conversations": asks}, {"conversations": answers}
    )
    assert f"its text has {mark} and it has no image" in str(alone)
    assert isinstance(beside, Sample)
    assert isinstance(written, Sample)


@pytest.mark.parametrize("text", ["an <img src='a'>", "[img]x[/img]", "a <image of", "<|im_start|>", "1 < image > 0"])
def test_other_texts_are_no_placeholders(text: str) -> None:
    assert placeholders([text]) == []


def test_placeholders_are_sought_in_linear_time() -> None:
    for text in (
        "<image" + "1" * 100_000,
        "<image" + " 1" * 50_000 + "x",
        "<img>" * 20_000,
        "[IMG" * 20_000,
        "<" * 100_000,
    ):
        assert placeholders([text]) == []


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), np.float16("-inf")])
def test_numbers_of_numpy_that_are_none_are_no_captions(value: np.floating) -> None:
    with pytest.raises(ValueError, match=r"has none of|must be text, not -?inf"):
        to_sample({"image": RED, "caption": value}, "k")


def test_numbers_of_numpy_are_text() -> None:
    assert to_sample({"image": RED, "caption": np.int64(7)}, "k").turns[0][1] == "7"
    assert to_sample({"turns": np.array([["q", "a"]], dtype=object)}, "k").turns == (("q", "a"),)


def test_reasons_and_keys_are_short(folder: Path) -> None:
    junk = base64.b64encode(bytes(60_000)).decode()
    records = [
        {"image": junk, "text": "x"},
        {"image": DATA[:-5] + "!", "text": "x"},
        {"image": "gopher://" + junk, "text": "x"},
        {"photo_of_it": junk, "text": "x"},
        {junk: 1},
        {"conversations": [{"from": junk, "value": "x"}]},
        "{" + json.dumps(junk) + ": 1, " + json.dumps(junk) + ": 2}",
        {"key": junk, "text": "x"},
    ]
    for found in read(folder, *(r.encode() if isinstance(r, str) else r for r in records)):
        assert len(found if isinstance(found, str) else found.key) <= 1000
        assert "iVBORw0KGgoAAAANSUhEUgAA" not in str(found)


@pytest.mark.parametrize(
    "line", [b'{"a": ' * 100_000, b"[" * 100_000, b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"a":1,"a":2}']
)
def test_lines_that_no_record_can_be(folder: Path, line: bytes) -> None:
    bad, good = read(folder, line, {"text": "x"})
    assert isinstance(bad, str)
    assert isinstance(good, Sample)


_SEEN = st.sampled_from(["a.jpg", "b.jpg", DATA, BASE64, "none.jpg", "c.mp4", "s3x://b/o.jpg"])
_FIELD = st.sampled_from(
    ["image", "images", "img", "file_name", "image_path", "image1", "video", "frames", "photo", "x"]
)
_TEXT = st.sampled_from(["What?", "<image>What?", "<image> <image>", "<video>", "<|image|>", "", " "])
_WORDS = st.sampled_from(["x", "Red.", math.nan, math.inf, 7, None, "", "<image>", "[IMG]"])
_PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video"])},
    optional={"text": _TEXT, "image": _SEEN, "image_url": st.fixed_dictionaries({"url": _SEEN})},
)


def assert_whole(found: Sample, fields: dict, question: object, answer: object) -> None:
    """The sample has all that its record names."""
    content = {"a.jpg": RED, "b.jpg": BLUE, DATA: PNG, BASE64: PNG}
    beside = {
        field: value if isinstance(value, list) else [value]
        for field, value in fields.items()
        if value and value != "c.mp4"
    }
    if PNG in found.images:  # which brings no name: one beside it may be its own
        for field in ("x", "image_path", "file_name"):
            if len(beside) > 1 and not {DATA, BASE64} & set(beside.get(field, ())):
                beside.pop(field, None)
    parts = [part for part in question if part["type"] != "text"] if isinstance(question, list) else []
    inside = [part.get("image") or part.get("image_url", {}).get("url") for part in parts]
    inside = [name for name in inside if name]
    for named in (*beside.values(), inside):
        seen = tuple(content[name] for name in named)
        assert seen in ((), found.images) or (len(seen) == 1 and seen[0] in found.images)
    assert bool(found.images) == bool(any(beside.values()) or inside)
    ((text, said),) = found.turns
    assert text.count("<image>") in (0, len(found.images))
    assert said == str(answer)
    assert said not in ("nan", "inf", "None", "")
    assert found.images or not placeholders([text, said])


@settings(max_examples=200, deadline=None)
@given(
    fields=st.dictionaries(_FIELD, _SEEN | st.lists(_SEEN, max_size=2) | st.none(), max_size=3),
    question=_TEXT | st.lists(_PART, max_size=3),
    answer=_WORDS,
)
def test_every_record_is_used_whole_or_is_bad_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, fields: dict, question: object, answer: object
) -> None:
    """All that names an image is one of the sample's images, in order; there is no other account of one."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jpg").write_bytes(RED)
    (folder / "b.jpg").write_bytes(BLUE)
    record = {**fields, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    (found,) = read(folder, record)
    if isinstance(found, Sample):
        assert_whole(found, fields, question, answer)
    assert found
