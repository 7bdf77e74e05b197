"""What formats have in common: one record (a mapping, as JSON has them) -> one `Sample`."""

import abc
import errno
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from navil_jax.data.formats import files
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import CAPTION_PROMPT, BadSample, Sample, Turn, check_index
from navil_jax.errors import UserError

IMAGE_FIELDS = ("images", "image", "jpg", "jpeg", "png", "webp")  # the first one that a record has counts
CAPTION_FIELDS = ("caption", "text", "txt", "cls")
TEXT_FIELDS = ("conversations", "messages", "texts", "turns", "question", *CAPTION_FIELDS)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS_SAMPLES = 100_000  # most samples of a source whose text trains a tokenizer, evenly spread
# What makes a sample bad if its record or image cannot be read; others, of disk or network, are no fault of a sample.
_SAMPLE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RecordSource(abc.ABC):
    """A `Source` of records. A format says how many there are, what they are called, and how one is read."""

    def __init__(self, path: str, root: str = "", prompt: str = "") -> None:
        """Args:
        path: of the file or folder.
        root: folder of the images that records name; empty: that of the file.
        prompt: the question of samples that are a caption only; empty: `CAPTION_PROMPT`, and none without an image.
        """
        self.path, self.root, self.prompt = path, root or files.folder_of(path), prompt

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Name of the sample where its record has no "key", found without reading it."""

    @abc.abstractmethod
    def record(self, index: int) -> Mapping[str, Any]:
        """The record. ValueError says what is wrong with it."""

    def place(self, index: int) -> str:
        """Where a bad record is found, for messages, if the key does not tell."""
        return ""

    def __getitem__(self, index: int) -> Sample:
        """Raises `BadSample` for a record that cannot be used, OSError if the disk or the network fails."""
        check_index(index, len(self))
        try:
            return to_sample(self.record(index), self.key(index), self.root, self.prompt)
        except (ValueError, UserError, OSError) as error:
            if isinstance(error, OSError) and not is_of_sample(error):
                raise
            raise BadSample(self.path, self.key(index), self.place(index) + reason(error)) from error

    def texts(self, samples: int = TEXTS_SAMPLES) -> Iterator[str]:
        """Questions and answers of so many samples at most, evenly spread; bad ones are left out."""
        for index in range(0, len(self), -(-len(self) // samples)):
            try:
                _, turns = conversation(self.record(index), self.prompt)
            except ValueError:
                continue
            for turn in turns:
                yield from turn


def is_of_sample(error: OSError) -> bool:
    """Whether the sample is to blame (it names a file that is not there), and not the disk or the network."""
    return isinstance(error, FileNotFoundError) or error.errno in _SAMPLE_ERRNOS


def parse_json(content: bytes) -> Any:
    """The value of JSON text. ValueError says where it is broken."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: nested too deeply") from error


def reason(error: Exception) -> str:
    """One line on what is wrong."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, FileNotFoundError):
        return f"no such file: {error.filename or error}"
    return " ".join(str(error).split()) or type(error).__name__


def to_sample(record: Any, key: str, root: str = "", prompt: str = "") -> Sample:
    """A sample of a record.

    Images stand where the questions say `<image>`, in order, or in front of the first question if none does.

    Args:
      record: images under one of `IMAGE_FIELDS` (a path, bytes, {"bytes", "path"}, or a list of those); text as
        `conversation` reads it; "key" and "kind" where there are.

    Raises:
      ValueError, OSError: the record cannot be used; the message says why.
    """
    system, turns = conversation(record, prompt)
    values = image_values(record)
    placeholders = sum(question.count(PLACEHOLDER) for question, _ in turns)
    if placeholders and placeholders != len(values):
        raise ValueError(f"{len(values)} images but {PLACEHOLDER} stands {placeholders} times in the questions")
    images = tuple(_image(value, root) for value in values)
    name, kind = (_text(record.get(field) or "", field) for field in ("key", "kind"))
    return Sample(name or key, images, tuple(turns), kind, system)


def image_values(record: Mapping[str, Any]) -> list[Any]:
    """The record's images as they stand in it. Raises ValueError if there is only an address of one."""
    value = next((record[field] for field in IMAGE_FIELDS if record.get(field) is not None), None)
    if value is None and record.get("url"):
        raise ValueError("has a url and no image; download the images first (img2dataset writes tars of them)")
    if value is None or (isinstance(value, str | bytes) and not value):
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if several or (isinstance(value, np.ndarray) and value.dtype == object) else [value]


