"""The conversation of a record: system message, questions and answers, and the images that stand in them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from navil_jax.data.formats.record_images import check_all_seen, image_values, is_missing
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import CAPTION_PROMPT, Turn

CAPTION_FIELDS = ("caption", "text", "txt", "cls")
TEXT_FIELDS = ("conversations", "messages", "texts", "turns", "question", *CAPTION_FIELDS)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_IN_IMAGE_PART = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")


class Conversation(NamedTuple):
    """What a record says.

    Attributes:
      system: None: the record has no system message.
      turns: `<image>` in questions stands for an image.
      images: one for each part of type image in the questions, None where it only says that one stands there.
    """

    system: str | None
    turns: list[Turn]
    images: list[Any]


def conversation(record: Mapping[str, Any], prompt: str = "") -> Conversation:
    """The conversation of a record.

    The first of these fields counts: "conversations" [{"from": human or gpt, "value"}], "messages" [{"role",
    "content"}], "texts" [{"user", "assistant"}], "turns" [[question, answer]], "question" with "answer", and
    "caption", "text", "txt" or "cls", the answer to `prompt`. A text may be a list of parts, {"type": "text", "text"}
    or {"type": "image"}, as OpenAI and Hugging Face have them.

    Raises:
      ValueError: none of them, roles out of turn, an empty answer, an image outside a question, or no text.

    Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt",
      "value": "A cat."}]} -> (None, [("<image>\\nWhat?", "A cat.")], [])
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    field = next((field for field in TEXT_FIELDS if not is_missing(record.get(field))), None)
    system = None if is_missing(record.get("system")) else _text(record["system"], "system")
    if field is None:
        raise ValueError(f"has none of {', '.join(TEXT_FIELDS)}; its fields are {', '.join(map(str, record))}")
    value, images = record[field], list[Any]()
    if field in CAPTION_FIELDS:
        question = prompt or (CAPTION_PROMPT if image_values(record) else "")
        turns = [(question, _text(value, field))]
    elif field == "question":
        turns = [(_text(value, field, images), _text(record.get("answer"), "answer"))]
    else:
        value = _list(value, field)
        if field in ("conversations", "messages"):
            own, turns = _dialogue(value, field, images)
            system = own if own is not None else system
        else:
            turns = [_pair(entry, f"{field} {number}", images) for number, entry in enumerate(value, 1)]
    for number, (_, answer) in enumerate(turns, 1):
        if not answer.strip():
            raise ValueError(f"{field}: answer {number} is empty")
    return Conversation(system, turns, images)


def _list(value: Any, field: str) -> Sequence[Any]:
    value = list(value) if isinstance(value, np.ndarray) and value.ndim else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"{field}: must be a list with at least one entry")
    return value


def _dialogue(entries: Sequence[Any], field: str, images: list[Any]) -> tuple[str | None, list[Turn]]:
    names = ("from", "value") if field == "conversations" else ("role", "content")
    said: list[tuple[str, str]] = []
    for number, entry in enumerate(entries, 1):
        where = f"{field} {number}"
        if not isinstance(entry, Mapping) or any(name not in entry for name in names):
            raise ValueError(f"{where}: must be an object with {names[0]} and {names[1]}")
        role = _ROLES.get(given := _text(entry[names[0]], where))
        if role is None:
            raise ValueError(f"{where}: unknown role {given[:40]!r}, known are {', '.join(_ROLES)}")
        check_all_seen(entry, names, (), f"{where}: ")
        said.append((role, _text(entry[names[1]], where, images if role == "user" else None)))
    system = said.pop(0)[1] if said[0][0] == "system" else None
    expected = ("user", "assistant") * -(-len(said) // 2)
    for number, ((role, _), wanted) in enumerate(zip(said, expected, strict=False), 1 + (system is not None)):
        if role != wanted:
            raise ValueError(f"{field} {number}: is of {role} where {wanted} is due")
    if len(said) % 2 or not said:
        raise ValueError(f"{field}: the last question has no answer")
    return system, [(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2)]


def _pair(entry: Any, where: str, images: list[Any]) -> Turn:
    if isinstance(entry, Mapping):
        check_all_seen(entry, ("question", "user", "answer", "assistant"), (), f"{where}: ")
        entry = [entry.get("question", entry.get("user")), entry.get("answer", entry.get("assistant"))]
    if isinstance(entry, str | bytes) or not isinstance(entry, Sequence | np.ndarray) or len(entry) != 2:
        raise ValueError(f"{where}: must be a question and an answer")
    return _text(entry[0], where, images), _text(entry[1], where)


def _text(value: Any, where: str, images: list[Any] | None = None) -> str:
    """Text of a field: a string, its bytes, a number, or a list of parts of text and images.

    Args:
      images: takes the image of each such part; None: no image may stand here.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be text, not {value}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = "".join(_part(part, f"{where}, part {number}", images) for number, part in enumerate(value, 1))
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: has half a surrogate pair, which is no text") from error
    return value


def _part(part: Any, where: str, images: list[Any] | None) -> str:
    """The text of a part, or `<image>` for one that is an image."""
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: must be an object with type and text, not {type(part).__name__}")
    kind = part.get("type")
    if is_missing(kind):
        kind = "text" if not is_missing(part.get("text")) else next((n for n in _IMAGE_PARTS if part.get(n)), None)
    if isinstance(kind, bytes):
        kind = kind.decode()
    if kind in _TEXT_PARTS:
        check_all_seen(part, ("type", "text"), (), f"{where}: ")
        if not isinstance(part.get("text"), str | bytes):
            raise ValueError(f"{where}: must be text, not {type(part.get('text')).__name__}")
        return _text(part["text"], where)
    if kind not in _IMAGE_PARTS:
        raise ValueError(f"{where}: is of type {str(kind)[:40]}, which is not read")
    if images is None:
        raise ValueError(f"{where}: an image can stand in a question only")
    check_all_seen(part, ("type", *_IN_IMAGE_PART), (None,), f"{where}: ")
    own = [part[name] for name in _IN_IMAGE_PART if not is_missing(part.get(name))]
    if len(own) > 1:
        raise ValueError(f"{where}: names {len(own)} images")
    index = part.get("index")
    if not own and not is_missing(index) and index != len(images):
        raise ValueError(f"{where}: image {index} stands where image {len(images)} is due")
    images.append(_own_image(own[0], where) if own else None)
    return PLACEHOLDER


def _own_image(value: Any, where: str) -> Any:
    """The image of a part as `record_images.read_image` takes it."""
    if isinstance(value, Mapping) and value.get("type") == "base64":  # Anthropic's
        return f"data:{value.get('media_type')};base64,{value.get('data')}"
    if isinstance(value, Mapping) and value.get("file_id"):
        raise ValueError(f"{where}: names a file on a server; download it first")
    return value
