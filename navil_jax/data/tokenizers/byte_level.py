"""Text <-> ids by byte-level BPE, in the file layout of the Qwen3 releases (Hugging Face's tokenizers library)."""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from navil_jax.data.tokenizers.base import (
    ADDED_FILE,
    CONFIG_FILE,
    JSON_FILE,
    MAP_FILE,
    PLAIN_TOKEN,
    Token,
    Tokenizer,
    content,
    parse_json,
)
from navil_jax.errors import UserError

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
# How Qwen2 and Qwen3 cut a text before pairs are merged.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE and the tokens added to it; nothing stands in front of a text."""

    FILES = (JSON_FILE, CONFIG_FILE, VOCAB_FILE, MERGES_FILE, ADDED_FILE, MAP_FILE)
    MARKERS = ("<|im_start|>", "<|im_end|>")

    def __init__(self, files: Mapping[str, bytes], name: str = "tokenizer") -> None:
        super().__init__(files, name)
        if JSON_FILE in files:
            self._layout = parse_json(files, JSON_FILE, name)
        else:
            self._layout = _layout(parse_json(files, VOCAB_FILE, name), files[MERGES_FILE])
        model = self._layout.get("model") or {}
        if model.get("type", "BPE") != "BPE" or "ByteLevel" not in json.dumps(self._layout.get("decoder")):
            raise UserError(f"{name}/{JSON_FILE}: not a byte-level BPE, which the Qwen3 releases have")
        self._layout |= {"truncation": None, "padding": None}
        added = self._added(self._layout.get("added_tokens") or [])
        self._full = self._build(added)
        for token in added:
            found = self._full.token_to_id(token["content"])
            if found != token["id"]:
                raise UserError(
                    f"{name}: the token {token['content']} has the id {token['id']} in {CONFIG_FILE} or {ADDED_FILE}, "
                    f"and {found} after the pieces; ids may not have gaps"
                )
        self._ids = {token["content"]: token["id"] for token in added}
        self._size = 1 + max(self._full.get_vocab().values(), default=-1)
        self.bos_id = self._core_id("bos_token") if self._config.get("add_bos_token") else None
        self.eos_id, self.pad_id = self._core_id("eos_token"), self._core_id("pad_token")

    def _added(self, stated: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Added tokens of all files, by id; those of tokenizer.json first, as they are there."""
        additional = {content(token) for token in self._config.get("additional_special_tokens") or []}
        tokens = {token["content"]: token for token in stated}
        for i, token in self._config.get("added_tokens_decoder", {}).items():
            tokens.setdefault(token["content"], {"id": int(i), **PLAIN_TOKEN, "special": False, **token})
        for token, i in self._ids.items():
            tokens.setdefault(token, {"id": i, "content": token, **PLAIN_TOKEN, "special": token in additional})
        return sorted(tokens.values(), key=lambda token: token["id"])

    def _build(self, added: list[dict[str, Any]]) -> tokenizers.Tokenizer:
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(self._layout | {"added_tokens": added}))
        except Exception as error:  # the library raises bare exceptions
            raise UserError(f"{self._name}/{JSON_FILE}: not a tokenizer ({error})") from error

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The pieces alone."""
        return self._build([])

    def _core_id(self, key: str) -> int | None:
        token = content(self._config.get(key))
        return None if token is None else self._full.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str, allow_special: bool) -> list[int]:
        return (self._full if allow_special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, text: str) -> list[Token]:
        """A character that several tokens share belongs to the last of them.

        Example: "aé" as bytes a, 0xC3, 0xA9 -> spans (0, 1), (1, 1), (1, 2)
        """
        found = self._plain.encode(text, add_special_tokens=False)
        tokens, begin = [], 0
        for i, end in zip(found.ids, [*(start for start, _ in found.offsets[1:]), len(text)], strict=False):
            tokens.append(Token(i, begin, max(begin, end)))
            begin = tokens[-1].end
        return tokens

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return self._full.decode([i for i in ids if 0 <= i < self._size], skip_special_tokens=skip_special)


def _layout(vocabulary: dict[str, int], merges: bytes) -> dict[str, Any]:
    """The tokenizer.json of a vocab.json and merges.txt."""
    lines = [line for line in merges.decode().split("\n") if line.strip() and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [line.split(" ") for line in lines]},
    }
