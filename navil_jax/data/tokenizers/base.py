"""Tokenizer: what both kinds share, added tokens and the files of a folder."""

import abc
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from navil_jax.config import SPECIAL_TOKENS
from navil_jax.errors import UserError
from navil_jax.paths import path_of

CONFIG_FILE, ADDED_FILE, MAP_FILE, JSON_FILE = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
PLAIN_TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


class Token(NamedTuple):
    """An id and the characters [begin, end) of the text that it stands for; both equal inside a split character."""

    id: int
    begin: int
    end: int


class Tokenizer(abc.ABC):
    """A table of pieces and the tokens added to it.

    Added tokens (the markers of the chat template, of images and of boxes) are parsed from text only where the caller
    allows it. Elsewhere a literal "<img>" typed by a user is plain text, and so is what else the table would take for
    a marker.

    Attributes:
      bos_id: stands in front of a text; None where nothing does (Qwen3).
      eos_id, pad_id: end of a text and padding; None where the files name none.
    """

    FILES: ClassVar[tuple[str, ...]]  # what a folder may hold of this kind; other files are not read
    MARKERS: ClassVar[tuple[str, ...]]  # of the chat template
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer") -> None:
        """From the contents of the files; `name` is what errors call their folder. Raises `UserError`."""
        self._files = {file: files[file] for file in self.FILES if file in files}
        self._name = name
        self._config = parse_json(files, CONFIG_FILE, name)
        self._ids = _added_ids(self._config, parse_json(files, ADDED_FILE, name), name)
        _check_tokens(self._config, f"{name}/{CONFIG_FILE}")

    def files(self) -> dict[str, bytes]:
        """File name -> content, byte for byte as loaded, for embedding in a checkpoint."""
        return dict(self._files)

    def save(self, folder: str | Path) -> None:
        """Writes the files as they were loaded."""
        target = path_of(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (target / name).write_bytes(data)

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id in use, of pieces and added tokens."""

    @functools.cached_property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids of `config.SPECIAL_TOKENS`, in that order. Raises `UserError` for a token that is not in the table."""
        return tuple(self.token_id(token) for token in SPECIAL_TOKENS)

    def token_id(self, token: str) -> int:
        """The id of an added token. Raises `UserError` if there is none."""
        if token not in self._ids:
            raise UserError(f"{self._name}: no token {token} in {ADDED_FILE} or {CONFIG_FILE}; add it there")
        return self._ids[token]

    def reserved_id(self, token: str) -> int | None:
        """The id that the table keeps free for a marker of the chat template."""
        return None

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Text -> stretches and whether each is an added token, which `encode` with allow_special parses, or text.

        Added tokens count whether the files call them special (`<img>`) or not (`<think>` of Qwen3).

        Example: "a<think>\\n\\n" -> [("a", False), ("<think>", True), ("\\n\\n", False)], if <think> is added
        """
        return [(part, part in self._ids) for part in self._added_pattern.split(text) if part]

    @functools.cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        return any_of(self._ids)

    @abc.abstractmethod
    def encode(self, text: str, allow_special: bool) -> list[int]:
        """Text -> ids, without `<s>`.

        Args:
          allow_special: parse added tokens, longest first, as the released tokenizer does everywhere, and encode the
            text between them piece by piece. Otherwise all text is plain.

        Example: "<img>a" -> [546, 441] if allow_special, else ids of "<", "im", "g", ">", "a"
        """

    @abc.abstractmethod
    def encode_with_spans(self, text: str) -> list[Token]:
        """Plain text -> ids, as `encode` without special tokens, with the characters that each stands for."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Ids -> text as the released tokenizer gives it.

        Bytes that are no UTF-8 become U+FFFD. An id outside the table (a model's vocabulary may be larger) decodes to
        nothing; the released code fails on it.

        Args:
          skip_special: leave out all special tokens.
        """


def _added_ids(config: Mapping[str, Any], added: Mapping[str, Any], name: str) -> dict[str, int]:
    """Token -> id of both files. Raises `UserError` for what is no token, no id, or contradicts itself."""
    where, ids = f"{name}/{CONFIG_FILE}: added_tokens_decoder", dict[str, int]()
    table = config.get("added_tokens_decoder") or {}
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: must be an object of ids and tokens, not {json.dumps(table)[:60]}")
    for i, token in table.items():
        if not i.isdecimal():
            raise UserError(f"{where}: {i!r} is no id; ids are whole numbers")
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
            raise UserError(f"{where}.{i}: must be an object with the token's text as content")
        ids[token["content"]] = int(i)
    for text, number in added.items():
        if type(number) is not int or number < 0:
            raise UserError(
                f"{name}/{ADDED_FILE}: {text}: must be an id, a whole number, not {json.dumps(number)[:60]}"
            )
        if ids.get(text, number) != number:
            raise UserError(
                f"{name}/{ADDED_FILE}: {text} has the id {number}, and {ids[text]} in {CONFIG_FILE}; correct one"
            )
    return ids | dict(added)


def _check_tokens(config: Mapping[str, Any], file: str) -> None:
    """Raises `UserError` for a named token that is no text, and no object with one."""
    additional = config.get("additional_special_tokens") or []
    if not isinstance(additional, list):
        raise UserError(f"{file}: additional_special_tokens: must be a list of tokens, or null")
    named = {f"additional_special_tokens.{number}": token for number, token in enumerate(additional)}
    named |= {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    for key, token in named.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and not isinstance(text, str):
            raise UserError(
                f"{file}: {key}: must be a text, or an object with one as content, not {json.dumps(token)[:60]}"
            )


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Grows the tokenizer of a plain language model by the markers of images and boxes that it lacks.

    They get the ids after all others, in the order of `config.SPECIAL_TOKENS`. Markers of the chat template that a base
    model lacks come before them, or at the ids that its table keeps for them (as in the InternLM2 chat releases).

    Returns:
      A tokenizer with changed JSON files; the same one if it lacks nothing.

    Example: InternLM2's 92544 pieces -> </box> is 92544, ..., <IMG_FRAME_BREAK> is 92555
    """
    size = tokenizer.vocab_size
    added: dict[str, int] = {}
    for token in (*tokenizer.MARKERS, *SPECIAL_TOKENS):
        if token not in tokenizer._ids:
            reserved = tokenizer.reserved_id(token)
            added[token] = max(size, 1 + max(added.values(), default=0)) if reserved is None else reserved
    if not added:
        return tokenizer
    files, name = tokenizer.files(), tokenizer._name
    config = parse_json(files, CONFIG_FILE, name)
    said = {str(i): {"content": token, **PLAIN_TOKEN, "special": True} for token, i in added.items()}
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | said
    config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *added]
    beyond = {token: i for token, i in added.items() if i >= size}
    files[CONFIG_FILE] = json_bytes(config)
    files[ADDED_FILE] = json_bytes(parse_json(files, ADDED_FILE, name) | beyond)
    if MAP_FILE in files:
        table = parse_json(files, MAP_FILE, name)
        more = [{"content": token, **PLAIN_TOKEN} for token in added]
        table["additional_special_tokens"] = [*table.get("additional_special_tokens", []), *more]
        files[MAP_FILE] = json_bytes(table)
    if JSON_FILE in files:
        whole = parse_json(files, JSON_FILE, name)
        whole["added_tokens"] = [*whole.get("added_tokens", []), *({"id": int(i), **said[i]} for i in said)]
        files[JSON_FILE] = json_bytes(whole)
    return type(tokenizer)(files, name)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str | Path) -> None:
    """Raises a `UserError` if the tokenizer has ids that a model's vocabulary lacks; `name` is the model's."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{name}: the tokenizer in {tokenizer._name} has {tokenizer.vocab_size} ids, the model {vocab_size}; "
            "they do not belong together"
        )


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longest first; matches nothing if there are none."""
    return re.compile("(" + ("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)") + ")")


def content(token: str | Mapping[str, Any] | None) -> str | None:
    """The text of a token in tokenizer_config.json, which is a text or a mapping."""
    return token["content"] if isinstance(token, Mapping) else token


def parse_json(files: Mapping[str, bytes], file: str, name: str) -> dict:
    """A JSON file's content, {} where there is none. Raises `UserError` if it is no JSON object."""
    try:
        value = json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise UserError(f"{name}/{file}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}/{file}: not a JSON object")
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """As JSON files of tokenizers are written."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
