"""Tars of webdataset: members with the same key are one sample. Nothing is unpacked."""

import io
import tarfile
from collections.abc import Mapping
from typing import Any

from navil_jax.data.formats import files
from navil_jax.data.formats.index import FileIndex
from navil_jax.data.formats.record_images import (
    CLIP_SUFFIXES,
    IMAGE_FIELDS,
    IMAGE_SUFFIXES,
    NAME_FIELDS,
    image_values,
    is_seen,
)
from navil_jax.data.formats.record_text import CAPTION_FIELDS
from navil_jax.data.formats.record_videos import VIDEO_FIELDS, video_values
from navil_jax.data.formats.records import FIELDS, READING, Reading, RecordSource, parse_json, reason
from navil_jax.data.formats.scan_tar import scan_tar, tar_key

_TEXTS = ("json", *CAPTION_FIELDS)


class WebDataset(RecordSource):
    """One tar. Members of a sample stand side by side.

    A sample has an image (KEY.jpg, or another ending of an image) or several (KEY.0.jpg, KEY.1.jpg in the order of
    their numbers) and its text as KEY.json (a record such as those of JSON lines), KEY.txt (a caption) or KEY.cls (a
    class, taken for a caption). KEY.question.txt is the field "question" of its record, and so on. The text of a .json
    counts before that of a .txt. A mask (KEY.seg.png, KEY.mask.png) and other members beside an image are not used; a
    second image makes the sample bad. Where there is no image, KEY.mp4 (or another ending of a video) is the video.
    """

    suffixes = (".tar",)

    def __init__(self, path: str, reading: Reading = READING) -> None:
        super().__init__(path, reading)
        self._index = FileIndex(path, "tar", scan_tar)

    def versions(self) -> list[files.Version]:
        return [self._index.version]

    def __len__(self) -> int:
        return len(self._index)

    def key(self, index: int) -> str:
        """`FILE.tar#NUMBER`, from 1; where the sample can be read, `FILE.tar/KEY`."""
        return f"{files.name_of(self.path)}#{index + 1}"

    def record(self, index: int) -> dict[str, Any]:
        if self._index[index][1] == self._index.size:
            raise ValueError("the tar is cut off here: nothing marks its end")
        key, members = _members(self._index.read(index))
        if self._index.is_marked(index):
            raise ValueError(f"members of {key} stand apart; pack the tar again, sorted by name")
        images = _images(key, members)
        return _record(images, members, f"{files.name_of(self.path)}/{key}")


def _members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of a run of members, and their contents by extension."""
    found: dict[str, bytes] = {}
    key = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                if member.isdir() or not (named := tar_key(member.name)):
                    continue
                key, extension = (
                    named[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"),
                    named[1],
                )
                opened = archive.extractfile(member) if member.isfile() else None
                if opened is None:
                    raise ValueError(f"{member.name} is a link; pack the tar with --dereference --hard-dereference")
                if extension in found:
                    raise ValueError(f"{key}.{extension} stands twice")
                found[extension] = opened.read()
            if archive.offset != len(content):
                raise ValueError("a broken member follows this sample; nothing behind it in the tar can be read")
    except tarfile.TarError as error:
        raise ValueError(f"the tar is broken here: {error}") from error
    return key, found


def _images(key: str, members: Mapping[str, bytes]) -> list[bytes]:
    """The image KEY.jpg, or those with numbers in their order. ValueError if it is not clear which they are."""
    alone = [extension for extension in members if f".{extension}" in IMAGE_SUFFIXES]
    numbered: dict[int, str] = {}
    for extension in members:
        number, _, ending = extension.partition(".")
        if number.isdecimal() and f".{ending}" in IMAGE_SUFFIXES:
            if int(number) in numbered:
                raise ValueError(
                    f"two images of number {int(number)}: {key}.{numbered[int(number)]}, {key}.{extension}"
                )
            numbered[int(number)] = extension
    several = [*alone, *(numbered[number] for number in sorted(numbered))]
    if len(alone) > 1 or (alone and numbered):
        raise ValueError(f"which are its images, and in which order? {', '.join(several)}; number them 0.jpg, 1.jpg")
    others = [extension for extension in members if extension not in _TEXTS]
    if not several and others and not _clip(members):
        raise ValueError(
            f"{f'{key}.{others[0]}'.rstrip('.')} is not read; an image is called KEY.jpg, several KEY.0.jpg, KEY.1.jpg"
        )
    return [members[extension] for extension in several]


def _record(images: list[bytes], members: Mapping[str, bytes], key: str) -> dict[str, Any]:
    try:
        record = parse_json(members.get("json", b"{}"))
    except ValueError as error:
        raise ValueError(f"{key}.json: {reason(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{key}.json: a record must be an object, not {type(record).__name__}")
    texts = {_field(name): members[name].decode("utf-8-sig").strip() for name in members if _is_text(name)}
    others = {
        name: _beside(name, content)
        for name, content in members.items()
        if name not in ("json", *FIELDS) and not _is_text(name)
    }
    if images:
        named = len(image_values({**record, "url": None}))
        if named not in (0, len(images)):
            raise ValueError(f"{key}.json names {named} images, and {len(images)} stand beside it")
        record = {name: value for name, value in record.items() if name not in (*IMAGE_FIELDS, *NAME_FIELDS)}
        others = {name: content for name, content in others.items() if members[name] not in images}
        record["images"] = images
    elif clip := _clip(members):
        if len(video_values(record)) > 1:
            raise ValueError(f"{key}.json names several videos, and 1 stands beside it")
        record = {name: value for name, value in record.items() if name not in VIDEO_FIELDS}
        record["video"] = others.pop(clip)
    for name in texts.keys() & record.keys():
        if record[name] != texts[name]:
            raise ValueError(f"{key}.{name} and {name} of {key}.json are different texts; keep one")
    return {**texts, **others, **record, "key": key}


def _clip(members: Mapping[str, bytes]) -> str:
    """The extension of the only video, KEY.mp4; empty: there is none, or several."""
    clips = [extension for extension in members if f".{extension.rpartition('.')[2]}" in CLIP_SUFFIXES]
    return clips[0] if len(clips) == 1 and "." not in clips[0] else ""


def _is_text(name: str) -> bool:
    return name in CAPTION_FIELDS or name.endswith(".txt")


def _field(name: str) -> str:
    """The field that a member of text is: KEY.prompt.txt is the prompt of a record."""
    return name.removesuffix(".txt")


def _beside(name: str, content: bytes) -> bytes | bool:
    """A member that is no image of the sample's: what has to be seen or heard, or that there is one of another kind."""
    ending = name.rpartition(".")[2]
    is_image = f".{ending}" in IMAGE_SUFFIXES
    return content if is_image or is_seen(ending) or "depth" in name.split(".") else True
