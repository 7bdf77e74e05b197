"""Messages of a chat, as OpenAI's interface has them -> turns with `<image>`, and what the images are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.errors import UserError

MOST_MESSAGES, MOST_PARTS = 1000, 1000


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a prompt is made of; the i-th `<image>` of all questions stands for the i-th image.

    Attributes:
      system: None: that of the checkpoint.
      images: addresses, as they were given.
    """

    system: str | None
    history: tuple[tuple[str, str], ...]
    question: str
    images: tuple[str, ...]


def read_messages(messages: Any) -> Conversation:
    """Reads messages: an optional system message, then users' and assistants' in turns, a user's last.

    Content is a text or a list of parts, {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url":
    ...}}.

    Raises:
      UserError: names the message, and what is wrong there.

    Example: [{"role": "user", "content": "Hi"}] -> Conversation(None, (), "Hi", ())
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: must be a list of at least one message")
    if len(messages) > MOST_MESSAGES:
        raise UserError(f"messages: {len(messages):,} are over the limit of {MOST_MESSAGES:,}")
    system, texts, images = None, list[str](), list[str]()
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        role = message.get("role") if isinstance(message, dict) else None
        if number == 0 and role in ("system", "developer"):
            system = _content(message.get("content"), where, None)
            continue
        wanted = ("user", "assistant")[len(texts) % 2]
        if role != wanted:
            raise UserError(f"{where}.role: must be {wanted!r} here, not {role!r}; users and assistants take turns")
        texts.append(_content(message.get("content"), where, images if role == "user" else None))
    if len(texts) % 2 == 0:
        raise UserError("messages: the last one must be a user's")
    if not texts[-1].strip():
        raise UserError(f"messages.{len(messages) - 1}: is empty; give a text or an image")
    *turns, question = texts
    return Conversation(system, tuple(zip(turns[::2], turns[1::2], strict=True)), question, tuple(images))


def _content(content: Any, where: str, images: list[str] | None) -> str:
    """The text of a message; its images are added to a list, None where they may not stand."""
    if isinstance(content, str):
        return _text(content, f"{where}.content")
    if not isinstance(content, list):
        raise UserError(f"{where}.content: must be a text or a list of parts")
    if len(content) > MOST_PARTS:
        raise UserError(f"{where}.content: {len(content):,} parts are over the limit of {MOST_PARTS:,}")
    texts = []
    for number, part in enumerate(content):
        at = f"{where}.content.{number}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), f"{at}.text"))
        elif kind == "image_url" and images is not None:
            images.append(_address(part.get("image_url"), at))
            texts.append(PLACEHOLDER)
        else:
            kinds = "'text'" if images is None else "'text' or 'image_url'"
            raise UserError(f"{at}.type: must be {kinds}, not {kind!r}")
    return "\n".join(texts)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: must be a text")
    if PLACEHOLDER in text:
        raise UserError(f"{where}: holds {PLACEHOLDER}, which stands for an image; give the image as a part")
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raises `UserError` for a text with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: is no UTF-8 at character {error.start + 1}") from error


def _address(image: Any, where: str) -> str:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url:
        raise UserError(f"{where}.image_url.url: must be the address of an image")
    return url


def read_stops(stop: Any) -> tuple[str, ...]:
    """Stop strings: None, a text, or a list of at most 16. Raises `UserError` for others."""
    stops: Sequence[Any] = () if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise UserError("stop: must be a text or a list of texts, none of them empty")
    if len(stops) > 16 or any(len(text) > 1000 for text in stops):
        raise UserError("stop: at most 16 texts of at most 1,000 characters")
    return tuple(stops)


def read_number(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A number of a request, or the default where it is missing or null. Raises `UserError` for another type.

    Example: {"temperature": 1}, "temperature", float, 0.0 -> 1.0
    """
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"{name}: must be {'a number' if kind is float else 'a whole number'}, not {value!r:.40}")
    try:
        return kind(value)
    except OverflowError:
        raise UserError(f"{name}: is too large") from None
