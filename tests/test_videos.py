"""Frames of videos as images; the videos are made here."""

import dataclasses
import io
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import outcomes, talk, tar_bytes, write_lines
from made_sources import TOKENIZER, doctor_config
from PIL import Image

from navil_jax.config import SourceConfig
from navil_jax.data.__main__ import main
from navil_jax.data.features import TooLong, fitting_features
from navil_jax.data.formats import open_format
from navil_jax.data.formats.record_videos import Frames, read_frames
from navil_jax.data.formats.records import to_sample
from navil_jax.data.sample import Sample
from navil_jax.data.sources import open_source

try:
    import av
except ModuleNotFoundError:
    av = None
needs_av = pytest.mark.skipif(av is None, reason="videos need the package av: pip install av")


def video(frames: int = 12, fps: int = 4, kind: str = "mp4", codec: str = "mpeg4") -> bytes:
    """Of 64 x 48 pixels; frame n has the grey 20 * n."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 20 % 256, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


CLIP = video() if av else bytes(1000)


def shown(images: Any) -> list[int]:
    """The number of each frame."""
    return [round(np.asarray(image).mean() / 20) for image in images]


@needs_av
@pytest.mark.parametrize(
    ("most", "fps", "numbers"),
    [
        (3, None, [2, 6, 10]),
        (1, None, [6]),
        (12, None, list(range(12))),
        (99, None, list(range(12))),  # as many as there are
        (8, 1.0, [2, 6, 10]),  # 3 seconds
        (2, 1.0, [3, 9]),  # capped
        (8, 0.01, [6]),  # one at least
        (99, 50.0, list(range(12))),
    ],
)
def test_frames_are_spread_evenly(most: int, fps: float | None, numbers: list[int]) -> None:
    assert shown(read_frames(CLIP, most, fps)) == numbers


@needs_av
@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("avi", "mpeg4"),
        ("matroska", "mpeg4"),
        ("mpegts", "mpeg2video"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("ogg", "libtheora"),
        ("flv", "flv"),
        ("mp4", "libx265"),
    ],
)
def test_every_kind_of_file_gives_the_same_frames(kind: str, codec: str) -> None:
    try:
        content = video(kind=kind, codec=codec, fps=25)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"{codec} cannot be written here: {error}")
    assert shown(read_frames(content, 3)) == [2, 6, 10]


@needs_av
@settings(deadline=None, max_examples=40)
@given(st.integers(0, len(CLIP) - 1), st.sampled_from(["mp4", "matroska", "avi"]))
def test_a_video_that_is_cut_off_is_refused_or_gives_whole_frames(place: int, kind: str) -> None:
    whole = CLIP if kind == "mp4" else video(kind=kind)
    try:
        frames = read_frames(whole[: place * len(whole) // len(CLIP)], 3)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        wanted = [[(2 * number + 1) * there // 6 for number in range(3)] for there in (12, 11, 10)]
        assert shown(frames) in wanted  # no more than the last frames can be missing


@needs_av
@pytest.mark.parametrize(
    "content", [b"", b"broken", CLIP[:300], CLIP[: len(CLIP) // 2], b"RIFF" + bytes(400), bytes(999)]
)
def test_what_is_no_video_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"broken video|part of the|no frames|no images"):
        read_frames(content, 3)


@needs_av
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_no_video(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, kind)
    with pytest.raises(ValueError, match="a broken video, or none"):
        read_frames(buffer.getvalue(), 3)


@needs_av
def test_a_list_of_other_files_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_bytes(video(kind="mpegts", codec="mpeg2video", fps=25))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{tmp_path}/a.ts\n#EXT-X-ENDLIST\n"
    listed = f"ffconcat version 1.0\nfile {tmp_path}/a.ts\n"
    for content in (playlist, listed):
        with pytest.raises(ValueError, match="a broken video, or none"):
            read_frames(content.encode(), 3)


@needs_av
def test_a_sound_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="only sound"):
        read_frames(buffer.getvalue(), 3)


def sample(question: str, root: Path, frames: int = 2, **fields: Any) -> Sample:
    (root / "a.mp4").write_bytes(CLIP)
    return to_sample({"conversations": talk(question, "a"), **fields}, "k", str(root), frames=Frames(frames))


@needs_av
@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<video>\nWhat?", "<image>\n<image>\nWhat?"),
        ("<image>\nWhat?", "<image>\n<image>\nWhat?"),  # as LLaVA-Video has it
        ("What happens in <video> here?", "What happens in <image>\n<image> here?"),
        ("What?", "<image>\n<image>\nWhat?"),
    ],
)
def test_frames_stand_where_the_video_does(question: str, expected: str, tmp_path: Path) -> None:
    found = sample(question, tmp_path, video="a.mp4")
    assert found.turns == ((expected, "a"),)
    assert shown(found.images) == [3, 9]
    assert not found.unused
    assert sample(question, tmp_path, videos=["a.mp4"]) == found
    assert sample(question, tmp_path, video={"bytes": CLIP, "path": "a.mp4"}) == found


@needs_av
def test_images_and_videos_stand_in_the_order_of_their_marks(tmp_path: Path) -> None:
    image = io.BytesIO()
    read_frames(CLIP, 12)[5].save(image, "PNG")
    found = sample("<video> or <image> or <video>?", tmp_path, image=image.getvalue(), videos=["a.mp4", CLIP])
    assert found.turns[0][0] == "<image>\n<image> or <image> or <image>\n<image>?"
    assert [isinstance(content, bytes) for content in found.images] == [False, False, True, False, False]
    first = sample("What?", tmp_path, image=image.getvalue(), video="a.mp4")
    assert [isinstance(content, bytes) for content in first.images] == [True, False, False]
    for question in ("<image>What?", "<video>What?", "<image><image>What?", "<image><video><video>"):
        with pytest.raises(ValueError, match="1 videos and 1 images but"):
            sample(question, tmp_path, image=image.getvalue(), video="a.mp4")


@needs_av
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "none.mp4"}, "none.mp4"),
        ({"video": "a.mp4", "videos": ["b.mp4"]}, "name different videos"),
        ({"videos": ["a.mp4", ""]}, "one of its videos is empty"),
        ({"video": 7}, "a video must be a path|must be a path or encoded bytes"),
        ({"video": "http://x/a.mp4"}, "download it first"),
        ({"video": "a.mp4", "clip": "b.mp4"}, "clip names what is not read"),
        ({"video": "a.mp4", "audio": "b.wav"}, "audio names what is not read"),
    ],
)
def test_videos_that_cannot_be_used_make_a_sample_bad(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=reason):
        sample("What?", tmp_path, **fields)


def test_without_the_package_the_reason_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="read with the package av: pip install av"):
        sample("What?", tmp_path, video="a.mp4")


@needs_av
def test_every_frame_counts_against_the_row(tmp_path: Path) -> None:
    config = doctor_config()
    two = sample("What?", tmp_path, video="a.mp4")
    features, _ = fitting_features(two, config, TOKENIZER, None)
    assert (features["visual_tokens"] == TOKENIZER.token_id("<img>")).sum() == 2
    budgets = {name: len(features[name]) for name in ("visual_tokens", "text_tokens", "patches")}
    fitting_features(two, config, TOKENIZER, budgets)
    with pytest.raises(TooLong):
        fitting_features(sample("What?", tmp_path, 3, video="a.mp4"), config, TOKENIZER, budgets)


@needs_av
def test_videos_of_files_and_tars_are_converted_to_their_frames(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(CLIP)
    (tmp_path / "b.mp4").write_bytes(CLIP[:400])
    lines = [{"video": name, "conversations": talk("<video>\nWhat?", "a")} for name in ("a.mp4", "b.mp4")]
    path = write_lines(tmp_path / "x.jsonl", lines)
    good, bad = outcomes(open_format("llava", path, frames=Frames(3)))
    assert isinstance(good, Sample)
    assert isinstance(bad, str)
    record = json.dumps({"conversations": talk("<video>\nWhat?", "a"), "video": "k.mp4"}).encode()
    (tmp_path / "w.tar").write_bytes(tar_bytes({"k.json": record, "k.mp4": CLIP, "l.mp4": CLIP, "l.txt": b"A clip."}))
    first, caption = open_format("webdataset", str(tmp_path / "w.tar"), frames=Frames(3))
    assert (first.turns, first.images) == (good.turns, good.images)
    assert shown(caption.images) == [2, 6, 10]
    arguments = ["convert", "--from", "llava", "--path", path, "--workers=0", "--video-frames", "3"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (found,) = open_format("array_record", str(tmp_path / "out"))
    assert found.turns == good.turns
    assert shown(Image.open(io.BytesIO(content)) for content in found.images) == [2, 6, 10]
    assert main([*arguments, "--video-fps", "1", "--out", str(tmp_path / "out")]) == 2  # another conversion


@needs_av
def test_settings_of_a_source_reach_its_videos(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(CLIP)
    path = write_lines(tmp_path / "x.jsonl", [{"video": "a.mp4", "caption": "A clip."}])
    entry = SourceConfig("clips", kind="llava", path=path, video_frames=9, video_fps=1.0)
    assert shown(open_source(entry, "train")[0].images) == [2, 6, 10]
    assert shown(open_source(dataclasses.replace(entry, video_fps=None), "train")[0].images) == shown(
        read_frames(CLIP, 9)
    )
