"""The videos of a record: some frames of each, as images in the place of `<video>`."""

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from navil_jax.data.formats.record_images import is_given, is_missing, read_image, same
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import Turn

VIDEO_FIELDS = ("video", "videos")
VIDEO = "<video>"
_MARK = re.compile(f"{PLACEHOLDER}|{VIDEO}")
# No images, and no lists of other files or addresses, which FFmpeg would open.
_OPEN = {"format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,flv,gif,ogg,asf,ivf", "protocol_whitelist": "none"}
# A video may end before it says by its longest frame and so many seconds, or this share of its length.
_SECONDS, _SHARE = 0.1, 0.02


class Frames(NamedTuple):
    """Which frames of a video become images."""

    most: int = 8
    fps: float | None = None  # frames for each second, at most `most`; None: `most`


FRAMES = Frames()


def video_values(record: Mapping[str, Any]) -> list[Any]:
    """The record's videos as they stand in its fields. ValueError: two fields hold different ones, or one is empty."""
    given = [value for field in VIDEO_FIELDS if is_given(value := record.get(field))]
    lists = [list(value) if isinstance(value, list | tuple) else [value] for value in given]
    if len(lists) > 1 and not same(*lists):
        raise ValueError(f"{' and '.join(VIDEO_FIELDS)} name different videos; put all of them into videos")
    if any(not is_given(value) for value in (lists[0] if lists else ())):
        raise ValueError("one of its videos is empty; a video must be a path or a file's bytes")
    return lists[0] if lists else []


def with_frames(
    turns: Sequence[Turn], images: Sequence[Any], videos: Sequence[Any], root: str, frames: Frames
) -> tuple[list[Turn], list[Any]]:
    """The turns with an `<image>` for each frame, and all images in order.

    `<video>` says where a video stands, or `<image>` where there are videos alone. Without any the frames follow the
    images in front of the first question.

    Args:
      images: of the record, as they stand there.
      videos: as `record_images.read_image` takes images.
      frames: which ones of each.

    Raises:
      ValueError, OSError: a video cannot be read, or it is not clear where it stands.
    """
    questions = [question for question, _ in turns]
    marks = [mark for question in questions for mark in _MARK.findall(question)]
    if not images and VIDEO not in marks:
        questions = [question.replace(PLACEHOLDER, VIDEO) for question in questions]
        marks = [VIDEO] * len(marks)
    if not marks:
        marks = [PLACEHOLDER] * len(images) + [VIDEO] * len(videos)
        questions[0] = "".join(f"{mark}\n" for mark in marks) + questions[0]
    wanted = {PLACEHOLDER: len(images), VIDEO: len(videos)}
    for mark, count in wanted.items():
        if marks.count(mark) != count:
            raise ValueError(
                f"{len(videos)} videos and {len(images)} images but {mark} stands {marks.count(mark)} times in the "
                "questions"
            )
    shown_of_videos = (read_frames(read_image(video, root), *frames) for video in videos)
    remaining: dict[str, Iterator[list[Any]]] = {
        PLACEHOLDER: iter([[image] for image in images]),
        VIDEO: shown_of_videos,
    }
    found: list[Any] = []

    def put(match: re.Match[str]) -> str:
        shown = next(remaining[match[0]])
        found.extend(shown)
        return "\n".join([PLACEHOLDER] * len(shown))

    questions = [_MARK.sub(put, question) for question in questions]
    return [(question, answer) for question, (_, answer) in zip(questions, turns, strict=True)], found


def read_frames(content: Any, most: int, fps: float | None = None) -> list[Image.Image]:
    """Frames of a video, evenly spread: each stands in the middle of its share of the frames. Never turned.

    Decodes the video as far as the last of them.

    Args:
      content: of the file.
      most: frames at most; a video of fewer gives all of them.
      fps: frames for each second, at least one; None: `most`.

    Raises:
      ValueError: no video, broken, cut off, or the package av is not installed.

    Example: 3 of a video of 9 frames -> frames 1, 4 and 7, from 0
    """
    if not isinstance(content, bytes):
        raise ValueError("a video must be a path or a file's bytes")
    try:
        import av
    except ModuleNotFoundError as error:
        raise ValueError("videos are read with the package av: pip install av") from error
    try:
        times, seconds = _times(av, content)
        count = min(most if fps is None else max(1, round(seconds * fps)), most, len(times))
        wanted = [times[(2 * number + 1) * len(times) // (2 * count)] for number in range(count)]
        return _decoded(av, content, wanted)
    except av.FFmpegError as error:
        raise ValueError(f"a broken video, or none: {error.strerror}") from error


def _times(av: Any, content: bytes) -> tuple[list[int], float]:
    """When frames of the video are shown, in units of its stream; and its length in seconds. Decodes nothing."""
    with av.open(io.BytesIO(content), options=_OPEN) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("the video has no images, only sound or text")
        times, end = [], 0.0
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or not packet.size:
                continue
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if packet.stream == stream:
                times.append(time)
        said = (container.duration or 0) / av.time_base
        start = (container.start_time or 0) / av.time_base
    if not times:
        raise ValueError("the video has no frames")
    if len(times) < stream.frames:
        raise ValueError(f"only a part of the video is there: {len(times):,} of {stream.frames:,} frames")
    times = sorted(set(times))
    longest = float(max((b - a for a, b in itertools.pairwise(times)), default=0) * stream.time_base)
    if end - start < said - longest - max(_SECONDS, _SHARE * said):
        raise ValueError(f"only a part of the video is there: {end - start:.1f} of {said:.1f} seconds")
    return times, end - start


def _decoded(av: Any, content: bytes, wanted: Sequence[int]) -> list[Image.Image]:
    """The frames that are shown at these times, which rise."""
    found: list[Image.Image] = []
    with av.open(io.BytesIO(content), options=_OPEN) as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            time = frame.dts if frame.pts is None else frame.pts
            while len(found) < len(wanted) and not is_missing(time) and time >= wanted[len(found)]:
                if frame.is_corrupt:
                    raise ValueError(f"frame {len(found) + 1} of {len(wanted)} of the video is broken")
                found.append(frame.to_image())
            if len(found) == len(wanted):
                return found
    raise ValueError(f"only a part of the video is there: {len(found)} of {len(wanted)} frames can be decoded")
