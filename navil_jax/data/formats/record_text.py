"""The conversation of a record: system message, questions and answers, and the images that stand in them."""

import dataclasses
import decimal
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from navil_jax.data.formats.record_images import check_all_seen, image_values, is_given, is_missing, is_there, same
from navil_jax.data.prompt import PLACEHOLDER
from navil_jax.data.sample import CAPTION_PROMPT, Turn

DIALOGUE_FIELDS = ("conversations", "messages", "texts", "turns")
CAPTION_FIELDS = ("caption", "text", "txt", "cls")
TEXT_FIELDS = (*DIALOGUE_FIELDS, "question", *CAPTION_FIELDS)
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_IN_IMAGE_PART = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")
_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # of an image part, as Qwen2-VL has them
_FROM_VALUE, _ROLE_CONTENT = ("from", "value"), ("role", "content")

# What cannot be used and would change what is learnt: of a record or of one of its turns, ...
_OF_BOTH = ("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
# ... of a record of any kind, ...
_OF_RECORD = ("history", "tools", "functions", *_OF_BOTH)
# ... of one with a question or a caption, which they belong to (a whole conversation says itself what was asked), ...
_OF_QUESTION = ("context", "choices", "options", "passage", "documents", "hint")
# ... under other names, ...
_OPTIONS = re.compile(
    r"(?:[a-z]+_)?(?:choices|options|candidates|alternatives|distractors)(?:_?(?:list|texts?))?"
    r"|(?:choice|option|opt|candidate|alternative|distractor)_?(?:[a-j]|\d{1,2})"
)
# ... of a caption, for which the source's prompt would be taken for the question.
_OF_CAPTION = ("prompt", "instruction", "instructions", "query", "input")
_WEIGHTS = (
    "loss",
    "weight",
    "loss_weight",
    "loss_mask",
    "loss_scale",
    "train",
    "trainable",
    "training",
    "learn",
)  # of an answer: only all or 1 is done
_MASKS = ("mask", "masked", "ignore", "ignored")


@dataclasses.dataclass
class Conversation:
    """What a record says.

    Attributes:
      system: None: the record has no system message.
      turns: `<image>` in questions stands for an image.
      images: one for each part of type image in the questions, None where it only says that one stands there.
      used: fields of the record that this is made of.
      unused: others, within turns and parts of these fields, as "messages.name".
    """

    system: str | None = None
    turns: list[Turn] = dataclasses.field(default_factory=list)
    images: list[Any] = dataclasses.field(default_factory=list)
    used: list[str] = dataclasses.field(default_factory=list)
    unused: set[str] = dataclasses.field(default_factory=set)


def conversation(record: Mapping[str, Any], prompt: str = "") -> Conversation:
    """The conversation of a record.

    The first of these fields counts: "conversations" [{"from": human or gpt, "value"}], "messages" [{"role",
    "content"}], "texts" [{"user", "assistant"}], "turns" [[question, answer]], "question" with "answer", and
    "caption", "text", "txt" or "cls", the answer to `prompt`. A text may be a list of parts, {"type": "text", "text"}
    or {"type": "image"}, as OpenAI and Hugging Face have them.

    Raises:
      ValueError: none of them, roles out of turn, an empty answer, an image outside a question, no text, or two fields
        that say different things; or what cannot be used and would change what is learnt.

    Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt",
      "value": "A cat."}]} -> system None, turns [("<image>\\nWhat?", "A cat.")], no images
    """
    if not isinstance(record, Mapping):
        array = "; of one JSON array, call the file *.json" if isinstance(record, list) and record else ""
        raise ValueError(f"a record must be an object, not {type(record).__name__}{array}")
    field = next((field for field in TEXT_FIELDS if not is_missing(record.get(field))), None)
    if field is None:
        raise ValueError(f"has none of {', '.join(TEXT_FIELDS)}; its fields are {', '.join(map(str, record))}")
    said = _conversation(record, field, prompt)
    _check_only_one(record, field, said)
    _check_meaning(record, _OF_RECORD, "")
    if field not in DIALOGUE_FIELDS:
        _check_meaning(
            record, (*_options(record), *_OF_QUESTION, *(_OF_CAPTION if field in CAPTION_FIELDS else ())), ""
        )
    _check_weight(record, "")
    return said


def _conversation(record: Mapping[str, Any], field: str, prompt: str) -> Conversation:
    """The conversation in one of `TEXT_FIELDS`, with the record's system message."""
    value, said = record[field], Conversation(used=[field])
    said.system = _system(record, said)
    if field in CAPTION_FIELDS:
        question = prompt or (CAPTION_PROMPT if image_values(record) else "")
        said.turns = [(question, _text(value, field, said))]
    elif field == "question":
        question = _text(value, field, said, is_question=True)
        said.turns = [(question, _text(record.get("answer"), "answer", said))]
        said.used.append("answer")
    else:
        value = _list(value, field)
        if field in ("conversations", "messages"):
            own = _dialogue(value, field, said)
            if own is not None and said.system and own != said.system:
                raise ValueError(f"{field} 1: is another system message than {said.used[-1]}; keep one")
            said.system = own if own is not None else said.system
        else:
            said.turns = [_pair(entry, f"{field} {number}", said) for number, entry in enumerate(value, 1)]
    for number, (_, answer) in enumerate(said.turns, 1):
        if _is_blank(answer):
            raise ValueError(f"{field}: answer {number} is empty")
    return said


def _system(record: Mapping[str, Any], said: Conversation) -> str | None:
    """The text of one of `SYSTEM_FIELDS`; None: there is none."""
    found = {name: _text(record[name], name, said) for name in SYSTEM_FIELDS if not is_missing(record.get(name))}
    if len(set(filter(None, found.values()))) > 1:
        raise ValueError(f"{' and '.join(found)} are different system messages; keep one")
    said.used += found
    return next(filter(None, found.values()), "") if found else None


def _check_only_one(record: Mapping[str, Any], field: str, said: Conversation) -> None:
    """Raises ValueError if another field of the same kind says something else."""
    kinds: tuple[str, ...] = (DIALOGUE_FIELDS, ("caption", "text", "txt"))[field in CAPTION_FIELDS]
    for other in kinds if field in kinds else ():
        if other == field or not is_given(record.get(other)):
            continue
        if other in DIALOGUE_FIELDS and not isinstance(record[other], list | tuple | np.ndarray):
            continue  # such as a number of turns
        theirs = _conversation(record, other, said.turns[0][0])
        if (theirs.turns, theirs.system) != (said.turns, said.system) or not same(theirs.images, said.images):
            raise ValueError(f"{field} and {other} are different texts; keep one")
        said.used.append(other)


def _check_meaning(entry: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raises ValueError if one of these fields (lower case), which cannot be used, says anything."""
    for name, value in entry.items():
        if str(name).lower() in names and is_given(value):
            raise ValueError(f"{where}{name} is not read, and the text means something else without it; put it there")


def _options(entry: Mapping[str, Any]) -> set[str]:
    """Fields (lower case) that hold what a question lets choose from: choice_a, candidates, or A and B."""
    names = {str(name).lower() for name in entry}
    single = {name for name in names if len(name) == 1 and name.isalpha()}
    return {name for name in names if _OPTIONS.fullmatch(name)} | (single if {"a", "b"} <= single else set())


def _check_weight(entry: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a weight that an answer is not trained with; of a whole record, only for one of 0."""
    for name, said in entry.items():
        plain, value = str(name).lower(), _as_weight(said)
        if value is not None and plain in (*_WEIGHTS, *_MASKS):
            left_out = bool(value) if plain in _MASKS else not value
            if left_out or (where and plain in _WEIGHTS and value != 1):
                raise ValueError(f"{where}{name} is {value}, and all answers are trained; remove the record or {name}")


def _as_weight(value: Any) -> bool | int | float | None:
    """What a field says as a truth value or a number; None: neither."""
    value = value.item() if isinstance(value, np.generic) else value
    value = float(value) if isinstance(value, decimal.Decimal) else value
    if isinstance(value, str | bytes):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        try:
            value = {"false": False, "true": True}.get(text.lower())
            value = float(text) if value is None else value
        except ValueError:
            return None
    return value if isinstance(value, bool | int | float) and not is_missing(value) else None


def _list(value: Any, field: str) -> Sequence[Any]:
    value = list(value) if isinstance(value, np.ndarray) and value.ndim else value
    if isinstance(value, str | bytes) and value.strip()[:1] in ("[", "{", b"[", b"{"):
        raise ValueError(f"{field}: must be a list, not text that describes one; write the list itself")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"{field}: must be a list with at least one entry")
    return value


def _dialogue(entries: Sequence[Any], field: str, said: Conversation) -> str | None:
    """Adds the turns of a dialogue; its system message, or None."""
    names, others = (_FROM_VALUE, _ROLE_CONTENT) if field == "conversations" else (_ROLE_CONTENT, _FROM_VALUE)
    found: list[tuple[str, str]] = []
    for number, entry in enumerate(entries, 1):
        where = f"{field} {number}"
        if not isinstance(entry, Mapping) or any(name not in entry for name in names):
            raise ValueError(f"{where}: must be an object with {names[0]} and {names[1]}")
        role = _ROLES.get(given := _text(entry[names[0]], where, said))
        if role is None:
            raise ValueError(f"{where}: unknown role {given[:40]!r}, known are {', '.join(_ROLES)}")
        for name, other in zip(names, others, strict=True):
            if is_given(entry.get(other)) and not same(*(_known_role(entry[key]) for key in (name, other))):
                raise ValueError(f"{where}: {name} and {other} differ; keep one")
        _check_entry(entry, (*names, *others), where, said, role == "assistant")
        found.append((role, _text(entry[names[1]], where, said, is_question=role == "user")))
    system = found.pop(0)[1] if found[0][0] == "system" else None
    expected = ("user", "assistant") * -(-len(found) // 2)
    for number, ((role, _), wanted) in enumerate(zip(found, expected, strict=False), 1 + (system is not None)):
        if role != wanted:
            raise ValueError(f"{field} {number}: is of {role} where {wanted} is due")
    if len(found) % 2 or not found:
        raise ValueError(f"{field}: the last question has no answer")
    said.turns = [(found[i][1], found[i + 1][1]) for i in range(0, len(found), 2)]
    return system


def _is_blank(text: str) -> bool:
    """Whether a text has nothing to be seen: blanks, control characters and those of no width alone."""
    return all(unicodedata.category(letter) in ("Cc", "Cf", "Zs", "Zl", "Zp") for letter in text)


def _known_role(value: Any) -> Any:
    """A role by one name, any other value as it is."""
    return _ROLES.get(value, value) if isinstance(value, str) else value


def _check_entry(
    entry: Mapping[str, Any], used: Sequence[str], where: str, said: Conversation, is_answer: bool
) -> None:
    """Raises ValueError for fields of a turn that would have to be used; notes the others."""
    check_all_seen(entry, used, (), f"{where}: ")
    _check_meaning(entry, _OF_BOTH, f"{where}: ")
    if is_answer:
        _check_weight(entry, f"{where}: ")
    _note_unused(entry, used, where, said)


def _note_unused(entry: Mapping[str, Any], used: Sequence[str], where: str, said: Conversation) -> None:
    field = where.partition(" ")[0]
    for name, value in entry.items():
        says = is_given if str(name).lower() in (*_WEIGHTS, *_MASKS) else is_there  # 0 of a question is what is done
        if name not in used and says(value):
            said.unused.add(f"{field}.{name}")


def _pair(entry: Any, where: str, said: Conversation) -> Turn:
    if isinstance(entry, Mapping):
        pairs = ("question", "user"), ("answer", "assistant")
        for name, other in pairs:
            if is_given(entry.get(name)) and is_given(entry.get(other)) and not same(entry[name], entry[other]):
                raise ValueError(f"{where}: {name} and {other} differ; keep one")
        _check_entry(entry, (*pairs[0], *pairs[1]), where, said, is_answer=True)
        _check_meaning(entry, (*_options(entry), *_OF_QUESTION), f"{where}: ")
        entry = [entry.get(name, entry.get(other)) for name, other in pairs]
    if isinstance(entry, str | bytes) or not isinstance(entry, Sequence | np.ndarray) or len(entry) != 2:
        raise ValueError(f"{where}: must be a question and an answer")
    return _text(entry[0], where, said, is_question=True), _text(entry[1], where, said)


def _text(value: Any, where: str, said: Conversation, is_question: bool = False) -> str:
    """Text of a field: a string, its bytes, a number, or a list of parts of text and images.

    Args:
      said: takes the image of each such part.
      is_question: whether an image may stand here.
    """
    if isinstance(value, np.floating) and math.isfinite(value):
        value = str(value)  # the shortest of its own type: 1.1 of a float32
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: must be text, not {value}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = enumerate(value, 1)
        value = "".join(_part(part, f"{where}, part {number}", said, is_question) for number, part in parts)
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: has half a surrogate pair, which is no text") from error
    return value


def _part(part: Any, where: str, said: Conversation, is_question: bool) -> str:
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
        _note_unused(part, ("type", "text"), where, said)
        if not isinstance(part.get("text"), str | bytes):
            raise ValueError(f"{where}: must be text, not {type(part.get('text')).__name__}")
        return _text(part["text"], where, said)
    if kind not in _IMAGE_PARTS:
        raise ValueError(f"{where}: is of type {str(kind)[:40]}, which is not read")
    if not is_question:
        raise ValueError(f"{where}: an image can stand in a question only")
    _add_image(part, where, said)
    return PLACEHOLDER


def _add_image(part: Mapping[str, Any], where: str, said: Conversation) -> None:
    """Adds the image of a part, or None for the next one of those beside the questions."""
    known = ("type", *_IN_IMAGE_PART)
    check_all_seen(part, (*known, *_SIZES), (None,), f"{where}: ")
    if text := next((name for name in ("text", "content") if is_given(part.get(name))), ""):
        raise ValueError(f"{where}: has {text} beside its image; give it a part of its own")
    _note_unused(part, (*known, "index"), where, said)
    own = [part[name] for name in _IN_IMAGE_PART if not is_missing(part.get(name))]
    if len(own) > 1:
        raise ValueError(f"{where}: names {len(own)} images")
    index = part.get("index")
    if not own and not is_missing(index) and index != len(said.images):
        raise ValueError(f"{where}: image {index} stands where image {len(said.images)} is due")
    said.images.append(_own_image(own[0], where) if own else None)


def _own_image(value: Any, where: str) -> Any:
    """The image of a part as `record_images.read_image` takes it."""
    if isinstance(value, Mapping) and value.get("type") == "base64":  # Anthropic's
        return f"data:{value.get('media_type')};base64,{value.get('data')}"
    if isinstance(value, Mapping) and value.get("file_id"):
        raise ValueError(f"{where}: names a file on a server; download it first")
    return value