def _image(value: Any, root: str) -> Image.Image | bytes:
    """One image: encoded bytes, or decoded where the record holds it so."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            raise ValueError(f"the image is an address ({value}); download it first")
        return files.read_file(files.join(root, value))
    if isinstance(value, np.ndarray):
        return Image.fromarray(value.squeeze(-1) if value.shape[-1:] == (1,) else value)
    if not isinstance(value, bytes | Image.Image):
        raise ValueError(f"an image must be a path or encoded bytes, not {type(value).__name__}")
    return value


def encoded(image: Image.Image | bytes | Any) -> bytes:
    """A sample's image as bytes of a file: as they are, or as PNG if it is decoded."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        return files.read_file(str(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def conversation(record: Mapping[str, Any], prompt: str = "") -> tuple[str | None, list[Turn]]:
    """The system message (None: the record has none) and the turns of a record.

    The first of these fields counts: "conversations" [{"from": human or gpt, "value"}], "messages" [{"role",
    "content"}], "texts" [{"user", "assistant"}], "turns" [[question, answer]], "question" with "answer", and
    "caption", "text", "txt" or "cls", the answer to `prompt`.

    Raises:
      ValueError: none of them, roles out of turn, an empty answer, or text that is not UTF-8.

    Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt",
      "value": "A cat."}]} -> (None, [("<image>\\nWhat?", "A cat.")])
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    field = next((field for field in TEXT_FIELDS if record.get(field) is not None), None)
    system = None if record.get("system") is None else _text(record["system"], "system")
    if field is None:
        raise ValueError(f"has none of {', '.join(TEXT_FIELDS)}; its fields are {', '.join(map(str, record))}")
    value = record[field]
    if field in CAPTION_FIELDS:
        question = prompt or (CAPTION_PROMPT if image_values(record) else "")
        turns = [(question, _text(value, field))]
    elif field == "question":
        turns = [(_text(value, field), _text(record.get("answer"), "answer"))]
    else:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            raise ValueError(f"{field}: must be a list with at least one entry")
        if field in ("conversations", "messages"):
            own, turns = _dialogue(value, field)
            system = own if own is not None else system
        else:
            turns = [_pair(entry, f"{field} {number}") for number, entry in enumerate(value, 1)]
    for number, (_, answer) in enumerate(turns, 1):
        if not answer.strip():
            raise ValueError(f"{field}: answer {number} is empty")
    return system, turns


def _dialogue(entries: Sequence[Any], field: str) -> tuple[str | None, list[Turn]]:
    names = ("from", "value") if field == "conversations" else ("role", "content")
    said: list[tuple[str, str]] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping) or any(name not in entry for name in names):
            raise ValueError(f"{field} {number}: must be an object with {names[0]} and {names[1]}")
        if str(entry[names[0]]) not in _ROLES:
            raise ValueError(f"{field} {number}: unknown role {entry[names[0]]!r}, known are {', '.join(_ROLES)}")
        said.append((_ROLES[entry[names[0]]], _text(entry[names[1]], f"{field} {number}")))
    system = said.pop(0)[1] if said[0][0] == "system" else None
    expected = ("user", "assistant") * -(-len(said) // 2)
    for number, ((role, _), wanted) in enumerate(zip(said, expected, strict=False), 1 + (system is not None)):
        if role != wanted:
            raise ValueError(f"{field} {number}: is of {role} where {wanted} is due")
    if len(said) % 2 or not said:
        raise ValueError(f"{field}: the last question has no answer")
    return system, [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]


def _pair(entry: Any, where: str) -> Turn:
    if isinstance(entry, Mapping):
        entry = [entry.get("question", entry.get("user")), entry.get("answer", entry.get("assistant"))]
    if not isinstance(entry, Sequence) or len(entry) != 2:
        raise ValueError(f"{where}: must be a question and an answer")
    return _text(entry[0], where), _text(entry[1], where)


def _text(value: Any, where: str) -> str:
    """Text of a field: a string, its bytes, a number, or a list of parts of text and images."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part if isinstance(part, Mapping) else {} for part in value]
        value = "".join(
            PLACEHOLDER if part.get("type") == "image" else _text(part.get("text"), where) for part in parts
        )
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: has half a surrogate pair, which is no text") from error
    return value
