"""What formats have in common: one record (a mapping, as JSON has them) -> one `Sample`."""

import abc
import dataclasses
import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from navil_jax.config.plain import unique_keys
from navil_jax.data.formats import files
from navil_jax.data.formats.placeholders import embedded, placeholders
from navil_jax.data.formats.record_images import (
    IMAGE_FIELDS,
    NAME_FIELDS,
    check_all_seen,
    image_values,
    is_missing,
    is_there,
    read_image,
    size_under_boxes,
)
from navil_jax.data.formats.record_text import SYSTEM_FIELDS, TEXT_FIELDS, Conversation, conversation
from navil_jax.data.formats.record_videos import FRAMES, VIDEO_FIELDS, Frames, video_values, with_frames
from navil_jax.data.grounding import Coordinates, grounded_turns
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import BadSample, Sample, check_index
from navil_jax.errors import UserError

FIELDS = (*IMAGE_FIELDS, *TEXT_FIELDS, *SYSTEM_FIELDS, "answer", "kind", "key", "url")  # that may make a sample
TEXTS_SAMPLES = 100_000  # most samples of a source whose text trains a tokenizer, evenly spread
_LONGEST_WORD, _LONGEST_REASON, _LONGEST_NAME = 120, 500, 1000  # characters
_MOST_UNUSED, _LONGEST_FIELD = 50, 80  # fields of a record that are named as not used, and characters of each
_LONG_WORD = re.compile(rf"(\S{{{_LONGEST_WORD}}})\S+")
# What makes a sample bad if its record or image cannot be read; others, of disk or network, are no fault of a sample.
_SAMPLE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
_SAMPLE_ERRNOS |= {errno.ENXIO}  # a pipe or a device


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read."""

    root: str = ""  # folder of the images that they name; empty: that of their file
    prompt: str = ""  # question of samples that are a caption; empty: `CAPTION_PROMPT`, and none without an image
    boxes: Coordinates = ""  # coordinates of boxes in their texts; empty: the records say
    frames: Frames = FRAMES  # of their videos

    def check(self) -> None:
        """Raises `UserError` if there is no such folder of images."""
        if self.root and not files.is_remote(self.root) and not os.path.isdir(files.at_home(self.root)):
            raise UserError(
                f"{self.root}: no such folder of images (root, or --root); give the one below which records name them"
            )


READING = Reading()


class RecordSource(abc.ABC):
    """A `Source` of records. A format says how many there are, what they are called, and how one is read."""

    def __init__(self, path: str, reading: Reading = READING, root: str = "") -> None:
        """Args:
        path: of the file or folder.
        root: that of a `reading` without one; empty: the folder of the file.
        """
        self.path, self.reading = path, reading
        self.root = reading.root or root or files.folder_of(path)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Name of the sample where its record has no "key", found without reading it."""

    @abc.abstractmethod
    def record(self, index: int) -> Mapping[str, Any]:
        """The record. ValueError says what is wrong with it."""

    def versions(self) -> list[files.Version]:
        """Of the files that the records are in."""
        return [files.version(self.path)]

    def stamp(self) -> str:
        """What these files are known by: another text when one of them has changed."""
        return files.stamp(self.versions())

    def fingerprint(self) -> str:
        """How many samples of which content, whenever and wherever their files were written."""
        return files.fingerprint(len(self), self.versions())

    def place(self, index: int) -> str:
        """Where a bad record is found, for messages, if the key does not tell."""
        return ""

    def __getitem__(self, index: int) -> Sample:
        """Raises `BadSample` for a record that cannot be used, OSError if the disk or the network fails."""
        check_index(index, len(self))
        try:
            said = self.reading
            return to_sample(self.record(index), self.key(index), self.root, said.prompt, said.boxes, said.frames)
        except (ValueError, UserError, OSError, RecursionError) as error:
            if isinstance(error, OSError) and not is_of_sample(error):
                raise
            raise BadSample(self.path, self.key(index), self.place(index) + reason(error)) from error

    def texts(self, samples: int = TEXTS_SAMPLES) -> Iterator[str]:
        """Questions and answers of so many samples at most, evenly spread; bad ones are left out."""
        for index in range(0, len(self), -(-len(self) // samples)):
            try:
                said = conversation(self.record(index), self.reading.prompt)
            except (ValueError, RecursionError):
                continue
            for turn in said.turns:
                yield from turn


def is_of_sample(error: OSError) -> bool:
    """Whether the sample is to blame (it names a file that is not there), and not the disk or the network."""
    return isinstance(error, FileNotFoundError) or error.errno in _SAMPLE_ERRNOS


def parse_json(content: bytes) -> Any:
    """The value of JSON text in UTF-8. ValueError says where it is broken, or which key stands twice in an object."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError("not usable JSON: a number of more than 4,300 digits") from error


def reason(error: Exception) -> str:
    """One line on what is wrong; long words such as an image's base64 are cut."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = _of_system(error) if isinstance(error, OSError) else str(error)
    text = " ".join(_LONG_WORD.sub(r"\1...", text).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _of_system(error: OSError) -> str:
    if not error.filename:
        return f"no such file: {error}" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    name = os.fsdecode(error.filename)
    if isinstance(error, FileNotFoundError):
        link = f" ({files.what_is_wrong(name)})" if os.path.islink(name) else ""
        return f"no such file: {name}{link}"
    return f"{name}: {error.strerror}"


def check_columns(path: str, names: Sequence[str]) -> None:
    """Raises `UserError` if rows of these columns make no samples: no text, images by address only, a name twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; give one of them another name")
    if not set(TEXT_FIELDS) & set(names):
        raise UserError(f"{path}: no column of {', '.join(TEXT_FIELDS)}; the columns are {', '.join(names)}")
    if {"url", "image_url"} & set(names) and not {*IMAGE_FIELDS, *NAME_FIELDS} & set(names):
        raise UserError(f"{path}: has addresses of images only; download them (img2dataset writes parquet with them)")


def to_sample(
    record: Any, key: str, root: str = "", prompt: str = "", boxes: Coordinates = "", frames: Frames = FRAMES
) -> Sample:
    """A sample of a record.

    Images stand where the questions say `<image>`, in order, or in front of the first question if none does.

    Args:
      record: images under one of `IMAGE_FIELDS` or in the questions (see `record_images.read_image`); text as
        `conversation` reads it; "key" and "kind" where there are.
      boxes: coordinates of the boxes in its texts; "": the record says, see `grounding`.
      frames: which ones of its videos become images.

    Raises:
      ValueError, OSError: the record cannot be used, or holds something to be seen that is not; the message says why.
    """
    said = conversation(record, prompt)
    values, videos = _all_images(record, said), video_values(record)
    check_all_seen(record, (*FIELDS, *VIDEO_FIELDS), [*values, *videos])
    if videos:
        said.turns, values = with_frames(said.turns, values, videos, root, frames)
    _check_placeholders(said, len(values))
    images = tuple(read_image(value, root) for value in values)
    turns, grounded, used = grounded_turns(record, said.turns, boxes, lambda: list(map(size_under_boxes, images)))
    said.used += [*used, *VIDEO_FIELDS]
    name, kind = (_name(record.get(field), field) for field in ("key", "kind"))
    unused = _unused(record, said, bool(values))
    return Sample(name or key, images, tuple(turns), kind, said.system, grounded, unused)


def _unused(record: Mapping[str, Any], said: Conversation, has_images: bool) -> tuple[str, ...]:
    """The fields that say something and are no part of the sample, by name."""
    used = {*said.used, *IMAGE_FIELDS, *(NAME_FIELDS if has_images else ()), "key", "kind"}
    names = {name for name, value in record.items() if name not in used and is_there(value)} | said.unused
    return tuple(name[:_LONGEST_FIELD] for name in sorted(names)[:_MOST_UNUSED])


def _all_images(record: Mapping[str, Any], said: Conversation) -> list[Any]:
    """The images of fields, or those that stand in the questions themselves."""
    values, own = image_values(record), [image for image in said.images if image is not None]
    if not own or (values and values == own):
        return values
    if values or len(own) < len(said.images):
        raise ValueError(f"{len(own)} images stand in the questions and {len(values)} beside them; give all in one way")
    return own


def _check_placeholders(said: Conversation, images: int) -> None:
    """Raises ValueError if the text says that there are other images than there are."""
    questions = [question for question, _ in said.turns]
    answers = [answer for _, answer in said.turns]
    found = sum(question.count(PLACEHOLDER) for question in questions)
    if found and found != images:
        raise ValueError(f"{images} images but {PLACEHOLDER} stands {found} times in the questions")
    others = [*placeholders((said.system or "", *questions, *answers)), *embedded(questions)]
    if not images:
        others += [PLACEHOLDER for text in (said.system or "", *answers) if PLACEHOLDER in text]
    if others and not images:
        raise ValueError(f"its text has {others[0]} and it has no image")
    if clip := next((mark for mark in others if re.search("video|audio", mark, re.IGNORECASE)), None):
        kind = "video" if "video" in clip.lower() else "sound"
        raise ValueError(f"its text has {clip}, and it has no such {kind}")


def _name(value: Any, field: str) -> str:
    """The text of "key" or "kind"; empty: the record has none."""
    if is_missing(value) or value in ("", b""):
        return ""
    text = value.decode() if isinstance(value, bytes) else str(value)
    text.encode()  # half a surrogate pair is a ValueError
    return text[:_LONGEST_NAME]
